"""Rows that cannot be used: left out, counted by reason, with the first place of each."""

from __future__ import annotations

import logging
from typing import Any

from mtpd.errors import UserError

logger = logging.getLogger(__name__)


class Unusable(UserError):
    """A row that cannot be used. Rows are counted by `reason`; the message names the place and what is accepted."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class LeftOut:
    """Counts rows that cannot be used, by reason.

    Args:
        most: the share of all rows that may be unusable.
    """

    def __init__(self, most: float = 0.1) -> None:
        self.most = most
        self.counts: dict[str, int] = {}
        self.first: dict[str, str] = {}
        """By reason, what was said of the first row."""

    def add(self, error: Unusable) -> None:
        """Counts a row."""
        self.counts[error.reason] = self.counts.get(error.reason, 0) + 1
        self.first.setdefault(error.reason, str(error))

    def take(self, other: LeftOut) -> None:
        """Counts what another one has counted."""
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            self.first.setdefault(reason, other.first[reason])

    @property
    def total(self) -> int:
        """Rows left out, for whatever reason."""
        return sum(self.counts.values())

    def words(self) -> str:
        """Names each reason with its count and first place, on one line."""
        ordered = sorted(self.counts.items(), key=lambda item: -item[1])
        return "; ".join(f"{count} {reason} (first: {self.first[reason]})" for reason, count in ordered)

    def noted(self) -> dict[str, Any]:
        """Entry of the provenance: counts, and the first place of each reason."""
        return {reason: {"rows": count, "first": self.first[reason]} for reason, count in self.counts.items()}

    def check(self, rows: int, *, source: str, what: str = "prompts") -> None:
        """Warns of what is left out of so many rows.

        Args:
            rows: all that there were, those left out among them.
            source: key of the recipe and where the rows come from, for messages.
            what: the rows hold.

        Raises:
            UserError: no row is left, or too many are left out.
        """
        if not self.total and rows:
            return
        told = f"{self.total} of {rows} rows cannot be used: {self.words()}"
        if self.total >= rows:
            raise UserError(f"{source} holds no {what}" + (f" that can be used; {told}" if rows else ""))
        if self.total > self.most * rows:
            raise UserError(f"{source}: {told}; accepted: at most a share of {self.most:g} (data.max_unusable)")
        logger.warning("%s: %s; left out", source, told)
