"""Counts of one decoded text, and the one rule by which a draft counts.

A round drafts K tokens and writes `accepted + 1`. Its drafts count if the finished text has tokens in
all K places: the last round or two of a text, whose drafts lie past the length limit or behind the end
token, count at no depth. All depths are thus counted over the same rounds, and CAR_k is the product of
AR_1..AR_k. Offline and decoded measurement share this rule, so that on the trunk's own greedy text they
give equal counts. Where a text ends is known when it has ended, so its rounds are counted then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field


def shares(parts: Sequence[float], wholes: Sequence[int]) -> list[float]:
    """Divide depth by depth; CAR_1..CAR_K of accepted and drafted."""
    return [part / whole if whole else 0.0 for part, whole in zip(parts, wholes, strict=True)]


def conditional(car: Sequence[float]) -> list[float]:
    """Compute AR_1..AR_K, so that CAR_k is their product up to k."""
    return [now / before if before else 0.0 for now, before in zip(car, [1.0, *car[:-1]], strict=True)]


@dataclass
class Counts:
    """Sums over rounds. Index 0 is depth 1; `accepted[k]` counts drafts whose first k + 1 tokens were all accepted."""

    depth: int
    tokens: int = 0
    forwards: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    sources: dict[str, int] = field(default_factory=dict)
    """Accepted drafts by the source that drafted them; empty where heads are the only one."""

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
            dict(Counter(self.sources) + Counter(other.sources)),
        )

    def __str__(self) -> str:
        """Write a line; tau and CAR are of the rounds that count, tokens and passes are of all."""
        passes = f"{self.tokens} tokens in {self.forwards} forward passes"
        each = [f"CAR_{k} {share:.2f}" for k, share in enumerate(self.car, start=1)]
        sources = [f"{count} from {source}" for source, count in self.sources.items()]
        shown = f"{passes}; {' '.join([*each, f'tau {self.tau:.2f}'])} over {max(self.drafted, default=0)} rounds"
        return shown + (f"; accepted drafts: {', '.join(sources)}" if sources else "")

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
        """Tokens per forward pass of the trunk: 1 + Σ CAR_k."""
        return 1.0 + sum(self.car)

    def start(self) -> None:
        """The forward pass over the prompt, which writes one token."""
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
        written = min(accepted + 1, room)
        self.tokens += written
        self.forwards += 1
        return written
