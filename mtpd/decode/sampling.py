"""Random choices from the main head's distribution.

The numbers are a function of the text's seed and the place of the token in it. Greedy drafts put all of
their probability on one token; rejection sampling (Leviathan et al., arXiv 2211.17192) then accepts a
draft x with probability p(x) and draws from p without x otherwise. Drawing from p and accepting the
draft if it is what was drawn does the same, and needs no draft to say what comes out: a text sampled with
heads is the one that the same seed gives without them.

Shape legend: N rows, Q positions of a pass, R = N * Q, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TopPLogitsWarper

from mtpd.decode.choice import agreed
from mtpd.decode.drafts import Drafts, of_columns
from mtpd.decode.text import Text

BLOCK = 128
"""Probabilities that are added up together before the block of a draw is looked for."""

GOLDEN, FIRST, SECOND = (np.uint64(number) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


Warper = Callable[[Tensor], Tensor]
"""Changes logits [R, V] in float32, whatever the text before the token."""


class Sampling:
    """Draws from the main head's distribution; drafts are the heads' most likely tokens.

    Args:
        warpers: applied to the logits in turn, before the softmax.
    """

    branches = True

    def __init__(self, warpers: Sequence[Warper] = ()) -> None:
        self.warpers = list(warpers)

    def draft(self, logits: Tensor, texts: Sequence[Text], number: int) -> Tensor:
        """As `mtpd.decode.choice.Choice.draft`."""
        return logits.argmax(-1)

    def choose(self, logits: Tensor, texts: Sequence[Text], drafts: Drafts | None) -> list[list[int]]:
        """As `mtpd.decode.choice.Choice.choose`."""
        rows, width, _ = logits.shape
        probabilities = self.distribution(logits.flatten(0, 1))
        draws = uniform_draws(texts, width if drafts is None else 1 + drafts.depth, device=logits.device)
        if drafts is not None:
            # Alternatives for one place share its number.
            draws = of_columns(draws, drafts)
        return agreed(inverse_cdf(probabilities, draws.flatten()).view(rows, width), drafts)

    def distribution(self, logits: Tensor) -> Tensor:
        """Probabilities [R, V] that tokens are drawn with."""
        scores = logits.float()
        for warp in self.warpers:
            scores = warp(scores)
        return scores.softmax(-1)


class SampledDrafts(Sampling):
    """Draws drafts from the heads' distributions q, and accepts them so that the text has the main head's, p.

    A draft x is accepted with probability min(1, p(x) / q(x)); the first that is not gives way to a draw
    from max(0, p - q), scaled to sum 1 (Leviathan et al., arXiv 2211.17192, theorem 3.5; Chen et al.,
    arXiv 2302.01318).

    Args:
        rows: token ids of the heads' columns, or None where they are the tokens.
    """

    branches = False

    def __init__(self, warpers: Sequence[Warper] = (), *, rows: Tensor | None = None) -> None:
        super().__init__(warpers)
        self.rows = rows
        self.drafted: list[Tensor] = []

    def draft(self, logits: Tensor, texts: Sequence[Text], number: int) -> Tensor:
        if number == 0:
            self.drafted = []
        self.drafted.append(self.distribution(logits))
        return inverse_cdf(
            self.drafted[-1], uniform_draws(texts, 1, device=logits.device, first=number, stream=1)[:, 0]
        )

    def choose(self, logits: Tensor, texts: Sequence[Text], drafts: Drafts | None) -> list[list[int]]:
        if drafts is None:
            return super().choose(logits, texts, None)
        rows, width, size = logits.shape
        device = logits.device
        p = self.distribution(logits.flatten(0, 1)).view(rows, width, size)
        q = self._over_all_tokens(torch.stack(self.drafted, dim=1), size)
        assert drafts.parents is None, "drafts that are drawn stand in a chain"
        at = drafts.tokens[..., None]
        draws = uniform_draws(texts, width, device=device, stream=2)
        kept = draws[:, :-1] * q.gather(2, at)[..., 0] < p[:, :-1].gather(2, at)[..., 0]
        accepted = kept.long().cumprod(1).sum(1)
        row = torch.arange(rows, device=device)
        # After the last draft there is nothing to take away.
        q = torch.cat([q, torch.zeros_like(q[:, :1])], dim=1)
        left = (p[row, accepted] - q[row, accepted]).clamp_min(0)
        # Nothing is left where p and q are equal but for rounding: then p is as good.
        left = torch.where(left.sum(-1, keepdim=True) > 0, left, p[row, accepted])
        token = inverse_cdf(left, uniform_draws(texts, width, device=device, stream=3)[row, accepted])
        packed: list[list[int]] = torch.cat([accepted[:, None], token[:, None], drafts.tokens], dim=1).tolist()
        drafts.paths = [list(range(1, 1 + of[0])) for of in packed]
        return [[*of[2 : 2 + of[0]], of[1]] for of in packed]

    def _over_all_tokens(self, q: Tensor, size: int) -> Tensor:
        if self.rows is None:
            return nn.functional.pad(q, (0, size - q.shape[-1]))
        return q.new_zeros(*q.shape[:2], size).index_copy_(2, self.rows.to(q.device), q)


def uniform_draws(
    texts: Sequence[Text], width: int, *, device: torch.device, first: int = 0, stream: int = 0
) -> Tensor:
    """The random numbers [N, Q] of the next `width` places of each text, from the `first` of them on."""
    seeds = [text.request.seed for text in texts]
    places = [len(text.tokens) + first for text in texts]
    return torch.from_numpy(uniform(seeds, places, width, stream=stream)).to(device, non_blocking=True)


def temperature_and_top_p(temperature: float, top_p: float = 1.0) -> list[Warper]:
    """Warpers as transformers has them: logits divided by the temperature, then the smallest set of mass `top_p`."""
    warpers: list[Warper] = []
    if temperature != 1.0:
        warpers.append(lambda scores: scores / temperature)
    if top_p < 1.0:
        cut: Any = TopPLogitsWarper(top_p)
        warpers.append(lambda scores: cut(None, scores))
    return warpers


def uniform(seeds: Sequence[int], places: Sequence[int], width: int, *, stream: int = 0) -> np.ndarray:
    """Numbers in [0, 1), [N, Q] in float64: those of places p..p+Q-1 of each text. Each stream has numbers of its own.

    SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014) of a counter: any
    place can be asked for, in any order.
    """
    counters = np.array(places, dtype=np.uint64)[:, None] + np.arange(1, width + 1, dtype=np.uint64)
    start = np.array([seed % 2**64 for seed in seeds], dtype=np.uint64)[:, None]
    with np.errstate(over="ignore"):
        return (_mix(_mix(_mix(start + GOLDEN) + np.uint64(stream)) + counters * GOLDEN) >> np.uint64(11)) * 2.0**-53


def _mix(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * FIRST
    values = (values ^ (values >> np.uint64(27))) * SECOND
    return values ^ (values >> np.uint64(31))


def inverse_cdf(weights_RV: Tensor, draws_R: Tensor) -> Tensor:
    """Inverts the distribution function: token ids [R], token x where `draws` falls into its share of the sum.

    The sum over all tokens is taken in blocks, and only the block that the draw falls into is looked at
    token by token.

    Args:
        weights_RV: not negative, of any sum; a token of weight 0 is never picked.
        draws_R: in [0, 1), float64.
    """
    missing = -weights_RV.shape[1] % BLOCK
    if missing:
        weights_RV = nn.functional.pad(weights_RV, (0, missing))
    blocks = weights_RV.view(weights_RV.shape[0], -1, BLOCK)
    heights = blocks.sum(-1).double().cumsum(-1)
    target = draws_R[:, None] * heights[:, -1:]
    block = torch.searchsorted(heights, target, right=True).clamp_max(heights.shape[1] - 1)
    below = torch.where(block > 0, heights.gather(1, (block - 1).clamp_min(0)), 0.0)
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block[:, 0]].double().cumsum(-1)
    # Sums of different precision part in their last digits: never past the last token that has any weight.
    rest = torch.minimum(target - below, inside[:, -1:] * (1 - 2.0**-40))
    return (block * BLOCK + torch.searchsorted(inside, rest, right=True))[:, 0]
