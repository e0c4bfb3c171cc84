"""Look-up: what followed the newest tokens when they last stood in the text of a request."""

from __future__ import annotations

from collections.abc import Sequence

LEAST = "mtpd_lookup"
"""The key in vLLM's `--additional-config` that says how many tokens a look-up goes by; without it there is none."""


class Lookup:
    """The index of one text, which grows with it.

    Args:
        least: how many of the newest tokens have to have stood there before.
    """

    def __init__(self, least: int) -> None:
        self.least = least
        # Where each run of that many tokens was last followed by something.
        self.places: dict[tuple[int, ...], int] = {}
        self.indexed = least

    def after(self, text: Sequence[int], count: int) -> list[int]:
        """Gives up to `count` tokens that may follow; none where the newest tokens are new."""
        for place in range(self.indexed, len(text)):
            self.places[tuple(text[place - self.least : place])] = place
        self.indexed = max(self.indexed, len(text))
        place = self.places.get(tuple(text[-self.least :]))
        found: list[int] = []
        while place is not None and len(found) < count:
            # A text that repeats itself goes on with what is being drafted.
            at = place + len(found) - len(text)
            found.append(text[at] if at < 0 else found[at])
        return found
