"""`mtpd history`: acceptance over time, from the files of a folder. Nothing here loads a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mtpd.cli.options import Debug
from mtpd.run.check import check_file


def history(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="A folder of acceptance files, named so that they sort, such as 2026-11-29.json."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The HTML file. Default: history.html in the folder.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Draw tau and CAR over time with intervals, as one HTML page that needs no network and no script.

    Example:

        mtpd history baselines/history
    """
    from mtpd.evaluate.history import read_history  # these bring in numpy
    from mtpd.files import write_whole
    from mtpd.report.history import render_history

    page = output or folder / "history.html"
    past = read_history(folder)
    check_file(page, key="--output")
    write_whole(page, render_history(folder.resolve().name, past))
    typer.echo(f"written: {page}")
