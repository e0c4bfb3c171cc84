"""Drafts as a tree: what a round offers to the main head.

A pass reads, in each row, the newest token (column 0) and the nodes of a tree behind it (columns 1..S), parents before
their children. A node is a token and the column that it comes after; a path from column 0 is one way in which the text
may go on. A chain is the tree in which column i comes after column i - 1.

Shape legend: N rows, Q = 1 + S columns of a pass, S nodes, K depths.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mtpd.decode.drafting import Source


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
    sources: list[list[Source]] | None = None
    """By row, where each node came from; None where all are of the heads."""
    paths: list[list[int]] = field(default_factory=list)
    """Set when tokens are chosen: by row, the columns that were accepted, in order."""

    @classmethod
    def chain(cls, tokens: Tensor) -> Drafts:
        return cls(tokens, tokens.shape[1])

    @classmethod
    def of(cls, layout: Tensor) -> Drafts:
        """A tree as `layout` gives it, of which the device alone knows the shape: no deeper than it has nodes."""
        tokens, parents, depths = layout.unbind(1)
        count = tokens.shape[1]
        # Rows without a text have what a wider tree has left.
        return cls(tokens, count, parents.clamp_max(count), depths)

    def layout(self) -> Tensor:
        """Tokens, parents and depths of a tree in one tensor [N, 3, S]."""
        assert self.parents is not None
        assert self.depths is not None
        return torch.stack([self.tokens, self.parents, self.depths], dim=1)

    def rows(self, *beside: Tensor) -> Iterator[list[list[int]]]:
        """Yields tokens, parents and the part of `beside` [N, ...] of each row, in one transfer from the device."""
        parents = self.parents
        if parents is None:
            parents = torch.arange(self.tokens.shape[1], device=self.tokens.device).expand_as(self.tokens)
        parts = [self.tokens, parents, *beside]
        ends = list(itertools.accumulate((part.shape[1] for part in parts), initial=0))
        for row in torch.cat(parts, dim=1).tolist():
            yield [row[start:end] for start, end in itertools.pairwise(ends)]

    def seen(self) -> Tensor:
        """Marks what each column attends to within the pass: itself and the path that leads to it. [N, Q, Q]"""
        assert self.parents is not None, "a chain is seen by causal attention"
        rows, count = self.parents.shape
        reach = torch.eye(1 + count, device=self.parents.device).repeat(rows, 1, 1)
        reach[:, 1:].scatter_(2, self.parents[..., None], 1.0)
        steps = 1
        while steps < self.depth:
            reach = (reach @ reach).clamp_max(1.0)
            steps *= 2
        return reach > 0


def of_columns(values: Tensor, drafts: Drafts) -> Tensor:
    """Values [N, 1 + d] of the places behind the newest token, for each column of the pass, [N, Q]."""
    if drafts.depths is None:
        return values
    return values.gather(1, nn.functional.pad(drafts.depths, (1, 0)))
