"""Drafts as a tree: what a round offers to the main head.

A pass reads, in each row, the newest token (column 0) and the nodes of a tree behind it (columns 1..S), parents before
their children. A node is a token and the column that it comes after; a path from column 0 is one way in which the text
may go on. A chain is the tree in which column i comes after column i - 1.

Shape legend: N rows, Q = 1 + S columns of a pass, S nodes, K depths, m candidates of a depth, M columns of the heads.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mtpd.heads.base import Pick

if TYPE_CHECKING:
    from mtpd.decode.choice import Choice
    from mtpd.decode.engine import Text


@dataclass
class Drafts:
    """The tree of a round."""

    tokens: Tensor
    """[N, S]"""
    depth: int
    """How many tokens the heads drafted one after the other: no path is longer."""
    parents: Tensor | None = None
    """[N, S], the column that each node comes after; None for a chain."""
    depths: Tensor | None = None
    """[N, S], from 1 on; None for a chain."""
    sources: list[list[str]] | None = None
    """By row, where each node came from; None where all are of the heads."""
    paths: list[list[int]] = field(default_factory=list)
    """Set when tokens are chosen: by row, the columns that were accepted, in order."""

    @classmethod
    def chain(cls, tokens: Tensor) -> Drafts:
        return cls(tokens, tokens.shape[1])

    def rows(self, *beside: Tensor) -> Iterator[list[list[int]]]:
        """Of each row the tokens, the parents, and what `beside` [N, ...] has; in one transfer from the device."""
        parents = self.parents
        if parents is None:
            parents = torch.arange(self.tokens.shape[1], device=self.tokens.device).expand_as(self.tokens)
        parts = [self.tokens, parents, *beside]
        ends = list(itertools.accumulate((part.shape[1] for part in parts), initial=0))
        for row in torch.cat(parts, dim=1).tolist():
            yield [row[start:end] for start, end in itertools.pairwise(ends)]

    def seen(self) -> Tensor:
        """What each column attends to within the pass: itself and the path that leads to it. [N, Q, Q]"""
        assert self.parents is not None, "a chain is seen by causal attention"
        rows, count = self.parents.shape
        reach = torch.eye(1 + count, device=self.parents.device).repeat(rows, 1, 1)
        reach[:, 1:].scatter_(2, self.parents[..., None], 1.0)
        steps = 1
        while steps < self.depth:
            reach = (reach @ reach).clamp_max(1.0)
            steps *= 2
        return reach > 0


def grow(candidates: Sequence[tuple[Tensor, Tensor]], nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tree of the likeliest paths, for heads whose candidates do not depend on the path before.

    A path has the product of the probabilities of its tokens; a path is never likelier than its beginnings, so the
    likeliest paths are a tree. (Medusa, arXiv 2401.10774, section 2.3.3, finds one tree for all rounds by the
    accuracies that its heads have on the average; here each row of each round has its own.)

    Args:
        candidates: of each depth, the log-probabilities of its likeliest tokens, best first, and their columns,
            [N, m] each.
        nodes: how many at most.

    Returns:
        Columns of the heads, parents and depths of the nodes, [N, S] each, the likeliest first; S is smaller than
        `nodes` only where there are no more paths.
    """
    chances, columns = (torch.stack(parts, dim=1) for parts in zip(*candidates, strict=True))
    trees = [_likeliest(*row, nodes) for row in zip(chances.tolist(), columns.tolist(), strict=True)]
    of_heads, parents, depths = torch.tensor(trees, device=columns.device).unbind(1)
    return of_heads, parents, depths


def _likeliest(chances: list[list[float]], columns: list[list[int]], nodes: int) -> tuple[list[int], ...]:
    """Best first, of one row. On lists: a tree is too small for a device."""
    taken: tuple[list[int], ...] = ([], [], [])
    # What may come next, the likeliest on top: -log p, the column that it comes after, depth (from 0), rank among the
    # candidates of the depth, and -log p of the path before.
    heap = [(-chances[0][0], 0, 0, 0, 0.0)]
    while heap and len(taken[0]) < nodes:
        weight, parent, depth, rank, before = heapq.heappop(heap)
        for values, value in zip(taken, (columns[depth][rank], parent, depth + 1), strict=True):
            values.append(value)
        if rank + 1 < len(chances[depth]):
            heapq.heappush(heap, (before - chances[depth][rank + 1], parent, depth, rank + 1, before))
        if depth + 1 < len(chances):
            heapq.heappush(heap, (weight - chances[depth + 1][0], len(taken[0]), depth + 1, 0, weight))
    return taken


class Offer:
    """Listens to the heads while they draft, and makes the tree of the round.

    Args:
        choice: how drafts are chosen.
        texts: one a row.
        siblings, nodes, threshold: as `mtpd.decode.engine.Engine` has them (`nodes` is `tree` there).
    """

    def __init__(self, choice: Choice, texts: Sequence[Text], *, siblings: int, nodes: int, threshold: float) -> None:
        self.choice, self.texts = choice, texts
        self.siblings = siblings if choice.branches else 0
        self.nodes, self.threshold = nodes, threshold
        self.sure: Tensor | None = None
        self.others: list[tuple[Tensor, Tensor]] = []

    @property
    def pick(self) -> Pick:
        # What is asked of each draft's probability needs its logits.
        joint = self.choice.likeliest and not self.siblings and not self.nodes and self.threshold == 0
        return Pick(self._choose, joint=joint)

    @property
    def go_on(self) -> Callable[[Tensor, Tensor], bool] | None:
        return self._likely if self.threshold > 0 else None

    def _choose(self, logits: Tensor, number: int) -> Tensor:
        columns = self.choice.draft(logits, self.texts, number)
        if self.nodes:
            best, at = logits.float().log_softmax(-1).topk(min(self.nodes, logits.shape[-1]), dim=-1)
            self.others.append((best, at))
        if self.siblings or self.threshold > 0:
            probabilities = logits.float().softmax(-1)
            before = 1.0 if self.sure is None else self.sure
            if self.siblings:
                best, at = probabilities.topk(min(self.siblings + 1, logits.shape[-1]), dim=-1)
                self.others.append((before * best[:, 1:], at[:, 1:]))
            self.sure = before * probabilities.gather(1, columns[:, None])
        return columns

    def _likely(self, logits: Tensor, columns: Tensor) -> bool:
        assert self.sure is not None
        return bool(self.sure.mean() >= self.threshold)

    def drafts(self, chain: Tensor, ids: Callable[[Tensor], Tensor]) -> Drafts:
        """The tree around the chain [N, d] that was drafted.

        Args:
            ids: token ids of columns of the heads.
        """
        depth = chain.shape[1]
        if self.nodes:
            columns, parents, depths = grow(self.others, self.nodes)
            return Drafts(ids(columns), depth, parents, depths)
        each = self.others[0][0].shape[1] if self.siblings else 0
        if not each:
            return Drafts.chain(chain)
        # The likeliest of all depths, by the heads' own word.
        weights, columns = (torch.cat(parts, dim=1) for parts in zip(*self.others, strict=True))
        at = weights.topk(min(self.siblings, depth * each), dim=1).indices
        beside = at // each
        line = torch.arange(depth, device=chain.device).expand_as(chain)
        return Drafts(
            torch.cat([chain, ids(columns.gather(1, at))], dim=1),
            depth,
            torch.cat([line, beside], dim=1),
            1 + torch.cat([line, beside], dim=1),
        )


def of_columns(values: Tensor, drafts: Drafts) -> Tensor:
    """Values [N, 1 + d] of the places behind the newest token, for each column of the pass, [N, Q]."""
    if drafts.depths is None:
        return values
    return values.gather(1, nn.functional.pad(drafts.depths, (1, 0)))
