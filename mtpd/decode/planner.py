"""Chooses the drafts of a round, by source and number: heads and look-up in one tree.

Each round asks the look-up first, which costs nothing. Heads draft as long as what they may add is worth their time; at
each depth the likeliest paths go on through the next head (dynamic trees, arXiv 2406.16858, EAGLE-2). Then those nodes
are verified that make expected tokens per time the most (`mtpd.decode.candidates`), each with the chance that counts on
other texts give it (`mtpd.decode.chances`).

Shape legend: N rows, S nodes, F nodes of a depth that go on, m candidates of each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mtpd.decode.candidates import Candidates, columns, worth_verifying
from mtpd.decode.chances import REACH, Chances
from mtpd.decode.corpus import Corpus
from mtpd.decode.drafting import CORPUS, HEADS, LOOKUP, SOURCES, Source
from mtpd.decode.drafts import Drafts
from mtpd.decode.lookup import LONGEST, LookupIndex, Match
from mtpd.heads.drafting import Drafter
from mtpd.slots import Newest, on_device

MOST = 32
"""Nodes of a row at most."""
BEAM = 4
"""Paths that go on from one depth to the next, and candidates of each."""
WAYS = 2
"""Continuations of a look-up at most."""


@dataclass(frozen=True)
class Costs:
    """Seconds on this machine."""

    passes: dict[int, float]
    """Of a pass of the trunk with its main head, by the tokens in it."""
    head: float
    """Of one depth of the heads, for one text."""
    further_row: float = 0.0
    """What each further text adds to that."""

    def of_pass(self, tokens: int) -> float:
        """Seconds of a pass over so many tokens; between those measured a straight line, beyond them the last slope."""
        sizes = sorted(self.passes)
        if len(sizes) == 1:
            return self.passes[sizes[0]]
        upper = next((place for place, size in enumerate(sizes) if size >= tokens), len(sizes) - 1)
        low, high = sizes[max(0, upper - 1)], sizes[max(1, upper)]
        slope = (self.passes[high] - self.passes[low]) / (high - low)
        return max(self.passes[sizes[0]], self.passes[low] + slope * (tokens - low))

    def of_head(self, rows: int) -> float:
        """Seconds of one depth of the heads, for so many texts."""
        return self.head + (rows - 1) * self.further_row


@dataclass
class Planner:
    """Chooses the drafts of each round.

    Args:
        chances: how often drafts of each kind are right.
        costs: seconds of passes; None verifies `nodes` drafts in every round, and asks every head, whatever it costs:
            what is accepted then depends neither on the machine nor on the batch.
        sources: which ones draft.
        nodes: drafts of a row at most.
        corpus: other texts in which continuations are looked up, if there are any.
    """

    chances: Chances
    costs: Costs | None
    sources: Collection[Source] = SOURCES
    nodes: int = MOST
    corpus: Corpus | None = None
    _indices: dict[int, LookupIndex] = field(default_factory=dict)

    def draft(
        self, drafter: Drafter | None, depth: int, tokens: Tensor, newest: Sequence[int], texts: Sequence[Any]
    ) -> Drafts | None:
        """The tree of the round, or None where nothing is worth verifying.

        Args:
            drafter: of the heads, or None.
            depth: of the heads, at most.
            tokens: all tokens by slot [S, C].
            newest: position of the newest token of each row.
            texts: one a row.
        """
        rows = [Candidates() for _ in texts]
        for candidates, text in zip(rows, texts, strict=True):
            self._look_up(candidates, 0, text)
        asked = 0
        if drafter is not None and HEADS in self.sources:
            asked = self._ask_heads(rows, drafter, depth, tokens, newest, texts)
        likeliest = [candidates.likeliest(self.nodes) for candidates in rows]
        if self.costs is None:
            count = max(map(len, likeliest))
        else:
            chances = [[c.chances[node] for node in nodes] for c, nodes in zip(rows, likeliest, strict=True)]
            count = worth_verifying(chances, self._seconds(rows), asked * self.costs.of_head(len(rows)))
        if not count:
            return None
        chosen = [nodes[:count] for nodes in likeliest]
        width = Newest.of(newest, tokens.device).width(max(map(len, chosen)), least=1)
        trees = [columns(c, nodes, width) for c, nodes in zip(rows, chosen, strict=True)]
        of_tokens, parents, depths = on_device(trees, tokens.device).unbind(1)
        return Drafts(
            of_tokens,
            max(c.depths[node] for c, nodes in zip(rows, chosen, strict=True) for node in nodes),
            parents,
            depths,
            sources=[[c.sources[node] for node in nodes] for c, nodes in zip(rows, chosen, strict=True)],
        )

    def forget(self, text: Any) -> None:
        """Drops what is kept of a text that has ended."""
        self._indices.pop(text.number, None)

    def _index(self, text: Any) -> LookupIndex:
        index = self._indices.get(text.number)
        if index is None:
            index = self._indices[text.number] = LookupIndex(text.request.prompt)
        index.extend(text.tokens[len(index.tokens) - len(text.request.prompt) :])
        return index

    def _look_up(self, candidates: Candidates, node: int, text: Any) -> None:
        """Adds what followed when the path to a node last stood in the text, and what follows it in the corpus."""
        drafted = candidates.path(node)
        reach = REACH - len(drafted)
        if reach <= 0 or set(self.sources) <= {HEADS}:
            return
        index = self._index(text)
        if LOOKUP in self.sources:
            for match in index.matches(reach, drafted=drafted, ways=1 if drafted else WAYS):
                # A match of drafts alone says nothing about how they came about.
                if match.length > len(drafted):
                    self._add(candidates, node, match, LOOKUP)
        if CORPUS in self.sources and self.corpus is not None:
            for match in self.corpus.matches([*index.tokens[-LONGEST:], *drafted], reach):
                self._add(candidates, node, match, CORPUS)

    def _add(self, candidates: Candidates, node: int, match: Match, source: Source) -> None:
        chances = self.chances.path(match.length, match.agree, match.tokens, candidates.chances[node], source=source)
        for token, chance in zip(match.tokens, chances, strict=True):
            node = candidates.add(node, token, chance, source)

    def _ask_heads(
        self,
        rows: Sequence[Candidates],
        drafter: Drafter,
        depth: int,
        tokens: Tensor,
        newest: Sequence[int],
        texts: Sequence[Any],
    ) -> int:
        """Lets heads draft as deep as pays, and gives back how deep that was."""
        # By row, the node of each path that goes on.
        going: list[list[int]] = [[0] for _ in rows]
        done = 0

        def level(log_probabilities: list[Any], ids: list[Any], parents: list[Any]) -> bool:
            """Takes the candidates of a depth; says whether the next one is asked."""
            nonlocal going, done
            done += 1
            following = []
            for row, (candidates, nodes) in enumerate(zip(rows, going, strict=True)):
                added = []
                for value, token, parent in zip(log_probabilities[row], ids[row], parents[row], strict=True):
                    before = nodes[parent]
                    chance = self.chances.head(done, value) * candidates.chances[before]
                    added.append(candidates.add(before, token, chance, HEADS))
                following.append(added)
            going = following
            for candidates, nodes, text in zip(rows, going, texts, strict=True):
                self._look_up(candidates, nodes[0], text)
            return done < depth and self._worth(rows, done)

        if self._worth(rows, 0):
            drafter.draft_tree(tokens, newest, depth, BEAM, level)
        return done

    def _worth(self, rows: Sequence[Candidates], done: int) -> bool:
        """Whether one more depth of heads may bring more than the same time brings without it."""
        if self.costs is None:
            return True
        share = self.chances.right_at(done + 1)
        gain = 0.0
        for candidates in rows:
            reach = [c for c, d in zip(candidates.chances, candidates.depths, strict=True) if d == done]
            beyond = [c for c, d in zip(candidates.chances, candidates.depths, strict=True) if d == done + 1]
            # What look-up has already found there is not gained again.
            gain += max(0.0, min(1.0, sum(reach)) - min(1.0, sum(beyond))) * share
        order = [[c.chances[n] for n in c.likeliest(self.nodes)] for c in rows]
        seconds = self._seconds(rows)
        count = worth_verifying(order, seconds)
        rate = (len(rows) + sum(sum(each[:count]) for each in order)) / seconds(count)
        # What the heads add has to be verified too.
        further = seconds(count + 1) - seconds(count)
        return gain > rate * (self.costs.of_head(len(rows)) + further)

    def _seconds(self, rows: Sequence[Candidates]) -> Callable[[int], float]:
        """Seconds of a pass by the drafts of each row."""
        costs = self.costs
        assert costs is not None
        return lambda nodes: costs.of_pass(len(rows) * (1 + nodes))
