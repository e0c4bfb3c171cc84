"""Drafting with heads that all read h_t: blockwise self-speculation (Stern et al., arXiv 1811.03115).

With x_0..x_N known and the trunk run up to position N-1, head k drafts x_{N+k} from h_{N-1}. Heads with a decoder
layer keep keys and values of the positions before; all of them are true, since no head reads a draft.

Shape legend: N rows, Q positions of a pass, D hidden size, K depths, M columns of the draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mtpd.heads.base import Pick
from mtpd.packed_modules import faster, faster_logits
from mtpd.slots import SlotCache, Span
from mtpd.trunk import Trunk

if TYPE_CHECKING:
    from mtpd.heads.parallel.heads import ParallelHeads


class NewestStates:
    """The trunk's states by slot, and the newest of them.

    Args:
        slots: texts at most.
        capacity: positions of each.
    """

    def __init__(self, trunk: Trunk, *, slots: int, capacity: int) -> None:
        # One place more for what belongs to no position.
        self.states = torch.zeros(slots, capacity + 1, trunk.hidden_size, dtype=trunk.dtype, device=trunk.device)

    def begin(self, span: Span, hidden: Tensor, tokens: Tensor, lengths: Sequence[int]) -> None:
        """As `mtpd.heads.base.Drafter`, like the others."""
        self.read(span, hidden)

    def read(self, span: Span, hidden: Tensor) -> None:
        span.write(self.states, hidden)

    def copy_row(self, source: int, target: int, length: int) -> None:
        self.states[target, :length] = self.states[source, :length]

    def behind(self, newest: Sequence[int]) -> Tensor:
        """h_{N-1} [N, D], for the position N of the newest token of each row."""
        span = Span([end - 1 for end in newest], 1, self.states.device)
        return span.read(self.states)[:, 0]


def write_drafts(
    tokens: Tensor,
    newest: Sequence[int],
    depth: int,
    choose: Callable[[int], tuple[Tensor, Tensor, Tensor]],
    go_on: Callable[[Tensor, Tensor], bool] | None,
) -> int:
    """Puts the drafts of each depth behind the newest tokens.

    Args:
        choose: gives logits, columns and token ids of a depth (0-based).
    """
    rows = torch.arange(len(newest), device=tokens.device)
    ends = torch.tensor(newest, device=tokens.device)
    for index in range(depth):
        logits, columns, ids = choose(index)
        tokens[rows, ends + (index + 1)] = ids
        if go_on is not None and index + 1 < depth and not go_on(logits, columns):
            return index + 1
    return depth


class _Drafts(NewestStates):
    def __init__(self, heads: ParallelHeads, trunk: Trunk, *, slots: int, capacity: int) -> None:
        super().__init__(trunk, slots=slots, capacity=capacity)
        self.depth = heads.depth
        self.rows = heads.rows()
        # Never over rows that only pad the vocabulary.
        self.unembedding = faster_logits(heads, trunk.unembedding.select(None), self.rows)

    def ids(self, columns: Tensor) -> Tensor:
        return columns if self.rows is None else self.rows[columns]


class StateDrafter(_Drafts):
    """Of heads that read one position: all depths in one product."""

    def __init__(self, heads: ParallelHeads, trunk: Trunk, *, slots: int, capacity: int) -> None:
        super().__init__(heads, trunk, slots=slots, capacity=capacity)
        self.heads: list[Any] = list(heads.layers)

    def draft(
        self,
        tokens: Tensor,
        newest: Sequence[int],
        depth: int,
        pick: Pick,
        go_on: Callable[[Tensor, Tensor], bool] | None = None,
    ) -> int:
        hidden = self.behind(newest)
        logits = self.unembedding(torch.stack([head(hidden) for head in self.heads[:depth]], dim=1))

        def choose(index: int) -> tuple[Tensor, Tensor, Tensor]:
            columns = pick(logits[:, index], index)
            return logits[:, index], columns, self.ids(columns)

        return write_drafts(tokens, newest, depth, choose, go_on)


class BlockDrafter(_Drafts):
    """Of heads with a decoder layer, each with keys and values of its own."""

    def __init__(self, heads: ParallelHeads, trunk: Trunk, *, slots: int, capacity: int) -> None:
        super().__init__(heads, trunk, slots=slots, capacity=capacity)
        self.heads: list[Any] = [faster(head) for head in heads.layers]
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

    def draft(
        self,
        tokens: Tensor,
        newest: Sequence[int],
        depth: int,
        pick: Pick,
        go_on: Callable[[Tensor, Tensor], bool] | None = None,
    ) -> int:
        def choose(index: int) -> tuple[Tensor, Tensor, Tensor]:
            held = self.held[index]
            width = max(1, *(end - held[row] for row, end in enumerate(newest)))
            span = Span([end - width for end in newest], width, tokens.device)
            mask = self.caches[index].go_on(span)
            state = self.heads[index](
                span.read(self.states), position_ids_BT=span.positions, attention_mask=mask, cache=self.caches[index]
            )
            for row, end in enumerate(newest):
                held[row] = end
            logits = self.unembedding(state[:, -1])
            columns = pick(logits, index)
            return logits, columns, self.ids(columns)

        return write_drafts(tokens, newest, depth, choose, go_on)
