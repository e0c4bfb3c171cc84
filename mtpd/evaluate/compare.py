"""Two acceptance files compared, shown, and judged."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from mtpd.evaluate import gate, outputs, tables, worst
from mtpd.evaluate.acceptance import Acceptance
from mtpd.evaluate.intervals import intervals
from mtpd.files import write_whole

WIDTH = 132
"""Columns where the output is a file: wide enough for the tables."""


def console(*, quiet: bool = False) -> Console:
    """Makes the console that tables go to; square brackets in them are no markup."""
    return Console(quiet=quiet, width=None if sys.stdout.isatty() else WIDTH, markup=False)


@dataclass(frozen=True)
class Asked:
    """What a comparison is asked for; the options of the commands say what each field means."""

    max_drop: float | None = None
    guard: gate.Guard = "both"
    max_drop_worst: float | None = None
    by: tuple[str, ...] = ()
    min_tau: float | None = None

    def check(self) -> None:
        """Raises UserError for a value that is not accepted."""
        for option, value in (("--max-drop", self.max_drop), ("--max-drop-worst", self.max_drop_worst)):
            if value is not None:
                gate.check_max_drop(value, option=option)
        if self.min_tau is not None:
            worst.check_min_tau(self.min_tau)


@dataclass(frozen=True)
class Judged:
    """A measurement beside its baseline, if it has one, and what the gate says."""

    comparison: gate.Comparison | None
    changes: list[worst.SliceChange]
    """Of the slices that were asked for."""
    verdicts: list[gate.Verdict]

    @property
    def moved(self) -> list[worst.SliceChange]:
        """Slices whose tau has changed, all tested together."""
        return worst.moved(self.changes)


def judged(
    baseline: Acceptance | None, candidate: Acceptance, asked: Asked, *, names: Sequence[str] = ("", "")
) -> Judged:
    """Compares and judges, as far as it is asked for.

    Raises:
        UserError: two files that must not be compared, or slices that they do not have.
    """
    comparison, changes, verdicts = None, list[worst.SliceChange](), list[gate.Verdict]()
    if baseline is not None:
        comparison = gate.compare(baseline, candidate, names=names)
        if asked.max_drop is not None:
            verdicts.append(gate.judge(comparison, max_drop=asked.max_drop, guard=asked.guard))
        if asked.by or asked.max_drop_worst is not None:
            changes, notes = worst.slice_changes(baseline, candidate, asked.by, names=names)
            comparison.notes.extend(notes)
        if asked.max_drop_worst is not None:
            verdicts.append(worst.judge_worst(changes, max_drop=asked.max_drop_worst))
    if asked.min_tau is not None:
        verdicts.append(worst.judge_floor(candidate, asked.min_tau, asked.by))
    return Judged(comparison, changes, verdicts)


def compare_files(
    baseline: Path,
    candidate: Path,
    asked: Asked,
    *,
    markdown_file: Path | None = None,
    junit_file: Path | None = None,
) -> int:
    """Prints what changed; gives the exit code of the gate, 0 where none was asked for.

    Raises:
        UserError: a file that cannot be read, or two that must not be compared.
    """
    before, after = Acceptance.load(baseline), Acceptance.load(candidate)
    found = judged(before, after, asked, names=(str(baseline), str(candidate)))
    show_judged(console(), found)
    if markdown_file is not None or junit_file is not None:
        estimates = intervals(after)
        if markdown_file is not None:
            text = outputs.markdown(
                after, estimates, comparison=found.comparison, verdicts=found.verdicts, moved=found.moved
            )
            write_whole(markdown_file, text)
        if junit_file is not None:
            write_whole(junit_file, outputs.junit(after, estimates, seconds=0.0, verdicts=found.verdicts))
    return gate.exit_code(found.verdicts)


def show_judged(to: Console, found: Judged) -> None:
    """The tables of changes, what has to be said about them, and the verdicts."""
    if found.comparison is not None:
        to.print(tables.comparison_table(found.comparison))
        if found.changes:
            to.print(tables.changes_table(found.changes))
        for note in found.comparison.notes:
            to.print(f"note: {note}", highlight=False)
    for verdict in found.verdicts:
        # In one line however narrow the terminal: logs are searched for it.
        to.print(verdict.line, highlight=False, soft_wrap=True)
