"""Drafting with chain heads, for texts that lie in slots.

With x_0..x_N known and the trunk run up to position N-1, head k's entry at position t is true when
x_{t+k} is known, that is t <= N-k: then head and states are what training saw. To draft x_{N+k}, head k
runs up to position N-1, and reads drafts from position N-k+1 on. What it computed there is no entry for
good: the next round begins at the first position whose entry is not yet true, and writes over it.

Shape legend: N rows, Q positions of a pass, D hidden size, M columns of the draft vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtpd.heads.base import Heads
from mtpd.heads.drafting import Drafter, Level, Pick, packed, to_lists
from mtpd.packed_modules import faster, faster_logits
from mtpd.slots import Bounded, Newest, SlotCache, Span, Tensors
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
        self._tree: _Tree | None = None
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
        newest = Newest.of(newest, tokens.device)
        for index in range(depth):
            true = self.true[index]
            width = newest.width(max(1, *(end - true[row] for row, end in enumerate(newest))))
            [state] = newest.run(("head", index, width), functools.partial(self._newest_state, index, width, tokens))
            for row, end in enumerate(newest):
                true[row] = max(0, end - index)
            logits = self.unembedding(state)
            yield logits, pick(logits, index)

    def _newest_state(self, index: int, width: int, tokens: Tensor, at: Newest | Bounded) -> Tensors:
        """h^k [N, D] of head k = index + 1 at position N-1."""
        span = at.span(width, -width)
        mask = self.caches[index].go_on(span)
        return (self._pass(index, span, span.read(self.states[index]), tokens, mask)[:, -1],)

    def draft_tree(self, tokens: Tensor, newest: Sequence[int], depth: int, beam: int, level: Level) -> None:
        """Drafts a tree: at each depth the `beam` likeliest paths go on, all of them in one pass of the next head.

        Head k reads the newest token at position N-k, as it does in a chain, and behind it each node of the paths that
        go on, at the position of its depth but in a place of its own. A node sees what is known and the path to it.
        """
        newest = Newest.of(newest, tokens.device)
        tree = self._tree
        if tree is None or tree.beam != beam:
            columns = self.unembedding.unembedding.weight.shape[0]
            tree = self._tree = _Tree(self.states[0], self.depth, beam, min(beam, columns))
        for index in range(depth):
            true = self.true[index]
            width = newest.width(max(1, *(end - index - true[row] for row, end in enumerate(newest))))
            name = "candidates", index, beam, width
            [found] = newest.run(name, functools.partial(self._candidates, tree, index, width, tokens))
            for row, end in enumerate(newest):
                true[row] = max(0, end - index)
            if not level(*to_lists(found)) or index + 1 == depth:
                return

    def _candidates(self, tree: _Tree, index: int, width: int, tokens: Tensor, at: Newest | Bounded) -> Tensors:
        """What head k = index + 1 drafts behind each path that goes on: log-probabilities, ids and paths, packed."""
        if index:
            tree.grow(index, len(at.on_device))
        size, device = tree.sizes[index], tokens.device
        span = at.span(width, -index - width)
        ids, states, positions = span.read(tokens, steps=index + 1), span.read(self.states[index]), span.positions
        count = len(ids)
        rows = torch.arange(count, device=device)[:, None]
        sees = torch.zeros(count, width + size, width + size, dtype=torch.bool, device=device)
        sees[:, :width, :width] = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        if size:
            ids = torch.cat([ids, tree.nodes[:count, :size]], dim=1)
            # What a head reads at a node is the state of the head before it at the node's parent.
            states = torch.cat([states, tree.states[index - 1][rows, tree.parents[:count, :size] + 1]], dim=1)
            positions = torch.cat([positions, positions[:, -1:] + tree.depths[:size]], dim=1)
            sees[:, width:, :width] = True
            sees[:, width:, width:] = tree.seen[:count, :size, :size]
        mask = self.caches[index].go_on(at.span(width + size, -index - width), positions=positions, seen=sees)
        found = self.heads[index](
            self.trunk.embed(ids), states, position_ids_BT=positions, attention_mask=mask, cache=self.caches[index]
        )
        if index + 1 < self.depth:
            span.write(self.states[index + 1], found[:, :width])
            tree.states[index][:count, : 1 + size] = found[:, width - 1 :]
        chances = self.unembedding(found[:, -tree.going[index] :]).float().log_softmax(-1)
        best, columns = chances.topk(tree.beside, dim=-1)
        best, drafted = best.flatten(1), self.ids(columns).flatten(1)
        tree.best[index][:count], tree.drafted[index][:count] = best, drafted
        return (packed(best, drafted, tree.places[index][:count].repeat_interleave(tree.beside, dim=1)),)

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


class _Tree:
    """Nodes of the trees that are drafted, by slot, in buffers that stay where they are; of one round only.

    Legend: n nodes but those of the last depth, F nodes of a depth that go on, m candidates of each.

    Args:
        states: of the trunk, by slot [S, C, D].
        depth: how deep at most.
        beam: nodes that go on from one depth to the next at most.
        beside: m.
    """

    def __init__(self, states: Tensor, depth: int, beam: int, beside: int) -> None:
        self.beam, self.beside = beam, beside
        # By depth: nodes before it that go on, and all nodes that its head reads.
        self.going, self.sizes = [1], [0]
        for _ in range(1, depth):
            self.going.append(min(beam, self.going[-1] * beside))
            self.sizes.append(self.sizes[-1] + self.going[-1])
        slots, width, device = len(states), states.shape[2], states.device
        size = self.sizes[-1]
        # A parent of -1 is the newest token. Which nodes each node sees, [S, n, n].
        self.nodes, self.parents = (torch.zeros(slots, size, dtype=torch.long, device=device) for _ in range(2))
        self.seen = torch.zeros(slots, size, size, dtype=torch.bool, device=device)
        depths = [at for at, going in enumerate(self.going[1:], start=1) for _ in range(going)]
        self.depths = torch.tensor(depths, dtype=torch.long).to(device, non_blocking=True)
        # By depth, of the nodes that go on: log-probabilities of their paths, and places among the candidates.
        self.paths = [torch.zeros(slots, going, device=device) for going in self.going]
        self.places = [torch.zeros(slots, going, dtype=torch.long, device=device) for going in self.going]
        # By depth, of the candidates: log-probabilities after their paths, and tokens.
        self.best = [torch.zeros(slots, going * beside, device=device) for going in self.going]
        self.drafted = [torch.zeros(slots, going * beside, dtype=torch.long, device=device) for going in self.going]
        # By depth: what the next head reads at the newest token and at each node.
        self.states = [states.new_zeros(slots, 1 + each, width) for each in self.sizes]

    def grow(self, index: int, count: int) -> None:
        """Adds the likeliest candidates of the depth before, in so many rows."""
        rows = torch.arange(count, device=self.nodes.device)[:, None]
        old, new = self.sizes[index - 1], self.sizes[index]
        best = self.best[index - 1][:count] + self.paths[index - 1][:count].repeat_interleave(self.beside, dim=1)
        paths, places = best.topk(self.going[index], dim=1)
        self.paths[index][:count], self.places[index][:count] = paths, places
        self.nodes[:count, old:new] = self.drafted[index - 1][:count].gather(1, places)
        # The paths before are the newest nodes, or the newest token.
        origin = old - self.going[index - 1] + places // self.beside if old else torch.full_like(places, -1)
        self.parents[:count, old:new] = origin
        if old:
            self.seen[:count, old:new, :old] = self.seen[:count, :old, :old][rows, origin]
        self.seen[:count, old:new, old:new] = torch.eye(new - old, dtype=torch.bool, device=self.nodes.device)
