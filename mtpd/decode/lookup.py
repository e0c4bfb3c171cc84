"""Look-up drafts: what followed the newest tokens when they last stood in the text.

The index of a text grows with it. It knows, for each run of one to `LONGEST` tokens, the newest place behind it and,
for each place, the one before it. So a token costs the same however long the text is, memory is linear, and nothing is
searched in a round. (`prompt_lookup_num_tokens` of transformers searches the whole text each time.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LONGEST = 4
"""Tokens of the longest runs that are indexed; longer matches are found behind their last tokens."""
COMPARED = 16
"""Matches are counted up to this many tokens."""
NEWEST = 4
"""Places that are looked at, the newest ones."""


@dataclass(frozen=True)
class Match:
    """One way in which the text went on before."""

    tokens: tuple[int, ...]
    """What followed."""
    length: int
    """Tokens before it that are the newest ones now, `COMPARED` at most."""
    agree: int
    """Places that were looked at and go on with the same token, this one included."""


class LookupIndex:
    """The index of one text.

    Args:
        tokens: what the text has so far.
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.tokens: list[int] = []
        # By length of the run: the newest place behind it, and for each place the one before it (-1: none).
        self._newest: list[dict[tuple[int, ...], int]] = [{} for _ in range(LONGEST)]
        self._before: list[list[int]] = [[] for _ in range(LONGEST)]
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Appends tokens to the text."""
        for token in tokens:
            # The run that ends before this token is followed by it.
            place = len(self.tokens)
            for size in range(1, LONGEST + 1):
                run = tuple(self.tokens[place - size :]) if size <= place else None
                newest = self._newest[size - 1]
                self._before[size - 1].append(-1 if run is None else newest.get(run, -1))
                if run is not None:
                    newest[run] = place
            self.tokens.append(token)

    def matches(self, length: int, *, drafted: Sequence[int] = (), ways: int = 1) -> list[Match]:
        """Finds continuations, the longest match first, and of equal ones the newest.

        Args:
            length: tokens of a continuation at most, at least 1.
            drafted: tokens that are taken to stand behind the text.
            ways: how many continuations at most; they differ in their first token.
        """
        end = [*self.tokens[-COMPARED:], *drafted][-COMPARED:]
        found: dict[int, tuple[int, int]] = {}
        first: list[int] = []
        for size in range(min(LONGEST, len(end)), 0, -1):
            place = self._newest[size - 1].get(tuple(end[-size:]), -1)
            seen = 0
            while place >= 0 and seen < NEWEST:
                if place not in found:
                    found[place] = (self._common(place, end), place)
                    first.append(self.tokens[place])
                place = self._before[size - 1][place]
                seen += 1
            if len(set(first)) >= ways and found:
                break
        chosen: dict[int, Match] = {}
        for common, place in sorted(found.values(), reverse=True):
            token = self.tokens[place]
            if token not in chosen and len(chosen) < ways:
                chosen[token] = Match(tuple(self._following(place, length, drafted)), common, first.count(token))
        return list(chosen.values())

    def _common(self, place: int, end: Sequence[int]) -> int:
        """Tokens before a place that are the last ones of `end`."""
        count = 0
        while count < len(end) and count < place and self.tokens[place - 1 - count] == end[-1 - count]:
            count += 1
        return count

    def _following(self, place: int, length: int, drafted: Sequence[int]) -> list[int]:
        """Tokens from a place on. A text that repeats itself goes on with what is being written."""
        found = self.tokens[place : place + length]
        missing = length - len(found)
        if missing:
            found += drafted[:missing]
        period = len(self.tokens) + len(drafted) - place
        while len(found) < length:
            found.append(found[len(found) - period])
        return found
