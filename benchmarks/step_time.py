"""Time of one training step on paper: a formula, held to counts of real steps and to steps that were measured.

The time of a step is that of its work, for the trunk and for the heads on their own: the operations of its products at
one rate, and the bytes that all else reads and writes at another. Messages go on meanwhile, and the longer of the two
counts; or they follow it, where they are carried by what computes. What there is of each is counted in tests, and the
time compared with steps that were measured. Kernels' starts, reading rows and waiting for each other are left out.

`docs/results/step_times.md` has the formula in tables, and what was measured beside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch

from mtpd.data.models import load_model
from mtpd.heads import build_heads, configure_heads
from mtpd.parallel.deepspeed_config import LIVE_LAYERS
from mtpd.plan.plan import plan
from mtpd.plan.scaling import FLOAT32, Load, Sharding, share, stage_of
from mtpd.recipe import Recipe
from mtpd.train.arguments import loss_settings
from mtpd.trunk import Trunk

POSITION = 8
"""Bytes of the number of a position, which goes with what attention reads of a token."""
UPDATED = 10
"""Numbers read and written, in place, for each parameter that a process updates: by the norm (1) and clipping (2) of
its gradient, and by AdamW (7: weight, gradient and two moments in, all but the gradient out)."""
COPIED = ((4, 0), (7, 8), (7, 8), (8, 14))
"""The same by stage for what is copied, in several processes: for all parameters, and for the share of a process. These
are the buckets in which gradients go, and what DeepSpeed copies besides; they are counted and not derived."""
COLLECTED = 3.5
"""The same for each parameter of the trunk's layers when it is collected at stage 3."""


@dataclass(frozen=True, kw_only=True)
class Work(Load):
    """What a rank computes and exchanges in training, beside what it holds."""

    tokens: int
    """Of a micro batch of one rank."""
    active: int
    """Parameters of the trunk's layers that a token goes through: fewer than `layers` where it has experts."""
    active_heads: int
    """Parameters of the heads that a token goes through, all depths together."""
    row: int
    """Tokens of a row: attention compares each with all of them."""
    attended: int
    """Features of queries and values in the trunk, all layers together."""
    attended_heads: int
    """Those in the heads, all depths together."""
    between: int
    """Numbers of a token that are read and written between the products of a pass through the trunk."""
    between_heads: int
    """Those in the forward and backward pass of the heads, all depths together."""
    sweeps: int
    """Numbers that the loss reads and writes for a column and token, for the teacher and all depths together."""
    softmaxes: int
    """Softmaxes beside them, for the teacher and all depths; the selection of the likeliest columns is one more."""
    depth: int
    vocabulary: int
    """Tokens that the loss compares."""
    exchanged: int = 0
    """Bytes of a token that these ranks exchange for the attention of the trunk, all layers together."""
    exchanged_heads: int = 0
    """Those for the heads, forward and backward, all depths together."""


def work_of(recipe: Recipe) -> Work:
    """Counts from the configuration of the model alone, as a plan does."""
    planned = plan(recipe)
    model, _ = load_model(recipe.model, dtype=recipe.dtype, device=recipe.device, config_only=True)
    trunk = Trunk(model)
    config = configure_heads(recipe.heads.model_dump(), trunk, vocabulary=0, fingerprint="")
    heads = build_heads(trunk, config)
    sizes, parts = planned.sizes, recipe.train.sequence_parallel
    layers = list(trunk.decoder.layers)
    blocks: Any = getattr(heads, "layers", None)
    # A block that serves all depths is gone through once for each.
    often = recipe.heads.depth / (len(blocks) if blocks else 1)
    queries, keys = sizes.projected - sizes.cached, sizes.cached // 2
    # What attention reads and gives.
    exchanged = sizes.projected + queries
    attended = _attended(trunk.config)
    # Counted in a llama. In a layer, two norms (7 each) and two residuals (3) of the width, rotations (10) of queries
    # and keys, and the gate of the MLP (5); besides, the embedding (2) and the final norm (7).
    layer = 20 * sizes.hidden + 10 * (queries + keys) + 5 * sizes.inner
    # Forward and backward of a chain head, as it is counted: five norms a head are most of it.
    head = 169 * sizes.hidden + 26 * (queries + keys) + 14 * sizes.inner
    return Work(
        **{field.name: getattr(planned.load, field.name) for field in fields(Load)},
        tokens=recipe.train.micro_batch_rows * recipe.data.row_length // parts,
        active=_active(layers, trunk.config),
        active_heads=round(often * _active([heads], trunk.config)),
        row=recipe.data.row_length,
        attended=trunk.depth * attended,
        attended_heads=sizes.depth * attended,
        between=sizes.layers * layer + 9 * sizes.hidden,
        between_heads=sizes.depth * head,
        **_of_loss(recipe, sizes.columns),
        depth=recipe.heads.depth,
        vocabulary=sizes.columns,
        exchanged=trunk.depth * (exchanged * sizes.item + parts * POSITION),
        exchanged_heads=sizes.depth * (2 * exchanged * sizes.item + parts * POSITION),
    )


def _attended(config: Any) -> int:
    """Features of queries and of values together: what attention multiplies for each pair of tokens."""
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    # Of latent attention, whose keys are wider than its values.
    keys = int(getattr(config, "qk_head_dim", None) or width)
    return heads * (keys + int(getattr(config, "v_head_dim", None) or width))


def _of_loss(recipe: Recipe, columns: int) -> dict[str, int]:
    """What the loss does for a column and token, as counted with labels and the KL.

    Other losses: 5 sweeps a depth with labels alone (ce), 10 with the KL alone, 38 with lk.
    """
    if 0 < loss_settings(recipe).top_n < columns:
        return {"sweeps": 12 + 16 * recipe.heads.depth, "softmaxes": 2 + 2 * recipe.heads.depth}
    return {"sweeps": 5 + 13 * recipe.heads.depth, "softmaxes": 1 + recipe.heads.depth}


def _active(modules: Iterable[torch.nn.Module], config: Any) -> int:
    """Parameters that one token goes through: all, but for the experts that it is not sent to."""
    each = [pair for module in modules for pair in module.named_parameters()]
    experts = sum(parameter.numel() for name, parameter in each if ".experts." in name)
    names = ("n_routed_experts", "num_experts", "num_local_experts")
    count = next((int(found) for name in names if (found := getattr(config, name, None))), 1)
    chosen = int(getattr(config, "num_experts_per_tok", None) or count)
    return sum(parameter.numel() for _, parameter in each) - round(experts * (1 - chosen / count))


@dataclass(frozen=True)
class Machine:
    """What a step's time follows from. Rates are those that are reached, not those of the data sheet."""

    flops: float
    """Floating-point operations a second of a device, in products."""
    memory: float
    """Bytes a second that a device reads and writes, together."""
    copies: float
    """The same where much is copied into new memory: processors have to get it page by page."""
    softmax: float
    """Numbers a second of which a device computes the softmax. Exponentials take a processor longer than reading."""
    link: float
    """Bytes a second that a device receives from others in its machine."""
    network: float
    """Bytes a second that a machine receives from the others, which each of its devices gets."""
    devices: int = 8
    """In one machine."""
    overlaps: bool = True
    """Whether a device computes while messages are under way, as accelerators do. Processor cores carry them."""

    def bandwidth(self, ranks: int) -> float:
        """Of a collective operation of all ranks, in bytes a second that each receives."""
        return self.link if ranks <= self.devices else min(self.link, self.network)

    def both(self, work: float, messages: float) -> float:
        """Seconds that work and messages take together."""
        return max(work, messages) if self.overlaps else work + messages


def trunk_flops(load: Work) -> float:
    """Of one forward pass over a micro batch: 2 a parameter and token, and 2 a feature and pair of tokens."""
    return 2.0 * load.tokens * (load.active + load.row * load.attended)


def heads_flops(load: Work) -> float:
    """Forward and backward of the heads, the teacher's logits, and two products with the unembedding a depth.

    Attention computes its weights anew in the backward pass: five products there, after two.
    """
    logits = 2.0 * load.hidden * load.vocabulary * (1 + 2 * load.depth)
    return load.tokens * (6.0 * load.active_heads + 7.0 * load.row * load.attended_heads + logits)


def trunk_swept(load: Work) -> float:
    """Bytes read and written between the products of a forward pass. In 16 bits, half of it is in 32 bits: norms."""
    return load.tokens * load.between * (load.item + FLOAT32) / 2


def heads_swept(load: Work) -> float:
    """Bytes read and written between the products of the heads, and over the logits of the loss.

    In 16 bits too: what autocast saves there, its casts of numbers and weights take.
    """
    return float(FLOAT32 * load.tokens * (load.between_heads + load.vocabulary * load.sweeps))


def softmaxes(load: Work) -> float:
    """Numbers of which the loss computes the softmax."""
    return float(load.tokens * load.vocabulary * load.softmaxes)


def updated(load: Work, sharding: Sharding, ranks: int) -> float:
    """Bytes read and written in place, for what a process updates."""
    return float(FLOAT32 * UPDATED * (share(load.heads, ranks) if stage_of(sharding) else load.heads))


def copied(load: Work, sharding: Sharding, ranks: int) -> tuple[float, float]:
    """Bytes read and written by copies of gradients and weights: for the heads, and of the trunk's layers."""
    stage = stage_of(sharding)
    whole, shared = COPIED[stage] if ranks > 1 else (0, 0)
    layers = COLLECTED * load.layers * load.item if stage == 3 else 0.0
    return float(FLOAT32 * (whole * load.heads + shared * share(load.heads, ranks))), layers


def received(load: Work, sharding: Sharding, ranks: int) -> tuple[float, float]:
    """Bytes that a rank receives in an optimizer step of one micro batch: for the heads, and of the trunk's layers.

    Gradients are summed everywhere, which brings in what the heads have twice; DeepSpeed does so at stages 1 and 2
    too, where new weights come back besides. At stage 3 gradients are shared out; weights are collected for the
    forward pass, and for the backward pass those that were let go. Ranks that share rows exchange what attention reads
    and gives, of their part, in each layer, and of the heads' layers once more in the backward pass.
    """
    stage, share = stage_of(sharding), (ranks - 1) / ranks
    elsewhere = load.tokens * (load.parts - 1) / load.parts
    of_heads, of_layers = elsewhere * load.exchanged_heads, elsewhere * load.exchanged
    if stage < 3:
        return (3 if stage else 2) * FLOAT32 * load.heads * share + of_heads, of_layers
    let_go = max(0, load.heads - LIVE_LAYERS * load.largest_head)
    return FLOAT32 * (2 * load.heads + let_go) * share + of_heads, load.layers * load.item * share + of_layers


def step_seconds(load: Work, sharding: Sharding, ranks: int, machine: Machine, *, stored: bool) -> float:
    """Seconds of an optimizer step of one micro batch.

    Args:
        stored: the hidden states come from a store, and the trunk does not run.
    """
    heads_in, trunk_in = received(load, sharding, ranks)
    heads_copied, trunk_copied = copied(load, sharding, ranks)
    bandwidth = machine.bandwidth(ranks)
    swept = heads_swept(load) + updated(load, sharding, ranks)
    work = heads_flops(load) / machine.flops + softmaxes(load) / machine.softmax
    work += swept / machine.memory + heads_copied / machine.copies
    seconds = machine.both(work, heads_in / bandwidth)
    if stored:
        return seconds
    work = trunk_flops(load) / machine.flops + trunk_swept(load) / machine.memory + trunk_copied / machine.copies
    return seconds + machine.both(work, trunk_in / bandwidth)
