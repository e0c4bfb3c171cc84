"""Two acceptance files compared, shown, and judged."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from mtpd.evaluate import gate, outputs, tables
from mtpd.evaluate.acceptance import Acceptance
from mtpd.evaluate.intervals import intervals
from mtpd.files import write_whole

WIDTH = 132
"""Columns where the output is a file: wide enough for the tables."""


def console(*, quiet: bool = False) -> Console:
    """Makes the console that tables go to; square brackets in them are no markup."""
    return Console(quiet=quiet, width=None if sys.stdout.isatty() else WIDTH, markup=False)


def compare_files(
    baseline: Path,
    candidate: Path,
    *,
    max_drop: float | None = None,
    guard: gate.Guard = "both",
    markdown_file: Path | None = None,
    junit_file: Path | None = None,
) -> int:
    """Prints what changed; gives the exit code of the gate, 0 where none was asked for.

    Raises:
        UserError: a file that cannot be read, or two that must not be compared.
    """
    before, after = Acceptance.load(baseline), Acceptance.load(candidate)
    comparison = gate.compare(before, after, names=(str(baseline), str(candidate)))
    verdict = None if max_drop is None else gate.judge(comparison, max_drop=max_drop, guard=guard)
    show_comparison(console(), comparison, verdict)
    if markdown_file is not None or junit_file is not None:
        estimates = intervals(after)
        if markdown_file is not None:
            text = outputs.markdown(after, estimates, comparison=comparison, verdict=verdict)
            write_whole(markdown_file, text)
        if junit_file is not None:
            write_whole(junit_file, outputs.junit(after, estimates, seconds=0.0, verdict=verdict))
    return 0 if verdict is None else verdict.exit_code


def show_comparison(to: Console, comparison: gate.Comparison, verdict: gate.Verdict | None) -> None:
    """The table of changes, what has to be said about it, and the verdict."""
    to.print(tables.comparison_table(comparison))
    for note in comparison.notes:
        to.print(f"note: {note}", highlight=False)
    if verdict is not None:
        # In one line however narrow the terminal: logs are searched for it.
        to.print(verdict.line, highlight=False, soft_wrap=True)
