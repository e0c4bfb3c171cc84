"""`mtpd import`: a checkpoint's own MTP heads as heads of mtpd."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mtpd.cli.checks import new_output
from mtpd.cli.inspect import BaseOption, Checkpoint, FamilyOption
from mtpd.cli.options import Debug
from mtpd.cli.terminal import quiet_libraries

Output = Annotated[
    Path, typer.Option("-o", "--output", callback=new_output, help="The directory to write, which must not exist.")
]


def import_heads(
    checkpoint: Checkpoint,
    output: Output,
    family: FamilyOption = None,
    base: BaseOption = None,
    depth: Annotated[
        int | None,
        typer.Option(
            "--depth", min=1, help="How many heads to take. A single head can serve as several. Default: all."
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Allow Python code that comes with the model to run.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Write a run directory with the MTP heads that a checkpoint has.

    Example:

        mtpd import Qwen/Qwen3.5-4B -o runs/qwen
    """
    with quiet_libraries(debug=debug):
        from mtpd.formats.importing import import_heads as read  # brings in torch

        native = read(checkpoint, output, family=family, base=base, depth=depth, trust_remote_code=trust_remote_code)
        typer.echo(f"{native.count} head{'s' * (native.count > 1)} of family {native.family.name}: {output}")
        if native.cannot_run is None:
            typer.echo(f"measure them: mtpd eval {output}")
            if not native.family.separate and family is None:
                typer.echo(f"train them: mtpd distill {output}/recipe.yaml output={output}-distilled")
        else:
            typer.echo(f"mtpd cannot compute them ({native.cannot_run}); `mtpd graft` moves them to another base")
