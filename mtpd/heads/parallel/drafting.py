"""Drafting with heads that all read h_t: blockwise self-speculation (Stern et al., arXiv 1811.03115).

With x_0..x_N known and the trunk run up to position N-1, head k drafts x_{N+k} from h_{N-1}. Heads with a decoder
layer keep keys and values of the positions before; all of them are true, since no head reads a draft.

Shape legend: N rows, Q positions of a pass, D hidden size, K depths, M columns of the draft vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mtpd.heads.base import Heads
from mtpd.heads.drafting import NewestStates, Pick
from mtpd.packed_modules import faster, faster_logits
from mtpd.slots import Bounded, Newest, SlotCache, Span, Tensors
from mtpd.trunk import Trunk


class _Drafts(NewestStates):
    def __init__(self, heads: Heads, trunk: Trunk, *, slots: int, capacity: int) -> None:
        super().__init__(trunk, slots=slots, capacity=capacity)
        self.heads: list[Any] = list(heads.layers)
        self.rows = heads.rows()
        # Never over rows that only pad the vocabulary.
        self.unembedding = faster_logits(heads, trunk.unembedding.select(None), self.rows)

    @property
    def depth(self) -> int:
        return len(self.heads)


class StateDrafter(_Drafts):
    """Drafts with heads that read one position: all depths in one matmul."""

    def drafts(self, tokens: Tensor, newest: Sequence[int], depth: int, pick: Pick) -> Iterator[tuple[Tensor, Tensor]]:
        def states(at: Newest | Bounded) -> Tensors:
            hidden = self.newest_states(at)
            return (torch.stack([head(hidden) for head in self.heads[:depth]], dim=1),)

        [found] = Newest.of(newest, tokens.device).run(("heads", depth), states)
        logits = self.unembedding(found)
        for index in range(depth):
            yield logits[:, index], pick(logits[:, index], index)


class BlockDrafter(_Drafts):
    """Drafts with heads that have a decoder layer each, with keys and values of its own."""

    def __init__(self, heads: Heads, trunk: Trunk, *, slots: int, capacity: int) -> None:
        super().__init__(heads, trunk, slots=slots, capacity=capacity)
        self.heads = [faster(head) for head in heads.layers]
        self.caches = [
            SlotCache(head.block.config, slots=slots, capacity=capacity, dtype=trunk.dtype, device=trunk.device)
            for head in self.heads
        ]
        # By depth and slot, how many positions are in the cache.
        self.held = [[0] * slots for _ in self.heads]

    def begin(self, span: Span, hidden: Tensor, tokens: Tensor, lengths: Sequence[int]) -> None:
        super().begin(span, hidden, tokens, lengths)
        for head, cache, held in zip(self.heads, self.caches, self.held, strict=True):
            cache.begin(span)
            head(hidden, position_ids_BT=span.positions, cache=cache)
            for row, length in enumerate(lengths, start=span.rows.start):
                held[row] = length - 1

    def copy_row(self, source: int, target: int, length: int) -> None:
        super().copy_row(source, target, length)
        for cache, held in zip(self.caches, self.held, strict=True):
            cache.copy_row(source, target, length)
            held[target] = held[source]

    def drafts(self, tokens: Tensor, newest: Sequence[int], depth: int, pick: Pick) -> Iterator[tuple[Tensor, Tensor]]:
        newest = Newest.of(newest, tokens.device)
        for index in range(depth):
            held = self.held[index]
            width = newest.width(max(1, *(end - held[row] for row, end in enumerate(newest))))
            [state] = newest.run(("head", index, width), functools.partial(self._newest_state, index, width))
            for row, end in enumerate(newest):
                held[row] = end
            logits = self.unembedding(state)
            yield logits, pick(logits, index)

    def _newest_state(self, index: int, width: int, at: Newest | Bounded) -> Tensors:
        """h^k [N, D] of head k = index + 1 at the newest position that it reads."""
        span = at.span(width, -width)
        mask = self.caches[index].go_on(span)
        state = self.heads[index](
            span.read(self.states), position_ids_BT=span.positions, attention_mask=mask, cache=self.caches[index]
        )
        return (state[:, -1],)
