"""Starts chain heads. The starts are measured against each other in `docs/results.md`.

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
from torch import Tensor

from mtpd import alignment
from mtpd.errors import UserError
from mtpd.heads.base import Heads
from mtpd.heads.chain.heads import ChainHead, ChainHeads
from mtpd.heads.first_weights import RIDGE, inverse_gain, silence, source_layers
from mtpd.heads.norms import gain, set_gain
from mtpd.trunk import Trunk

Start = Literal["identity", "copy_last", "copy_last_k", "random", "regression"]

DEFAULT: Start = "regression"
"""The start of a recipe that names none."""


@torch.no_grad()
def initialise(heads: ChainHeads, trunk: Trunk, start: Start | None, *, seed: int = 0) -> bool:
    """Gives new heads their first weights, and says whether `fit` has to follow: after `regression`.

    Args:
        start: None is `DEFAULT`.
        seed: of the random parts.
    """
    start = start or DEFAULT
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
            set_gain(head.hidden_norm, inverse_gain(gain(block.norm).float()))
        head.project.weight.copy_(project)
        if start in ("copy_last", "copy_last_k"):
            source = heads.config.source_layers[index]
            trunk.copy_layer(source, block)
        elif start in ("identity", "regression"):
            silence(block.layers[0], trunk.name)
    return start == "regression"


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
        inverse = inverse_gain(gain(block.norm).float())
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


@torch.no_grad()
def adopt(heads: ChainHeads, trunk: Trunk, source: Heads, *, seed: int = 0) -> None:
    """Starts as the first heads of another chain.

    Raises:
        UserError: those are no chain, too few, or of another form.
    """
    if not isinstance(source, ChainHeads) or source.depth < heads.depth:
        raise UserError(
            f"heads.source: holds {source.depth} of kind {source.config.kind}; accepted: at least {heads.depth} chain "
            "heads"
        )
    found = source.first(heads.depth)
    own = heads.state_dict()
    # What can be drafted is the new heads' own choice.
    given = {name: each for name, each in found.state_dict().items() if name != "vocabulary"}
    if {name: each.shape for name, each in given.items()} != {n: v.shape for n, v in own.items() if n != "vocabulary"}:
        raise UserError("heads.source: holds chain heads of another form; accepted: with the same heads.shared")
    heads.load_state_dict({**own, **given})


def configure(settings: Mapping[str, Any], trunk: Trunk) -> dict[str, Any]:
    """Works out what chain heads add to `HeadsConfig`, from the `heads` section of a recipe."""
    blocks = 1 if settings["shared"] else settings["depth"]
    layers = source_layers(settings["init"] or DEFAULT, blocks, trunk.depth)
    return {"shared": settings["shared"], "source_layers": layers}
