"""Counts of one decoded text, and the one rule by which a draft counts.

A round drafts K tokens and writes `accepted + 1`. Its drafts count if the finished text has tokens in
all K places: the last round or two of a text, whose drafts lie past the length limit or behind the end
token, count at no depth. All depths are thus counted over the same rounds, and CAR_k is the product of
AR_1..AR_k. Offline and decoded measurement share this rule, so that on the trunk's own greedy text they
give equal counts. Where a text ends is known when it has ended, so its rounds are counted then.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

FIRST = {"text": 16, "context": 128}
"""Upper end of the first bucket of each kind of place; each further bucket is twice as wide as those before it."""
Places = dict[str, dict[int, list[int]]]
"""By kind of place, then by the lower end of a bucket: rounds that count, then those accepted at each depth."""


def shares(parts: Sequence[float], wholes: Sequence[int]) -> list[float]:
    """Divide depth by depth; CAR_1..CAR_K of accepted and drafted."""
    return [part / whole if whole else 0.0 for part, whole in zip(parts, wholes, strict=True)]


def conditional(car: Sequence[float]) -> list[float]:
    """Compute AR_1..AR_K, so that CAR_k is their product up to k."""
    return [now / before if before else 0.0 for now, before in zip(car, [1.0, *car[:-1]], strict=True)]


def sum_sources(parts: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, list[int]]:
    """Add counts by source and depth."""
    names = dict.fromkeys(name for part in parts for name in part)
    found = {}
    for name in names:
        columns = itertools.zip_longest(*(part.get(name, ()) for part in parts), fillvalue=0)
        found[name] = [sum(column) for column in columns]
    return found


@dataclass
class Counts:
    """Sums over rounds. Index 0 is depth 1; `accepted[k]` counts drafts whose first k + 1 tokens were all accepted."""

    depth: int
    tokens: int = 0
    forwards: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    sources: dict[str, list[int]] = field(default_factory=dict)
    """Accepted drafts by the source that drafted them, and by depth, from 1 on."""
    places: Places = field(default_factory=dict, compare=False)
    """Of one text: where its rounds were. `text` counts the response's tokens before a round, `context` all tokens."""
    prompt: int = field(default=0, compare=False)
    """Tokens of the prompt of one text."""

    def __post_init__(self) -> None:
        self.drafted = self.drafted or [0] * self.depth
        self.accepted = self.accepted or [0] * self.depth

    def __add__(self, other: Counts) -> Counts:
        """Sum over texts."""
        return Counts(
            self.depth,
            self.tokens + other.tokens,
            self.forwards + other.forwards,
            [a + b for a, b in zip(self.drafted, other.drafted, strict=True)],
            [a + b for a, b in zip(self.accepted, other.accepted, strict=True)],
            sum_sources([self.sources, other.sources]),
        )

    def __str__(self) -> str:
        """Write a line; tau and CAR of a chain are of the rounds that count, tokens and passes are of all."""
        each = [f"CAR_{k} {share:.2f}" for k, share in enumerate(self.car, start=1)]
        rounds = f" over {self.drafted[0]} rounds" if self.depth else ""
        sources = [f"{sum(counts)} from {source}" for source, counts in self.sources.items()]
        shown = f"{self.tokens} tokens in {self.forwards} forward passes; {' '.join([*each, f'tau {self.tau:.2f}'])}"
        return shown + rounds + (f"; accepted drafts: {', '.join(sources)}" if sources else "")

    @property
    def car(self) -> list[float]:
        """CAR_1..CAR_K."""
        return shares(self.accepted, self.drafted)

    @property
    def ar(self) -> list[float]:
        """AR_1..AR_K."""
        return conditional(self.car)

    @property
    def tau(self) -> float:
        """Tokens per forward pass of the trunk: 1 + Σ CAR_k of a chain, else as they were counted."""
        return 1.0 + sum(self.car) if self.depth else self.tokens / max(1, self.forwards)

    def count_source(self, source: str, place: int) -> None:
        """An accepted draft of a source, with so many drafts before it in its round."""
        counts = self.sources.setdefault(source, [])
        counts += [0] * (place + 1 - len(counts))
        counts[place] += 1

    def start(self, prompt: int = 0) -> None:
        """The forward pass over a prompt of so many tokens, which writes one token."""
        self.prompt = prompt
        self.tokens += 1
        self.forwards += 1

    def round(self, accepted: int, *, room: int, drafted: int | None = None) -> int:
        """One round of drafting and verification.

        Args:
            accepted: how many drafts equal the main head's choices, from the first on.
            room: tokens that the finished text has from this round on, at least 1.
            drafted: how many drafts were made; None is one for each depth.

        Returns:
            How many tokens the round writes.
        """
        drafted = self.depth if drafted is None else drafted
        if room >= drafted:
            for k in range(drafted):
                self.drafted[k] += 1
                self.accepted[k] += k < accepted
            if drafted:
                self._count_place(accepted)
        written = min(accepted + 1, room)
        self.tokens += written
        self.forwards += 1
        return written

    def _count_place(self, accepted: int) -> None:
        for kind, before in (("text", self.tokens), ("context", self.prompt + self.tokens)):
            lower = 0 if before < FIRST[kind] else 1 << (before.bit_length() - 1)
            found = self.places.setdefault(kind, {}).setdefault(lower, [0] * (self.depth + 1))
            found[0] += 1
            for k in range(accepted):
                found[k + 1] += 1
