"""`mtpd compare`: two acceptance files, prompt by prompt. Nothing here loads a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mtpd.cli.eval import By, Guard, JunitFile, MarkdownFile, MaxDropWorst
from mtpd.cli.options import Debug
from mtpd.run.check import acceptance_file, check_file


def compare(
    baseline: Annotated[
        Path, typer.Argument(metavar="BASELINE", help="The earlier result: an acceptance file, or a run directory.")
    ],
    candidate: Annotated[
        Path,
        typer.Argument(metavar="CANDIDATE", help="The result in question: an acceptance file, or a run directory."),
    ],
    max_drop: Annotated[
        float | None,
        typer.Option(
            "--max-drop",
            help="Fail if more than this is lost: 0.01 is one point of CAR_1, and one percent of tau. "
            "Default: only show.",
        ),
    ] = None,
    guard: Guard = "both",
    max_drop_worst: MaxDropWorst = None,
    by: By = None,
    markdown: MarkdownFile = None,
    junit: JunitFile = None,
    debug: Debug = False,
) -> None:
    """Show what changed from one measurement to another, with paired intervals.

    Exit codes with --max-drop and --max-drop-worst: 0 fine, 3 worse, 4 undecided (more prompts needed); 2 a mistake,
    1 a failure.

    Examples:

        mtpd compare runs/demo runs/other

        mtpd compare before.json after.json

        mtpd compare baselines/main.json acceptance.json --max-drop 0.01
    """
    from mtpd.evaluate.compare import Asked, compare_files  # brings in numpy
    from mtpd.evaluate.slices import check_axes

    for option, file in (("--markdown", markdown), ("--junit", junit)):
        check_file(file, key=option)
    baseline, candidate = acceptance_file(baseline), acceptance_file(candidate)
    asked = Asked(max_drop, guard, max_drop_worst, check_axes(by))
    asked.check()
    code = compare_files(baseline, candidate, asked, markdown_file=markdown, junit_file=junit)
    if code:
        raise typer.Exit(code)
