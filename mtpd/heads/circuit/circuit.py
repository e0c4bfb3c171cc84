"""Probabilistic circuits over a window of n tokens, with latent variables of r values (MTPC, arXiv 2511.11346).

A leaf gives, for each place i and component j, a distribution over tokens; sum weights tie the components together:

    ff      Π_i φ_i(x_i)                                                   cp with r = 1
    cp      Σ_j w_j Π_i φ_ij(x_i)
    hmm     Σ_z w_{z_1} φ_{1 z_1}(x_1) Π_{i>1} T_i[z_{i-1}, z_i] φ_{i z_i}(x_i)
    btree   a region of places is halved until one is left; its r outputs are
                u_o = Σ_j W[o, j] · left_j · right_j        at the root Σ_j w_j · left_j · right_j

Leaves and weights are normalised, so every circuit sums to 1, and a place is summed out by setting its leaf to
log 1 = 0. Everything here takes the *evidence*: log φ_ij at the tokens that are known, and 0 at the others.

Given the tokens before it, a token is always a mixture of the r distributions of its leaf. `prefix` gives the weights
of that mixture for all places at once: of cp by a cumulative sum; of hmm by its forward filter; of btree by a pass
up, in which each region meets its evidence, and a pass down, in which a region learns from what stands left of it.

In a sum, y = log Σ_j W_j exp(x_j - max x) + max x, with W as probabilities (as cirkit has it): a matrix product.

Shape legend: N windows, n places, r components, Z sum weights of a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

TINY = 1e-30
NEAR_ONE = 0.95
"""Weight of a component on itself at the start, where components are tied by matrices."""


class Circuit(Protocol):
    """The dependence of the places of a window on each other."""

    places: int
    components: int
    sums: int
    """Z."""

    def start(self) -> Tensor:
        """Gives what is added to sum weights before the softmax at the start, [Z]: all circuits start near to cp."""

    def prefix(self, evidence: Tensor, weights: Tensor) -> Tensor:
        """Computes log p(component of place i | tokens of the places before i). [N, n, r], normalised over r

        Args:
            evidence: [N, n, r].
            weights: before the softmax, [N, Z], in any dtype.
        """

    def follow(self, weights: Tensor) -> Generator[Tensor, Tensor, Any]:
        """Computes `prefix` place by place: yields [N, r], and is sent the evidence [N, r] of the token there."""


def new_circuit(structure: str, places: int, components: int) -> Circuit:
    """Makes a circuit of structure ff, cp, hmm or btree."""
    kinds: dict[str, Callable[[int, int], Circuit]] = {
        "ff": Mixture,
        "cp": Mixture,
        "hmm": HiddenMarkov,
        "btree": BinaryTree,
    }
    return kinds[structure](places, components)


class Mixture:
    """cp; with one component ff, which has no sum weights."""

    def __init__(self, places: int, components: int) -> None:
        self.places, self.components = places, components
        self.sums = components if components > 1 else 0

    def start(self) -> Tensor:
        return torch.zeros(self.sums)

    def _first(self, weights: Tensor) -> Tensor:
        return log_softmax(weights) if self.sums else weights.new_zeros(len(weights), 1)

    def prefix(self, evidence: Tensor, weights: Tensor) -> Tensor:
        before = evidence.cumsum(1) - evidence
        return (self._first(weights)[:, None] + before).log_softmax(-1)

    def follow(self, weights: Tensor) -> Generator[Tensor, Tensor, Any]:
        state = self._first(weights)
        for _ in range(self.places):
            evidence = yield state
            state = (state + evidence).log_softmax(-1)


class HiddenMarkov:
    """hmm, with transitions of each step."""

    def __init__(self, places: int, components: int) -> None:
        self.places, self.components = places, components
        self.sums = components + (places - 1) * components**2

    def start(self) -> Tensor:
        first = torch.zeros(self.components)
        return torch.cat([first, *[_near_identity(self.components)] * (self.places - 1)])

    def _split(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Splits weights: of the first place [N, r], and of each step [N, n - 1, r, r], from and to."""
        r = self.components
        return weights[:, :r], weights[:, r:].unflatten(1, (self.places - 1, r, r))

    def prefix(self, evidence: Tensor, weights: Tensor) -> Tensor:
        # Step by step: as an associative scan, the products of r x r matrices would cost r times as much.
        states = self.follow(weights)
        found = [next(states)]
        found += [states.send(each) for each in evidence[:, :-1].unbind(1)]
        return torch.stack(found, dim=1)

    def follow(self, weights: Tensor) -> Generator[Tensor, Tensor, Any]:
        first, steps = self._split(weights)
        state = log_softmax(first)
        # Unbound: the gradient of a slice would be as large as all steps.
        for transition in softmax(steps).unbind(1):
            evidence = yield state
            state = _forward((state + evidence).log_softmax(-1), transition)
        yield state


class BinaryTree:
    """btree: regions of 2, 4, 8, ... places, all of a size at once.

    Where the places are no power of two, the regions are those of the next one, and lack what lies behind the last.
    """

    def __init__(self, places: int, components: int) -> None:
        self.places, self.components = places, components
        # Regions of each size, the smallest first; the last one is the root.
        self.regions = [math.ceil(places / 2)]
        while self.regions[-1] > 1:
            self.regions.append(math.ceil(self.regions[-1] / 2))
        self.sums = components + sum(self.regions[:-1]) * components**2

    def start(self) -> Tensor:
        first = torch.zeros(self.components)
        return torch.cat([first, *[_near_identity(self.components)] * sum(self.regions[:-1])])

    def _split(self, weights: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Splits weights: of the root [N, r], and of regions of each smaller size [N, m, r, r], by output."""
        r = self.components
        inner = weights[:, r:].unflatten(1, (-1, r, r)) if len(self.regions) > 1 else weights.new_zeros(0)
        return weights[:, :r], list(inner.split(self.regions[:-1], dim=1)) if len(self.regions) > 1 else []

    def prefix(self, evidence: Tensor, weights: Tensor) -> Tensor:
        first, inner = self._split(weights)
        tied = [softmax(each) for each in inner]
        # Up: what each region makes of its tokens.
        units = evidence
        lefts = []
        for size in range(len(self.regions)):
            pairs = _pairs(units)
            lefts.append(pairs[:, :, 0])
            if size < len(tied):
                units = _backward(pairs.sum(2), tied[size])
        # Down: which component, after the tokens left of the region.
        down = log_softmax(first)[:, None]
        for size in range(len(self.regions) - 1, -1, -1):
            right = (down + lefts[size]).log_softmax(-1)
            width = self.regions[size - 1] if size else self.places
            down = torch.stack([down, right], dim=2).flatten(1, 2)[:, :width]
            if size:
                down = _forward(down, tied[size - 1])
        return down

    def follow(self, weights: Tensor) -> Generator[Tensor, Tensor, Any]:
        first, inner = self._split(weights)
        tied = [softmax(each) for each in inner]
        yield from self._region(len(self.regions) - 1, 0, log_softmax(first), tied)

    def _region(
        self, size: int, number: int, down: Tensor, tied: Sequence[Tensor]
    ) -> Generator[Tensor, Tensor, Tensor]:
        """Yields the places of a region from left to right; returns what it makes of their tokens.

        Args:
            size: the index of its size in `regions`; -1 is a single place.
            down: log p(its output | tokens left of it) [N, r]; of the root, and of a place, of its component.
        """
        if size < 0:
            evidence = yield down
            return evidence
        tie = tied[size][:, number] if size < len(tied) else None
        down = down if tie is None else _forward(down, tie)
        units = yield from self._region(size - 1, 2 * number, down, tied)
        if 2 * number + 1 < (self.regions[size - 1] if size else self.places):
            right = (down + units).log_softmax(-1)
            units = units + (yield from self._region(size - 1, 2 * number + 1, right, tied))
        return units if tie is None else _backward(units, tie)


def softmax(values: Tensor) -> Tensor:
    """Normalises the last dimension, in float32 or better."""
    return values.softmax(-1, dtype=torch.promote_types(values.dtype, torch.float32))


def log_softmax(values: Tensor) -> Tensor:
    """Normalises the last dimension, in float32 or better."""
    return values.log_softmax(-1, dtype=torch.promote_types(values.dtype, torch.float32))


def _near_identity(components: int) -> Tensor:
    """Gives what makes a softmax over the columns of an r x r matrix `NEAR_ONE` on the diagonal, flat [r * r]."""
    if components == 1:
        return torch.zeros(1)
    rest = (1.0 - NEAR_ONE) / (components - 1)
    return (torch.eye(components) * math.log(NEAR_ONE / rest)).flatten()


def _forward(log_p: Tensor, weight: Tensor) -> Tensor:
    """Computes log Σ_i p_i W[i, :] for log p [..., r] and probabilities W [..., r, r], both normalised."""
    return (log_p.exp()[..., None, :] @ weight).squeeze(-2).clamp_min(TINY).log()


def _backward(scores: Tensor, weight: Tensor) -> Tensor:
    """Computes log Σ_j W[:, j] exp(score_j) for scores [..., r] of any size."""
    top = scores.detach().amax(-1, keepdim=True)
    return (weight @ (scores - top).exp()[..., None]).squeeze(-1).clamp_min(TINY).log() + top


def _pairs(units: Tensor) -> Tensor:
    """Pairs the left and right halves of regions, [N, m, 2, r]; a half without places is log 1 = 0."""
    if units.shape[1] % 2:
        units = torch.nn.functional.pad(units, (0, 0, 0, 1))
    return units.unflatten(1, (-1, 2))
