"""Counts of one decoded text, and the one rule by which a draft counts.

A round drafts K tokens and writes `accepted + 1`. Its drafts count if the finished text has tokens in
all K places: the last round or two of a text, whose drafts lie past the length limit or behind the end
token, count at no depth. All depths are thus counted over the same rounds, and CAR_k is the product of
AR_1..AR_k. Offline and decoded measurement share this rule, so that on the trunk's own greedy text they
give equal counts. Where a text ends is known when it has ended, so its rounds are counted then.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Counts:
    """Sums over rounds. Index 0 is depth 1; `accepted[k]` counts drafts whose first k + 1 tokens were all accepted."""

    depth: int
    tokens: int = 0
    forwards: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.drafted = self.drafted or [0] * self.depth
        self.accepted = self.accepted or [0] * self.depth

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
