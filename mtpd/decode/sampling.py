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
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import TopPLogitsWarper

from mtpd.decode.choice import agreed

if TYPE_CHECKING:
    from mtpd.decode.engine import Text

BLOCK = 128
"""Probabilities that are added up together before the block of a draw is looked for."""

GOLDEN, FIRST, SECOND = (np.uint64(number) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class Sampling:
    """Draws from the main head's distribution; drafts are the heads' most likely tokens.

    Args:
        warpers: applied to logits [R, V] in float32, in turn, before the softmax. None of them may depend on
            the text before the token.
    """

    def __init__(self, warpers: Sequence[Callable[[Tensor], Tensor]] = ()) -> None:
        self.warpers = list(warpers)

    def draft(self, logits: Tensor) -> Tensor:
        return logits.argmax(-1)

    def choose(self, logits: Tensor, texts: Sequence[Text], drafts: Tensor | None) -> list[list[int]]:
        """As `mtpd.decode.choice.Choice.choose`."""
        rows, width, _ = logits.shape
        scores = logits.flatten(0, 1).float()
        for warp in self.warpers:
            scores = warp(scores)
        probabilities = scores.softmax(-1)
        seeds = [text.request.seed for text in texts]
        draws = uniform(seeds, [len(text.tokens) for text in texts], width)
        chosen = pick(probabilities, torch.from_numpy(draws).to(logits.device).flatten())
        return agreed(chosen.view(rows, width), drafts)


def temperature_and_top_p(temperature: float, top_p: float = 1.0) -> list[Callable[[Tensor], Tensor]]:
    """Warpers as transformers has them: logits divided by the temperature, then the smallest set of mass `top_p`."""
    warpers: list[Callable[[Tensor], Tensor]] = []
    if temperature != 1.0:
        warpers.append(lambda scores: scores / temperature)
    if top_p < 1.0:
        cut: Any = TopPLogitsWarper(top_p)
        warpers.append(lambda scores: cut(None, scores))
    return warpers


def uniform(seeds: Sequence[int], places: Sequence[int], width: int) -> np.ndarray:
    """Numbers in [0, 1), [N, Q] in float64: those of places p..p+Q-1 of each text.

    SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014) of a counter: any
    place can be asked for, in any order.
    """
    counters = np.array(places, dtype=np.uint64)[:, None] + np.arange(1, width + 1, dtype=np.uint64)
    start = np.array([seed % 2**64 for seed in seeds], dtype=np.uint64)[:, None]
    with np.errstate(over="ignore"):
        return (_mix(_mix(start + GOLDEN) + counters * GOLDEN) >> np.uint64(11)) * 2.0**-53


def _mix(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * FIRST
    values = (values ^ (values >> np.uint64(27))) * SECOND
    return values ^ (values >> np.uint64(31))


def pick(weights_RV: Tensor, draws_R: Tensor) -> Tensor:
    """Inverts the distribution function: token ids [R], token x where `draws` falls into its share of the sum.

    The sum over all tokens is taken in blocks, and only the block that the draw falls into is looked at
    token by token.

    Args:
        weights_RV: not negative, of any sum; a token of weight 0 is never picked.
        draws_R: in [0, 1), float64.
    """
    missing = -weights_RV.shape[1] % BLOCK
    if missing:
        weights_RV = torch.nn.functional.pad(weights_RV, (0, missing))
    blocks = weights_RV.view(weights_RV.shape[0], -1, BLOCK)
    heights = blocks.sum(-1).double().cumsum(-1)
    target = draws_R[:, None] * heights[:, -1:]
    block = torch.searchsorted(heights, target, right=True).clamp_max(heights.shape[1] - 1)
    below = torch.where(block > 0, heights.gather(1, (block - 1).clamp_min(0)), 0.0)
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block[:, 0]].double().cumsum(-1)
    # Sums of different precision part in their last digits: never past the last token that has any weight.
    rest = torch.minimum(target - below, inside[:, -1:] * (1 - 2.0**-40))
    return (block * BLOCK + torch.searchsorted(inside, rest, right=True))[:, 0]
