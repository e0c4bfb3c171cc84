"""Building the tree of a round while the heads draft.

Shape legend: N rows, S nodes, d drafts, K depths, m candidates of a depth, M columns of the heads.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mtpd.decode.choice import Choice
from mtpd.decode.drafting import Drafting
from mtpd.decode.drafts import Drafts
from mtpd.decode.text import Text
from mtpd.heads.drafting import Pick


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


class TreeBuilder:
    """Collects candidates while the heads draft, and makes the tree of the round.

    Args:
        choice: how drafts are chosen.
        texts: one a row.
        drafting: how far to draft.
    """

    def __init__(self, choice: Choice, texts: Sequence[Text], drafting: Drafting) -> None:
        self.choice, self.texts = choice, texts
        self.siblings = drafting.siblings if choice.branches else 0
        self.nodes, self.threshold = drafting.tree, drafting.threshold
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
