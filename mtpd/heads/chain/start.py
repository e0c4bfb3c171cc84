"""How chain heads start. Measured against each other in `docs/results.md`.

A head that starts well passes the trunk's state on. Three things make that exact: the block adds
nothing to its residual path; M = [0 | I]; and the gain of the hidden state's norm is 1/g, where g is
the gain of the final norm, because the state that comes in has been multiplied with g once and leaves
through a norm that multiplies with g again. From there `regression` goes on in closed form: M_k is the
ridge regression of the state k positions further on what head k reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mtpd import alignment
from mtpd.errors import UnsupportedModel
from mtpd.heads.chain.heads import ChainHead, ChainHeads
from mtpd.heads.norms import gain, set_gain
from mtpd.trunk import Trunk

Start = Literal["identity", "copy_last", "copy_last_k", "random", "regression"]

DEFAULT: Start = "regression"
"""The start of a recipe that names none."""

RIDGE = 1e-2
"""Ridge of the regression, as a share of the mean variance of the inputs."""

SMALLEST_GAIN = 1e-2
"""Gains below this (relative to the largest) are not inverted: 1/g would only amplify rounding."""


def source_layers(start: Start, depth: int, layers: int) -> list[int]:
    """Which layer of the trunk (0-based) the block of each head has its kind, and for copies its weights, from."""
    if start == "copy_last_k":
        # Fewer layers than heads: the first heads share the trunk's first layer.
        return [max(0, layers - depth + k) for k in range(depth)]
    return [layers - 1] * depth


@torch.no_grad()
def initialise(heads: ChainHeads, trunk: Trunk, start: Start, *, seed: int = 0) -> None:
    """Gives new heads their first weights. `regression` is `identity` until `fit` has seen data.

    Args:
        start: identity | copy_last | copy_last_k | random | regression.
        seed: of the random parts.
    """
    random = torch.Generator().manual_seed(seed)
    size = trunk.hidden_size
    std = float(getattr(trunk.config, "initializer_range", 0.02))
    final: Any = trunk.decoder.norm
    for index, head in enumerate(heads.layers):
        assert isinstance(head, ChainHead)
        block: Any = head.block
        block.norm.load_state_dict(final.state_dict())
        for parameter in block.layers[0].parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=random) * std)
        project = torch.zeros(size, 2 * size)
        if start == "random":
            project = torch.randn(size, 2 * size, generator=random) * std
        else:
            project[:, size:] = torch.eye(size)
            set_gain(head.hidden_norm, _inverse(gain(block.norm).float()))
        head.project.weight.copy_(project)
        if start in ("copy_last", "copy_last_k"):
            source = heads.config.source_layers[index]
            block.layers[0].load_state_dict(trunk.decoder.layers[source].state_dict())
        elif start in ("identity", "regression"):
            _silence(block.layers[0], trunk.name)


def _silence(layer: nn.Module, model: str) -> None:
    """Makes a decoder layer add nothing to its residual path, in a way that it can learn its way out of.

    Where a norm follows attention and MLP (Gemma, OLMo2), its gain becomes zero: behind a zeroed
    projection that norm would blow the first update up to full size. Elsewhere the two output
    projections become zero.

    Raises:
        UnsupportedModel: the layer has none of the usual names.
    """
    if hasattr(layer, "post_feedforward_layernorm"):
        for name in ("post_attention_layernorm", "post_feedforward_layernorm"):
            norm = layer.get_submodule(name)
            set_gain(norm, torch.zeros_like(gain(norm)))
        return
    outputs = [(name, value) for name, value in layer.named_parameters() if "o_proj" in name or "down_proj" in name]
    if not any("o_proj" in name for name, _ in outputs) or not any("down_proj" in name for name, _ in outputs):
        raise UnsupportedModel(
            f"{model}: heads.init: identity and regression need layers with `o_proj` and `down_proj`; "
            "accepted here: copy_last, copy_last_k, random"
        )
    for _, value in outputs:
        value.zero_()


@torch.no_grad()
def fit(heads: ChainHeads, trunk: Trunk, batches: Iterable[dict[str, Tensor]]) -> None:
    """Fits the projections M_1..M_K by ridge regression (the `regression` start).

    M_k maps what head k reads, [norm(E(x_{t+k})) ; norm(h_t^{k-1})], to the direction of the trunk's
    state h_{t+k}, the state from which the main head predicts the same token. The normal equations are
    summed over all batches, one depth after the other, since head k reads the fitted head k-1.

    Args:
        batches: rows with `input_ids`, `labels`, `position_ids` [B, T] and `hidden` [B, T, D]; read K times.
    """
    batches = list(batches)
    size = trunk.hidden_size
    device = trunk.device
    chain = heads.chain()
    # A shared block is fitted at depth 1: what takes h_t one token further takes h^1 one further as well.
    for k in range(1, (1 if heads.config.shared else heads.depth) + 1):
        inputs = torch.zeros(2 * size, 2 * size, dtype=torch.float64, device=device)
        outputs = torch.zeros(2 * size, size, dtype=torch.float64, device=device)
        head = chain[k - 1]
        block: Any = head.block
        inverse = _inverse(gain(block.norm).float())
        for batch in batches:
            ids, hidden = batch["input_ids"].to(device), batch["hidden"].to(device).float()
            state = hidden
            for j in range(1, k):
                earlier = chain[j - 1]
                embed = trunk.embed(alignment.tokens_read(ids, j)).float()
                state = earlier.block.norm(earlier.mix(embed, state))
            counted = alignment.counted(batch["labels"].to(device), batch["position_ids"].to(device), k)
            embed = trunk.embed(alignment.tokens_read(ids, k)).float()
            read = torch.cat([head.embed_norm(embed), head.hidden_norm(state)], dim=-1)[counted]
            b, t = counted.nonzero(as_tuple=True)
            wanted = hidden[b, alignment.teacher_row(t, k)] * inverse
            wanted = wanted * wanted.pow(2).mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()
            inputs += (read.T @ read).double()
            outputs += (read.T @ wanted).double()
        inputs += RIDGE * inputs.diagonal().mean() * torch.eye(2 * size, dtype=torch.float64, device=device)
        head.project.weight.copy_(torch.linalg.solve(inputs, outputs).T)


def configure(settings: Mapping[str, Any], trunk: Trunk) -> dict[str, Any]:
    """The part of `HeadsConfig` that is chain heads' own, from the `heads` section of a recipe."""
    blocks = 1 if settings["shared"] else settings["depth"]
    layers = source_layers(settings["init"] or DEFAULT, blocks, trunk.depth)
    adapters = [settings["adapters"]] * settings["depth"] if settings["adapters"] else []
    return {"shared": settings["shared"], "source_layers": layers, "adapters": adapters}


def start(heads: ChainHeads, trunk: Trunk, start: Start | None, *, seed: int = 0) -> bool:
    """`initialise`; returns whether `fit` has to follow."""
    initialise(heads, trunk, start or DEFAULT, seed=seed)
    return (start or DEFAULT) == "regression"


def _inverse(values: Tensor) -> Tensor:
    smallest = SMALLEST_GAIN * values.abs().max()
    signs = torch.where(values < 0, -1.0, 1.0)
    return signs / values.abs().clamp_min(smallest)
