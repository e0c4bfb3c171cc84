"""Greedy decoding of one prompt: the text of plain decoding, several tokens per forward pass."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from mtpd.decode.counts import Counts
from mtpd.decode.engine import Engine
from mtpd.decode.planner import Planner
from mtpd.decode.text import Request
from mtpd.heads import Heads
from mtpd.trunk import Trunk


def generate(
    trunk: Trunk,
    heads: Heads | None,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    end_tokens: Collection[int] = (),
    depth: int | None = None,
    planner: Planner | None = None,
) -> tuple[list[int], Counts]:
    """Decodes greedily after one prompt.

    Args:
        heads: None decodes without drafts.
        prompt: token ids [n], n >= 1.
        max_new_tokens: how many tokens at most, at least 1.
        end_tokens: ids that end the text; the one that does is part of the output, as in transformers.
        depth: of the chain that is drafted in every round; None is all heads.
        planner: chooses drafts in the place of `depth`.

    Returns:
        The new tokens, equal to plain greedy decoding of the same model, and the counts.
    """
    capacity = len(prompt) + max_new_tokens
    engine = Engine(
        trunk,
        heads,
        slots=1,
        capacity=capacity,
        depth=depth,
        planner=planner,
        end_tokens=end_tokens,
    )
    [text] = engine.run([Request(prompt.tolist(), max_new_tokens)])
    return text.tokens, text.counts(0 if planner is not None else engine.depth)
