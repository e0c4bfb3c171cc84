"""The tree of one text's round: drafts of all sources, equal beginnings merged, and the ones worth verifying.

Each node has a chance: how probable it is that it is accepted. A pass over more nodes takes longer. The nodes that are
taken are those that make expected tokens per time the greatest: a node is never likelier than the one before it, so
these are the likeliest ones, and the question is only how many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from mtpd.decode.drafting import Source


@dataclass
class Candidates:
    """Nodes that one text might draft; node 0 is its newest token, and parents come before their children."""

    tokens: list[int] = field(default_factory=lambda: [-1])
    parents: list[int] = field(default_factory=lambda: [-1])
    depths: list[int] = field(default_factory=lambda: [0])
    chances: list[float] = field(default_factory=lambda: [1.0])
    sources: list[Source] = field(default_factory=lambda: ["heads"])
    """Of each node the source that gave it the greater chance; what stands at node 0 says nothing."""
    _children: dict[tuple[int, int], int] = field(default_factory=dict)
    _best: list[float] = field(default_factory=lambda: [1.0])

    def add(self, parent: int, token: int, chance: float, source: Source) -> int:
        """Adds a node, or merges it with the one that is there. Two sources that agree are likelier to be right.

        Args:
            chance: that the whole path to this node is accepted, by this source alone.

        Returns:
            The node.
        """
        chance = min(chance, self.chances[parent])
        node = self._children.get((parent, token))
        if node is None:
            node = len(self.tokens)
            self._children[parent, token] = node
            self.tokens.append(token)
            self.parents.append(parent)
            self.depths.append(self.depths[parent] + 1)
            self.chances.append(chance)
            self.sources.append(source)
            self._best.append(chance)
            return node
        if chance > self._best[node]:
            self._best[node], self.sources[node] = chance, source
        both = 1.0 - (1.0 - self.chances[node]) * (1.0 - chance)
        self.chances[node] = min(both, self.chances[parent])
        return node

    def path(self, node: int) -> list[int]:
        """The tokens from the newest one on to this node."""
        found: list[int] = []
        while node > 0:
            found.append(self.tokens[node])
            node = self.parents[node]
        return found[::-1]

    def likeliest(self, count: int) -> list[int]:
        """The likeliest nodes, without node 0, best first; parents stand before their children."""
        # No node is likelier than its parent, which has a lower number: of equal chances, that decides.
        return sorted(range(1, len(self.tokens)), key=lambda node: (-self.chances[node], node))[:count]


def worth_verifying(rows: Sequence[Sequence[float]], seconds: Callable[[int], float], spent: float = 0.0) -> int:
    """Chooses the number of nodes of each row, so that expected tokens per time are the most.

    Args:
        rows: of each row, the chances of its likeliest nodes, best first.
        seconds: of a pass with so many nodes in each row.
        spent: seconds of the round that are gone whatever is verified.
    """
    best, count, expected = len(rows) / (seconds(0) + spent), 0, float(len(rows))
    for nodes in range(1, max(map(len, rows), default=0) + 1):
        expected += sum(row[nodes - 1] for row in rows if len(row) >= nodes)
        rate = expected / (seconds(nodes) + spent)
        if rate > best:
            best, count = rate, nodes
    return count


def columns(candidates: Candidates, nodes: Iterable[int], width: int) -> tuple[list[int], list[int], list[int]]:
    """Tokens, parent columns and depths of the chosen nodes of one row, filled up to `width` nodes.

    What fills up comes after itself, so that no path leads to it.
    """
    place = {0: 0}
    tokens, parents, depths = [], [], []
    for column, node in enumerate(nodes, start=1):
        place[node] = column
        tokens.append(candidates.tokens[node])
        parents.append(place[candidates.parents[node]])
        depths.append(candidates.depths[node])
    for column in range(len(tokens) + 1, width + 1):
        tokens.append(0)
        parents.append(column)
        depths.append(1)
    return tokens, parents, depths
