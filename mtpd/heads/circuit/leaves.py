"""Leaves of circuits: a distribution over tokens for each place and component.

    full     φ_ij = softmax(W_ij h)                      W [n, r, M, D]: an unembedding each
    shared   φ_ij = softmax(W (M_i h + U_ij V_i j h))    W the trunk's own; U_ij, V_ij of low rank
    tilted   φ_ij ∝ softmax(W_i h) exp(b_ij)             W [n, M, D]: one unembedding a place; b_ij [M] per component

Full and tilted leaves are for small vocabularies. Shared ones add r small expanders to one map for each place. Both
full and shared leaves take r softmaxes a place. Tilted ones take one: what a component changes does not depend on h, so
that all r normalisers are one product,

    log φ_ij(x) = log p_i(x) + b_ij(x) - log Σ_y p_i(y) exp(b_ij(y)),      p_i = softmax(W_i h)

and cost hardly more than independent heads. Which component it is still depends on h, by the sum weights.

Shape legend: C positions, D hidden size, n places, r components, M columns in use, q rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mtpd.heads.base import exact
from mtpd.heads.circuit.circuit import softmax
from mtpd.trunk import Unembedding

TINY = 1e-37
"""Probabilities below count as this one."""
TILE_BYTES = 3 * 2**20
"""Bytes of softmaxes that full leaves compute at a time: as much as a cache holds."""


class Leaves(nn.Module):
    """Leaves of all places and components; `main` is the trunk's unembedding, which shared ones stand before."""

    def logits(self, hidden: Tensor, main: Unembedding | None, *, first: int = 0, last: int | None = None) -> Tensor:
        """Computes logits [C, n, r, M], or those of the places `first` to `last`."""
        raise NotImplementedError

    def evidence(self, hidden: Tensor, columns: Tensor, main: Unembedding | None) -> Tensor:
        """Computes log φ_ij of one column for each of the first places, [C, n, r]; 0 where the column is -1."""
        logits = exact(self.logits(hidden, main, last=columns.shape[1]))
        targets = columns[:, :, None].expand(logits.shape[:-1])
        ce = nn.functional.cross_entropy(logits.flatten(0, 2), targets.flatten(), ignore_index=-1, reduction="none")
        return -ce.view(targets.shape)

    def probabilities(
        self, hidden: Tensor, main: Unembedding | None, *, first: int = 0, last: int | None = None
    ) -> Tensor:
        """Computes φ_ij of the places `first` to `last`, [C, n, r, M]."""
        return softmax(self.logits(hidden, main, first=first, last=last))

    def hold(self) -> None:
        """Caches state-independent terms for inference; later weight changes do not invalidate it."""

    def start(self, maps: list[Tensor], main: Unembedding, random: torch.Generator) -> None:
        """Starts all components of a place as the main head behind this place's map [D, D]."""
        raise NotImplementedError


class FullLeaves(Leaves):
    """An unembedding for each place and component."""

    def __init__(self, places: int, components: int, columns: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(places, components, columns, size))

    def logits(self, hidden: Tensor, main: Unembedding | None, *, first: int = 0, last: int | None = None) -> Tensor:
        weight = self.weight[first:last]
        flat = nn.functional.linear(hidden.to(weight.dtype), weight.flatten(0, 2))
        return flat.unflatten(-1, weight.shape[:3])

    def evidence(self, hidden: Tensor, columns: Tensor, main: Unembedding | None) -> Tensor:
        weight = self.weight[: columns.shape[1]]
        dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
        return _FullEvidence.apply(hidden, weight, columns, dtype or weight.dtype)

    @torch.no_grad()
    def start(self, maps: list[Tensor], main: Unembedding, random: torch.Generator) -> None:
        for place, matrix in enumerate(maps):
            self.weight[place] = behind(matrix, main)


class _FullEvidence(torch.autograd.Function):
    """Computes softmaxes of a few leaves at a time, and keeps them in the dtype of the matmuls for their gradient.

    That is one-hot minus softmax, times what comes in. At a time, because elementwise passes over all of them, places x
    components x M numbers a position, would go at the pace of memory.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
        places, components = weight.shape[:2]
        states = hidden.to(dtype)
        at = columns.clamp_min(0).repeat_interleave(components, dim=1)[..., None]
        found = torch.empty(at.shape[:2], dtype=torch.promote_types(dtype, torch.float32), device=hidden.device)
        ctx.softmaxes = []
        with torch.autocast(hidden.device.type, enabled=False):
            for tile, leaves in _tiles(weight, states):
                logits = (states @ leaves.flatten(0, 1).T).view(len(states), *leaves.shape[:2])
                p = logits.softmax(-1, dtype=found.dtype)
                found[:, tile] = p.gather(-1, at[:, tile]).squeeze(-1)
                if any(ctx.needs_input_grad):
                    ctx.softmaxes.append(p.to(dtype))
        ctx.save_for_backward(states, weight, columns, at)
        ctx.hidden_dtype = hidden.dtype
        found = found.clamp_min_(TINY).log_().view(-1, places, components)
        return torch.where((columns >= 0)[..., None], found, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        states, weight, columns, at = ctx.saved_tensors
        with torch.autocast(states.device.type, enabled=False):
            scaled = torch.where((columns >= 0)[..., None], grad, 0.0).flatten(1)[..., None].to(states.dtype)
            to_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
            to_hidden = grad.new_zeros(states.shape) if ctx.needs_input_grad[0] else None
            for (tile, leaves), p in zip(_tiles(weight, states), ctx.softmaxes, strict=True):
                # In the place of the softmax, which is not needed again.
                slope = p.mul_(-scaled[:, tile]).scatter_add_(-1, at[:, tile], scaled[:, tile]).flatten(1)
                if to_weight is not None:
                    to_weight.flatten(0, 1)[tile] = (slope.T @ states).view(leaves.shape)
                if to_hidden is not None:
                    to_hidden += slope @ leaves.flatten(0, 1)
        return None if to_hidden is None else to_hidden.to(ctx.hidden_dtype), to_weight, None, None


def _tiles(weight: Tensor, states: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yields a few leaves at a time: which ones, and their weights [l, M, D] in the dtype of the states."""
    flat = weight.flatten(0, 1)
    size = max(1, TILE_BYTES // (4 * max(1, len(states)) * flat.shape[1]))
    for first in range(0, len(flat), size):
        tile = slice(first, min(first + size, len(flat)))
        yield tile, flat[tile].to(states.dtype)


class TiltedLeaves(Leaves):
    """One unembedding a place, and for each component how it shifts the log-probability of each token."""

    def __init__(self, places: int, components: int, columns: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(places, columns, size))
        # As if multiplied with a state: with the step of an optimizer that all parameters share, a shift then grows
        # as fast as a logit does.
        self.scale = size**0.5
        self.shift = nn.Parameter(torch.empty(places, columns, components))
        self._held: Tensor | None = None

    def logits(self, hidden: Tensor, main: Unembedding | None, *, first: int = 0, last: int | None = None) -> Tensor:
        shift = exact(self.shift[first:last]) * self.scale
        return exact(self._base(hidden, first, last))[:, :, None] + shift.transpose(1, 2)

    def evidence(self, hidden: Tensor, columns: Tensor, main: Unembedding | None) -> Tensor:
        places = columns.shape[1]
        p, shift = softmax(self._base(hidden, 0, places)), self._shifts()[:places]
        with torch.autocast(hidden.device.type, enabled=False):
            total = torch.einsum("cnm,nmr->cnr", p, shift.exp())
        known = columns.clamp_min(0)
        of_place = known + torch.arange(places, device=known.device) * shift.shape[1]
        shifted = nn.functional.embedding(of_place, shift.flatten(0, 1))
        found = p.gather(-1, known[..., None]).clamp_min(TINY).log() + shifted - total.clamp_min(TINY).log()
        return torch.where((columns >= 0)[..., None], found, 0.0)

    def probabilities(
        self, hidden: Tensor, main: Unembedding | None, *, first: int = 0, last: int | None = None
    ) -> Tensor:
        p, factors = softmax(self._base(hidden, first, last)), self._factors()[first:last]
        with torch.autocast(hidden.device.type, enabled=False):
            total = torch.einsum("cnm,nmr->cnr", p, factors).clamp_min(TINY)
        return p[:, :, None] * factors.transpose(1, 2) / total[..., None]

    def _factors(self) -> Tensor:
        """exp(b), [n, M, r]."""
        if self._held is not None and torch.is_inference_mode_enabled():
            return self._held
        return self._shifts().exp()

    @torch.no_grad()
    def hold(self) -> None:
        self._held = self._shifts().exp()

    def _shifts(self) -> Tensor:
        """b, [n, M, r]; the highest of a component is 0, so that no exponential is too large."""
        shift = exact(self.shift) * self.scale
        return shift - shift.detach().amax(1, keepdim=True)

    def _base(self, hidden: Tensor, first: int, last: int | None) -> Tensor:
        weight = self.weight[first:last]
        flat = nn.functional.linear(hidden.to(weight.dtype), weight.flatten(0, 1))
        return flat.unflatten(-1, weight.shape[:2])

    @torch.no_grad()
    def start(self, maps: list[Tensor], main: Unembedding, random: torch.Generator) -> None:
        for place, matrix in enumerate(maps):
            self.weight[place] = behind(matrix, main)
        self.shift.zero_()


class SharedLeaves(Leaves):
    """Expanders before the trunk's unembedding."""

    def __init__(self, places: int, components: int, size: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.empty(places, size, size))
        self.down = nn.Parameter(torch.empty(places, components, rank, size))
        self.up = nn.Parameter(torch.empty(places, components, size, rank))

    def logits(self, hidden: Tensor, main: Unembedding | None, *, first: int = 0, last: int | None = None) -> Tensor:
        assert main is not None, "shared leaves stand before the trunk's unembedding"
        base, down, up = (each[first:last] for each in (self.base, self.down, self.up))
        hidden = hidden.to(base.dtype)
        middle = nn.functional.linear(hidden, base.flatten(0, 1)).unflatten(-1, base.shape[:2])
        low = nn.functional.linear(hidden, down.flatten(0, 2)).unflatten(-1, down.shape[:3])
        return main(middle[:, :, None] + torch.einsum("cnrq,nrdq->cnrd", low, up))

    @torch.no_grad()
    def start(self, maps: list[Tensor], main: Unembedding, random: torch.Generator) -> None:
        """Starts all components of a place as this place's map, and what tells them apart as 0."""
        for place, matrix in enumerate(maps):
            self.base[place] = matrix
        self.down.copy_(torch.randn(self.down.shape, generator=random) * self.down.shape[-1] ** -0.5)
        self.up.zero_()


def behind(matrix: Tensor, main: Unembedding) -> Tensor:
    """Multiplies an unembedding's weight [M, D], its scale included, with a map [D, D] in front of it."""
    weight = main.weight.float() * main.scale
    return weight @ matrix.to(weight)
