"""The result of a run of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Round = tuple[int, list[int]]
"""How many tokens of a text were known, and what was drafted after them."""


@dataclass(frozen=True)
class Served:
    """Texts, and drafts by position: `accepted[k]` counts rounds whose first k + 1 drafts were all accepted."""

    version: str
    texts: list[list[int]]
    drafted: list[int]
    accepted: list[int]
    rounds: list[list[Round]] | None = None
    """The rounds of each text; None where the engine gives counts alone, of all rounds to the end of a text."""

    @classmethod
    def of_rounds(cls, version: str, texts: list[list[int]], rounds: list[list[Round]], depth: int) -> Served:
        """Counts rounds by mtpd's own rule: those without room for all drafts are left out."""
        sums = [[0] * depth, [0] * depth]
        for each, text in zip(rounds, texts, strict=True):
            found = count_rounds(each, text, depth)
            sums = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(sums, found, strict=True)]
        drafted, accepted = sums
        return cls(version, texts, drafted, accepted, rounds)

    @property
    def car(self) -> list[float]:
        """CAR_1..CAR_K."""
        return [a / d if d else 0.0 for a, d in zip(self.accepted, self.drafted, strict=True)]


def count_rounds(rounds: Sequence[Round], text: Sequence[int], depth: int) -> list[list[int]]:
    """Drafted and accepted, by position, of rounds along a greedy text.

    A draft counts as accepted where it is the text's token and those before it in the round were accepted.
    Rounds without room for all drafts are left out, as in mtpd's own counts.
    """
    drafted, accepted = [0] * depth, [0] * depth
    for known, drafts in rounds:
        if known + depth > len(text):
            continue
        hits = 0
        while hits < depth and drafts[hits] == text[known + hits]:
            hits += 1
        for k in range(depth):
            drafted[k] += 1
            accepted[k] += k < hits
    return [drafted, accepted]
