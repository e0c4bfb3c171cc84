"""A prompt and what is written after it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from mtpd.decode.counts import Counts
from mtpd.decode.drafting import Source


@dataclass
class Request:
    """One prompt.

    Args:
        prompt: token ids, at least one.
        max_new_tokens: how many tokens at most, at least 1.
        seed: of the random numbers of this text; greedy decoding does not read it.
        padding: what stood before the prompt to fill a batch; only logits processors and stopping criteria see it.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    seed: int = 0
    padding: Sequence[int] = ()


@dataclass
class Text:
    """A text that is written after one prompt."""

    request: Request
    number: int
    """Place of the prompt among all that were given."""
    tokens: list[int] = field(default_factory=list)
    rounds: list[tuple[int, int, int]] = field(default_factory=list)
    """Tokens written before the round, how deep was drafted in it, and how many of the drafts were accepted."""
    sources: list[Source] = field(default_factory=list)
    """Of each accepted draft, in order, where it came from."""
    ended: bool = False
    scores: list[Tensor] = field(default_factory=list)
    """Where they are asked for: what each token was chosen from, [V]."""
    logits: list[Tensor] = field(default_factory=list)

    @property
    def room(self) -> int:
        """Tokens that may yet be written."""
        return self.request.max_new_tokens - len(self.tokens)

    @property
    def newest(self) -> int:
        """Position of the newest token."""
        return len(self.request.prompt) + len(self.tokens) - 1

    def last(self, count: int) -> list[int]:
        """The newest tokens, of the prompt too; zeros stand before a text that is shorter."""
        found = self.tokens[-count:] if count else []
        if len(found) < count:
            found = [*self.request.prompt[len(found) - count :], *found]
        return [*[0] * (count - len(found)), *found]

    def counts(self, depth: int) -> Counts:
        """Sums over the rounds.

        Args:
            depth: of the chain that was drafted in every round, which counts by the rule of `mtpd.decode.counts`; 0
                where each round drafted what paid: then no depth has counts of its own.
        """
        counts = Counts(depth)
        counts.start(len(self.request.prompt))
        accepted_drafts = iter(self.sources)
        for before, drafted, accepted in self.rounds:
            counts.round(accepted, room=len(self.tokens) - before, drafted=drafted if depth else 0)
            for place, source in enumerate(itertools.islice(accepted_drafts, accepted)):
                if before + place < len(self.tokens):
                    counts.count_source(source, place)
        return counts

    def drafted_by(self) -> list[tuple[Source | None, int]]:
        """Gives source and depth (from 1 on) of each token; None and 0 for the main head's own."""
        found: list[tuple[Source | None, int]] = [(None, 0)] * len(self.tokens)
        accepted_drafts = iter(self.sources)
        for before, _, accepted in self.rounds:
            for place, source in enumerate(itertools.islice(accepted_drafts, accepted)):
                if before + place < len(found):
                    found[before + place] = source, place + 1
        return found
