"""`mtpd inspect`: what heads a directory has."""

from __future__ import annotations

from typing import Annotated

import typer

from mtpd.cli.checks import known_checkpoint, known_family
from mtpd.cli.options import Debug
from mtpd.cli.terminal import quiet_libraries

Checkpoint = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", callback=known_checkpoint, help="A checkpoint directory or a hub id.")
]
FamilyOption = Annotated[
    str | None,
    typer.Option(
        "--family",
        callback=known_family,
        help="Which format the heads have, such as deepseek-v3, if config.json does not tell.",
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        "--base",
        callback=known_checkpoint,
        help="The model that the heads belong to, if they are in a directory of their own.",
    ),
]


def inspect(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH", callback=known_checkpoint, help="A run directory, an export, a checkpoint or a hub id."
        ),
    ],
    family: FamilyOption = None,
    base: BaseOption = None,
    debug: Debug = False,
) -> None:
    """Say which MTP heads a directory has, of which family, and which engines can serve it.

    Example:

        mtpd inspect Qwen/Qwen3.5-4B
    """
    with quiet_libraries(debug=debug):
        from mtpd.formats.inspect import inspect as look  # brings in torch

        for line in look(path, family=family, base=base):
            typer.echo(line)
