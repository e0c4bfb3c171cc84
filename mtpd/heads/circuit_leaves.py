"""Leaves of circuits: a distribution over tokens for each place and component, linear in h_t.

    full     φ_ij = softmax(W_ij h)                      W [n, r, M, D]: an unembedding each
    shared   φ_ij = softmax(W (M_i h + U_ij V_i j h))    W the trunk's own; U_ij, V_ij of low rank

Full leaves are for small vocabularies. Shared ones add r small expanders to one map for each place.

Shape legend: C positions, D hidden size, n places, r components, M columns in use, q rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mtpd.trunk import Unembedding

TINY = 1e-37
"""Probabilities below count as this one."""


class FullLeaves(nn.Module):
    """An unembedding for each place and component."""

    def __init__(self, places: int, components: int, columns: int, size: int) -> None:
        super().__init__()
        self.places, self.components = places, components
        self.weight = nn.Parameter(torch.empty(places, components, columns, size))

    def logits(self, hidden: Tensor, *, first: int = 0, last: int | None = None) -> Tensor:
        """[C, n, r, M], or those of the places `first` to `last`."""
        weight = self.weight[first:last]
        flat = nn.functional.linear(hidden.to(weight.dtype), weight.flatten(0, 2))
        return flat.unflatten(-1, weight.shape[:3])

    def evidence(self, hidden: Tensor, columns: Tensor) -> Tensor:
        """log φ_ij of one column for each place, [C, n, r]; 0 where the column is -1."""
        weight = self.weight[: columns.shape[1]]
        dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
        return _FullEvidence.apply(hidden, weight, columns, dtype or weight.dtype)

    @torch.no_grad()
    def start(self, maps: list[Tensor], main: Unembedding, random: torch.Generator) -> None:
        """All components of a place start as the main head behind this place's map [D, D]."""
        for place, matrix in enumerate(maps):
            weight = main.weight.float() * main.scale
            self.weight[place] = weight @ matrix.to(weight)


class _FullEvidence(torch.autograd.Function):
    """One softmax over all leaves, kept for its gradient: that is one-hot minus softmax, times what comes in."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
        places, components, size, _ = weight.shape
        states = hidden.to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            flat = weight.to(dtype).flatten(0, 2)
            logits = (states @ flat.T).view(len(hidden), places, components, size)
            exact = torch.promote_types(dtype, torch.float32)
            p = logits.softmax(-1, dtype=exact)
            at = columns.clamp_min(0)[:, :, None, None].expand(-1, -1, components, 1)
            known = (columns >= 0)[:, :, None]
            found = p.gather(-1, at).squeeze(-1).clamp_min(TINY).log()
        ctx.save_for_backward(p, at, known, states, flat)
        ctx.dtypes = hidden.dtype, weight.dtype, weight.shape
        return torch.where(known, found, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        p, at, known, states, flat = ctx.saved_tensors
        hidden_dtype, weight_dtype, shape = ctx.dtypes
        with torch.autocast(states.device.type, enabled=False):
            scaled = torch.where(known, grad, 0.0)[..., None].to(p.dtype)
            # In the place of the softmax, which is not needed again.
            slope = p.mul_(-scaled).scatter_add_(-1, at, scaled).to(states.dtype).flatten(1)
            to_weight = (slope.T @ states).to(weight_dtype).view(shape) if ctx.needs_input_grad[1] else None
            to_hidden = (slope @ flat).to(hidden_dtype) if ctx.needs_input_grad[0] else None
        return to_hidden, to_weight, None, None


class SharedLeaves(nn.Module):
    """Expanders before one frozen unembedding, which is given with each call."""

    def __init__(self, places: int, components: int, size: int, rank: int) -> None:
        super().__init__()
        self.places, self.components = places, components
        self.base = nn.Parameter(torch.empty(places, size, size))
        self.down = nn.Parameter(torch.empty(places, components, rank, size))
        self.up = nn.Parameter(torch.empty(places, components, size, rank))

    def states(self, hidden: Tensor, *, first: int = 0, last: int | None = None) -> Tensor:
        """[C, n, r, D], or those of the places `first` to `last`."""
        base, down, up = (each[first:last] for each in (self.base, self.down, self.up))
        hidden = hidden.to(base.dtype)
        middle = nn.functional.linear(hidden, base.flatten(0, 1)).unflatten(-1, base.shape[:2])
        low = nn.functional.linear(hidden, down.flatten(0, 2)).unflatten(-1, down.shape[:3])
        return middle[:, :, None] + torch.einsum("cnrq,nrdq->cnrd", low, up)

    @torch.no_grad()
    def start(self, maps: list[Tensor], main: Unembedding, random: torch.Generator) -> None:
        """All components of a place start as this place's map [D, D]; what tells them apart starts as 0."""
        for place, matrix in enumerate(maps):
            self.base[place] = matrix
        self.down.copy_(torch.randn(self.down.shape, generator=random) * self.down.shape[-1] ** -0.5)
        self.up.zero_()
