"""What another model costs the heads of a run: their acceptance under it beside that under their own, by slices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mtpd.evaluate import gate, worst
from mtpd.evaluate.acceptance import Acceptance

MOST = 3
"""Slices that the line names."""


@dataclass(frozen=True)
class Cost:
    """Heads under another model than the one that they were trained for.

    Attributes:
        name: the other model.
        tau: of all suites together, under their own model and under this one.
        changes: of each slice.
    """

    name: str
    prompts: int
    tau: gate.Change
    changes: list[worst.SliceChange]

    @property
    def moved(self) -> list[worst.SliceChange]:
        """Slices whose tau has changed, all tested together, the largest loss first."""
        return sorted(worst.moved(self.changes), key=lambda each: each.change.value)

    @property
    def line(self) -> str:
        """What the model costs, and where, in one line."""
        words = {"down": "costs these heads", "up": "suits these heads better than their own"}.get(
            self.tau.direction, "costs these heads nothing that so many prompts can show"
        )
        said = (
            f"{self.name} {words}: tau {self.tau.before:.3f} → {self.tau.after:.3f}, {self.tau.shown()}, on "
            f"{self.prompts} prompts"
        )
        found = self.moved
        named = [f"{each.label} {100 * each.change.value:+.1f}%" for each in found[:MOST]]
        if not found:
            return f"{said}; none of {len(self.changes)} slices has moved, as far as so many prompts can show"
        return f"{said}; {len(found)} of {len(self.changes)} slices have moved: {', '.join(named)}" + (
            " ..." if len(found) > MOST else ""
        )


def cost(own: Acceptance, found: Acceptance, *, name: str, by: Sequence[str] = ()) -> Cost:
    """Compares prompt by prompt.

    Args:
        own: the heads under the model that they were trained for.
        found: the same under another one.
        by: what slices are by; all that there is where nothing is named.

    Raises:
        UserError: other heads, prompts or settings.
    """
    names = ("under their own model", f"under {name}")
    comparison = gate.compare(own, found, names=names)
    changes, _ = worst.slice_changes(own, found, by, names=names)
    return Cost(name, comparison.prompts[None], comparison.suites[None]["tau"], changes)
