"""Drafting with chain heads, for texts that lie in slots.

With x_0..x_N known and the trunk run up to position N-1, head k's entry at position t is true when
x_{t+k} is known, that is t <= N-k: then head and states are what training saw. To draft x_{N+k}, head k
runs up to position N-1, and reads drafts from position N-k+1 on. What it computed there is no entry for
good: the next round begins at the first position whose entry is not yet true, and writes over it.

Shape legend: N rows, Q positions of a pass, D hidden size, M columns of the draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtpd.heads.base import Heads
from mtpd.heads.drafting import Drafter, Level, Pick, to_lists
from mtpd.packed_modules import faster, faster_logits
from mtpd.slots import Newest, SlotCache, Span
from mtpd.trunk import Trunk


class ChainDrafter(Drafter):
    """A drafter that keeps keys, values and states of the head of each depth.

    Args:
        heads: which the chain is of.
        chain: the head of each depth.
        slots: texts at most.
        capacity: positions of each.
    """

    def __init__(self, heads: Heads, chain: Sequence[nn.Module], trunk: Trunk, *, slots: int, capacity: int) -> None:
        self.trunk = trunk
        self.heads: list[Any] = [faster(head) for head in chain]
        self.rows = heads.rows()
        # Never over rows that only pad the vocabulary.
        self.unembedding = faster_logits(heads, trunk.unembedding.select(None), self.rows)
        device, dtype = trunk.device, trunk.dtype
        self.caches = [
            SlotCache(head.block.config, slots=slots, capacity=capacity, dtype=dtype, device=device)
            for head in self.heads
        ]
        # h^0..h^{K-1}, which heads 1..K read; one place more for what belongs to no position.
        self.states = [
            torch.zeros(slots, capacity + 1, trunk.hidden_size, dtype=dtype, device=device) for _ in self.heads
        ]
        # By depth and slot, how many entries are true.
        self.true = [[0] * slots for _ in self.heads]

    @property
    def depth(self) -> int:
        return len(self.heads)

    def begin(self, span: Span, hidden: Tensor, tokens: Tensor, lengths: Sequence[int]) -> None:
        self.read(span, hidden)
        state = hidden
        for index in range(self.depth):
            self.caches[index].begin(span)
            state = self._pass(index, span, state, tokens, mask=None)
            for row, length in enumerate(lengths, start=span.rows.start):
                self.true[index][row] = max(0, length - 1 - index)

    def read(self, span: Span, hidden: Tensor) -> None:
        span.write(self.states[0], hidden)

    def drafts(self, tokens: Tensor, newest: Sequence[int], depth: int, pick: Pick) -> Iterator[tuple[Tensor, Tensor]]:
        for index in range(depth):
            true = self.true[index]
            width = max(1, *(end - true[row] for row, end in enumerate(newest)))
            span = Newest.of(newest, tokens.device).span(width, -width)
            mask = self.caches[index].go_on(span)
            state = self._pass(index, span, span.read(self.states[index]), tokens, mask)
            for row, end in enumerate(newest):
                true[row] = max(0, end - index)
            logits = self.unembedding(state[:, -1])
            yield logits, pick(logits, index)

    def draft_tree(self, tokens: Tensor, newest: Sequence[int], depth: int, beam: int, level: Level) -> None:
        """Drafts a tree: at each depth the `beam` likeliest paths go on, all of them in one pass of the next head.

        Head k reads the newest token at position N-k, as it does in a chain, and behind it each node of the paths that
        go on, at the position of its depth but in a place of its own. A node sees what is known and the path to it.
        """
        device, count = tokens.device, len(newest)
        newest = Newest.of(newest, device)
        rows = torch.arange(count, device=device)[:, None]
        none = torch.zeros(count, 0, dtype=torch.long, device=device)
        # The nodes so far, [N, n]; a parent of -1 is the newest token. Which nodes each sees, [N, n, n].
        nodes, parents, depths, seen = none, none, none, torch.zeros(count, 0, 0, dtype=torch.bool, device=device)
        # Of the newest nodes, which go on: log-probabilities of their paths, and places among the candidates, [N, F].
        paths, places = torch.zeros(count, 1, device=device), torch.zeros(count, 1, dtype=torch.long, device=device)
        before: Tensor | None = None
        for index in range(depth):
            true, size = self.true[index], nodes.shape[1]
            width = max(1, *(end - index - true[row] for row, end in enumerate(newest)))
            span = newest.span(width, -index - width)
            ids = torch.cat([span.read(tokens, steps=index + 1), nodes], dim=1)
            states = span.read(self.states[index])
            if before is not None:
                # What a head reads at a node is the state of the head before it at the node's parent.
                states = torch.cat([states, before[rows, parents + 1]], dim=1)
            positions = torch.cat([span.positions, span.positions[:, -1:] + depths], dim=1)
            sees = torch.zeros(count, width + size, width + size, dtype=torch.bool, device=device)
            sees[:, :width, :width] = torch.ones(width, width, dtype=torch.bool, device=device).tril()
            sees[:, width:, :width] = True
            sees[:, width:, width:] = seen
            mask = self.caches[index].go_on(newest.span(width + size, -index - width), positions=positions, seen=sees)
            found = self.heads[index](
                self.trunk.embed(ids), states, position_ids_BT=positions, attention_mask=mask, cache=self.caches[index]
            )
            if index + 1 < self.depth:
                span.write(self.states[index + 1], found[:, :width])
            for row, end in enumerate(newest):
                true[row] = max(0, end - index)
            before = found[:, width - 1 :]
            frontier = places.shape[1]
            chances = self.unembedding(found[:, -frontier:]).float().log_softmax(-1)
            best, columns = chances.topk(min(beam, chances.shape[-1]), dim=-1)
            behind = torch.arange(frontier, device=device).repeat_interleave(best.shape[-1]).expand(count, -1)
            best, drafted = best.flatten(1), self.ids(columns).flatten(1)
            goes_on = level(*to_lists(best, drafted, places[rows, behind]))
            if not goes_on or index + 1 == depth:
                return
            paths, places = (best + paths[rows, behind]).topk(min(beam, best.shape[1]), dim=1)
            behind = behind.gather(1, places)
            origin = size - frontier + behind if size else torch.full_like(behind, -1)
            fresh = torch.eye(places.shape[1], dtype=torch.bool, device=device).expand(count, -1, -1)
            older = seen[rows, origin] if size else seen.new_zeros(count, places.shape[1], 0)
            seen = torch.cat(
                [
                    torch.cat([seen, seen.new_zeros(count, size, places.shape[1])], dim=2),
                    torch.cat([older, fresh], dim=2),
                ],
                dim=1,
            )
            nodes = torch.cat([nodes, drafted.gather(1, places)], dim=1)
            parents = torch.cat([parents, origin], dim=1)
            depths = torch.cat([depths, torch.full_like(places, index + 1)], dim=1)

    def copy_row(self, source: int, target: int, length: int) -> None:
        for cache in self.caches:
            cache.copy_row(source, target, length)
        for states in self.states:
            states[target, :length] = states[source, :length]
        for true in self.true:
            true[target] = true[source]

    def _pass(self, index: int, span: Span, state: Tensor, tokens: Tensor, mask: Any) -> Tensor:
        """Computes h^k [N, Q, D] of head k = index + 1, and keeps it for the head after it."""
        known = span.read(tokens, steps=index + 1)
        state = self.heads[index](
            self.trunk.embed(known),
            state,
            position_ids_BT=span.positions,
            attention_mask=mask,
            cache=self.caches[index],
        )
        if index + 1 < self.depth:
            span.write(self.states[index + 1], state)
        return state
