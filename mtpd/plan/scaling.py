"""Memory of one rank and time of one step, by how the run is sharded: one formula for plans, tables and documents.

N ranks; the trunk has P parameters of b bytes, of which L are in its layers; the heads have H parameters, which are
trained in float32. A rank holds, in bytes:

    sharding        trunk               heads           gradients   Adam's moments    on the host
    none            P b                 4 H             4 H         8 H               -
    zero1           P b                 4 H + 4 H / N   4 H         8 H / N           -
    zero2           P b                 4 H + 4 H / N   4 H / N     8 H / N           -
    zero3           (P - L + L / N) b   8 H / N         4 H / N     8 H / N           -
    zero3-cpu       (P - L) b           8 H / N         4 H / N     8 H / N           L b / N
    zero3-nvme      (P - L) b           8 H / N         4 H / N     8 H / N           -

DeepSpeed keeps a second copy of the weights that it updates, its master copy: 4 H / N. Beside it there are buckets in
which gradients are reduced, at stage 3 the layers that are whole for a moment, and what does not depend on sharding:
the heads in the trunk's number format, activations, the states of a batch, and the tile of the loss. At stage 3
embedding and unembedding stay whole: each step reads all of both.

The time of a step is that of its work, for the trunk and for the heads on their own: the operations of its products at
one rate, and the bytes that all else reads and writes at another. Messages go on meanwhile, and the longer of the two
counts; or they follow it, where they are carried by what computes. What there is of each is counted in tests, and the
time compared with steps that were measured. Kernels' starts, reading rows and waiting for each other are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mtpd.parallel.deepspeed_config import LIVE_LAYERS, bucket_elements

Sharding = Literal["none", "zero1", "zero2", "zero3", "zero3-cpu", "zero3-nvme"]
SHARDINGS: tuple[Sharding, ...] = ("none", "zero1", "zero2", "zero3", "zero3-cpu", "zero3-nvme")
"""From the one that is tried first to the one that needs least memory; "none" is train.deepspeed: null."""
FLOAT32 = 4
SPARE = 0.9
"""Share of a device's memory that a plan fills: allocators and libraries need the rest."""
UPDATED = 10
"""Numbers read and written, in place, for each parameter that a process updates: by the norm (1) and clipping (2) of
its gradient, and by AdamW (7: weight, gradient and two moments in, all but the gradient out)."""
COPIED = ((4, 0), (7, 8), (7, 8), (8, 14))
"""The same by stage for what is copied, in several processes: for all parameters, and for the share of a process. These
are the buckets in which gradients go, and what DeepSpeed copies besides; they are counted and not derived."""
COLLECTED = 3.5
"""The same for each parameter of the trunk's layers when it is collected at stage 3."""


@dataclass(frozen=True)
class Load:
    """What a rank computes and holds in training, whichever way it is sharded. Parameters are counted, not bytes."""

    trunk: int
    """Parameters of the trunk, its output head included."""
    layers: int
    """Of them, in its layers."""
    largest_layer: int
    heads: int
    """Parameters that are trained."""
    largest_head: int
    hidden: int
    item: int
    """Bytes of a number of the trunk."""
    beside: Mapping[str, int]
    """Bytes by purpose of what does not depend on sharding."""
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
    parts: int = 1
    """Ranks that share each row: `tokens` are those of a part."""
    exchanged: int = 0
    """Bytes of a token that these ranks exchange for the attention of the trunk, all layers together."""
    exchanged_heads: int = 0
    """Those for the heads, forward and backward, all depths together."""


def memory(load: Load, sharding: Sharding, ranks: int) -> dict[str, int]:
    """Bytes of the device by purpose, in training, of one of so many ranks."""
    stage = _stage(sharding)
    offloaded = sharding in ("zero3-cpu", "zero3-nvme")
    whole = load.trunk * load.item
    heads = FLOAT32 * load.heads
    found = {"trunk": whole, "heads": heads, "gradients": heads, "optimizer": 2 * heads}
    if stage >= 1:
        found |= {"master copy": _part(heads, ranks), "optimizer": _part(2 * heads, ranks)}
        found["buckets"] = 2 * FLOAT32 * bucket_elements(load.largest_head, hidden_size=load.hidden)
    if stage >= 2:
        found["gradients"] = _part(heads, ranks)
    if stage == 3:
        outside = (load.trunk - load.layers) * load.item
        found["trunk"] = outside + (0 if offloaded else _part(load.layers * load.item, ranks))
        found["trunk's layers, whole for a moment"] = min(LIVE_LAYERS * load.largest_layer, load.layers) * load.item
        found["heads"] = _part(heads, ranks)
        found["heads, whole for a moment"] = FLOAT32 * min(LIVE_LAYERS * load.largest_head, load.heads)
    return found | dict(load.beside)


def host_memory(load: Load, sharding: Sharding, ranks: int) -> int:
    """Bytes of the trunk that a rank keeps in the memory of its machine."""
    return _part(load.layers * load.item, ranks) if sharding == "zero3-cpu" else 0


@dataclass(frozen=True)
class Fit:
    """Whether a way to shard fits into a device."""

    sharding: Sharding
    memory: dict[str, int]
    """Bytes by purpose."""
    fits: bool

    @property
    def total(self) -> int:
        return sum(self.memory.values())


def fits(load: Load, ranks: int, device_memory: float) -> list[Fit]:
    """All ways to shard over so many ranks, from the first to be tried to the last.

    Args:
        device_memory: bytes of each device, of which a share stays free.
    """
    # With one rank the first stages shard nothing, and only offloading makes room.
    possible = SHARDINGS if ranks > 1 else ("none", "zero3-cpu", "zero3-nvme")
    found = [(each, memory(load, each, ranks)) for each in possible]
    return [Fit(each, parts, sum(parts.values()) <= SPARE * device_memory) for each, parts in found]


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


def trunk_flops(load: Load) -> float:
    """Of one forward pass over a micro batch: 2 a parameter and token, and 2 a feature and pair of tokens."""
    return 2.0 * load.tokens * (load.active + load.row * load.attended)


def heads_flops(load: Load) -> float:
    """Forward and backward of the heads, the teacher's logits, and two products with the unembedding a depth.

    Attention computes its weights anew in the backward pass: five products there, after two.
    """
    logits = 2.0 * load.hidden * load.vocabulary * (1 + 2 * load.depth)
    return load.tokens * (6.0 * load.active_heads + 7.0 * load.row * load.attended_heads + logits)


def trunk_swept(load: Load) -> float:
    """Bytes read and written between the products of a forward pass. In 16 bits, half of it is in 32 bits: norms."""
    return load.tokens * load.between * (load.item + FLOAT32) / 2


def heads_swept(load: Load) -> float:
    """Bytes read and written between the products of the heads, and over the logits of the loss.

    In 16 bits too: what autocast saves there, its casts of numbers and weights take.
    """
    return float(FLOAT32 * load.tokens * (load.between_heads + load.vocabulary * load.sweeps))


def softmaxes(load: Load) -> float:
    """Numbers of which the loss computes the softmax."""
    return float(load.tokens * load.vocabulary * load.softmaxes)


def updated(load: Load, sharding: Sharding, ranks: int) -> float:
    """Bytes read and written in place, for what a process updates."""
    return float(FLOAT32 * UPDATED * (_part(load.heads, ranks) if _stage(sharding) else load.heads))


def copied(load: Load, sharding: Sharding, ranks: int) -> tuple[float, float]:
    """Bytes read and written by copies of gradients and weights: for the heads, and of the trunk's layers."""
    stage = _stage(sharding)
    whole, shared = COPIED[stage] if ranks > 1 else (0, 0)
    layers = COLLECTED * load.layers * load.item if stage == 3 else 0.0
    return float(FLOAT32 * (whole * load.heads + shared * _part(load.heads, ranks))), layers


def received(load: Load, sharding: Sharding, ranks: int) -> tuple[float, float]:
    """Bytes that a rank receives in an optimizer step of one micro batch: for the heads, and of the trunk's layers.

    Gradients are summed everywhere, which brings in what the heads have twice; DeepSpeed does so at stages 1 and 2
    too, where new weights come back besides. At stage 3 gradients are shared out; weights are collected for the
    forward pass, and for the backward pass those that were let go. Ranks that share rows exchange what attention reads
    and gives, of their part, in each layer, and of the heads' layers once more in the backward pass.
    """
    stage, share = _stage(sharding), (ranks - 1) / ranks
    elsewhere = load.tokens * (load.parts - 1) / load.parts
    of_heads, of_layers = elsewhere * load.exchanged_heads, elsewhere * load.exchanged
    if stage < 3:
        return (3 if stage else 2) * FLOAT32 * load.heads * share + of_heads, of_layers
    let_go = max(0, load.heads - LIVE_LAYERS * load.largest_head)
    return FLOAT32 * (2 * load.heads + let_go) * share + of_heads, load.layers * load.item * share + of_layers


def step_seconds(load: Load, sharding: Sharding, ranks: int, machine: Machine, *, stored: bool) -> float:
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


def _stage(sharding: Sharding) -> int:
    return 0 if sharding == "none" else int(sharding[4])


def _part(count: int, ranks: int) -> int:
    return -(-count // ranks)
