"""A server's acceptance beside what mtpd has measured offline: whether the server accepts what was promised."""

from __future__ import annotations

from dataclasses import dataclass

from mtpd.errors import UserError
from mtpd.evaluate.acceptance import Acceptance, PromptCounts
from mtpd.evaluate.intervals import Estimate, estimate, paired_differences

FEWEST = 8
"""Prompts of which none has the same text: from so many on, it is another model and not rounding."""


@dataclass(frozen=True)
class Beside:
    """Both measurements on the prompts that are in both.

    Attributes:
        change: relative change of tau from offline to served.
        same: prompts whose text is the same.
    """

    prompts: int
    offline: float
    served: float
    change: Estimate
    same: int

    @property
    def words(self) -> str:
        """One line."""
        spread = ""
        if self.change.low is not None and self.change.high is not None:
            spread = f" [{100 * self.change.low:+.1f}, {100 * self.change.high:+.1f}]"
        return (
            f"offline, on the same {self.prompts} prompts: tau {self.offline:.3f}, served {self.served:.3f}, "
            f"{100 * self.change.value:+.1f}%{spread}; {self.same} of {self.prompts} texts are the same"
        )


def beside_offline(served: Acceptance, offline: Acceptance, *, place: str) -> Beside | None:
    """Compares prompt by prompt; None where no prompt is in both, the server gave sums alone, or drafts further.

    Args:
        place: the server, for messages.

    Raises:
        UserError: the server has another model.
    """
    before: dict[str, list[PromptCounts]] = {}
    after: dict[str, list[PromptCounts]] = {}
    for name, suite in served.suites.items():
        known = (
            {(row.id, row.prompt): row for row in (offline.suites[name].rows or [])} if name in offline.suites else {}
        )
        for row in suite.rows or []:
            if (old := known.get((row.id, row.prompt))) is not None:
                before.setdefault(name, []).append(old)
                after.setdefault(name, []).append(row)
    if not before:
        return None
    pairs = [pair for name in before for pair in zip(before[name], after[name], strict=True)]
    same = sum(old.text == new.text for old, new in pairs)
    if not same and len(pairs) >= FEWEST:
        raise UserError(
            f"{place}: none of its {len(pairs)} texts is the model's: it serves another model; accepted: the model of "
            "the run, with the same --max-new-tokens"
        )
    if served.total().depth != offline.total().depth:
        return None
    taus = [ratios["tau"] for ratios in paired_differences(before, after)[None]]
    change = taus[1] / taus[0] - 1.0
    return Beside(len(pairs), float(taus[0][0]), float(taus[1][0]), estimate(float(change[0]), change[1:]), same)
