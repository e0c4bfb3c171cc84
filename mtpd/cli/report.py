"""`mtpd report`: one HTML file about a run. Nothing here loads a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mtpd.cli.eval import RunArgument
from mtpd.cli.options import Debug
from mtpd.cli.terminal import quiet_libraries
from mtpd.finished_run import check_finished
from mtpd.run.check import acceptance_file, check_file


def report(
    context: typer.Context,
    run: RunArgument,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The HTML file. Default: report.html in the run directory.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="Compare the result of mtpd eval with an earlier one: a file that it wrote, or a run."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a report: a verdict, acceptance with intervals, wall clock, training curves, texts, recipe and provenance.

    It is one HTML file that needs no network and no script.

    Examples:

        mtpd report runs/demo

        mtpd report runs/demo --against baselines/main.json -o report.html
    """
    check_finished(run, heads=None)
    check_file(output, key="--output")
    against = None if against is None else acceptance_file(against, name="evaluation.json")
    with quiet_libraries(debug=debug or bool(context.find_root().params.get("debug"))):
        from mtpd.run.report import report_run  # brings in torch

        typer.echo(f"written: {report_run(run, output=output, against=against)}")
