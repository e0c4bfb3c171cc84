"""`mtpd export`: heads in a form that serving engines load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mtpd.cli.import_ import Output
from mtpd.cli.options import Debug, UntrustedRun
from mtpd.cli.terminal import quiet_libraries
from mtpd.finished_run import IMPORTED, check_finished
from mtpd.formats.layout import ENGINES, targets
from mtpd.heads import read_config


def _target(name: str) -> str:
    """An engine or a layout, looked up before torch is imported."""
    if name not in targets():
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(map(repr, targets()))}.")
    return name


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory of mtpd distill or mtpd import.")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="ENGINE | LAYOUT",
            callback=_target,
            autocompletion=targets,
            help=f"The serving engine, for which a file layout is chosen: {', '.join(ENGINES)}. Or a layout: "
            f"{', '.join(name for name in targets() if name not in ENGINES)}.",
        ),
    ],
    output: Output,
    depth: Annotated[int | None, typer.Option("--depth", min=1, help="How many heads to export. Default: all.")] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            "--base",
            exists=True,
            dir_okay=False,
            help="With --to llama.cpp: a GGUF file of the base, quantised or not, into which the heads are written.",
        ),
    ] = None,
    perturb: Annotated[
        bool,
        typer.Option(help="Load what was written, and check that each kind of tensor changes what the heads compute."),
    ] = True,
    untrusted: UntrustedRun = False,
    debug: Debug = False,
) -> None:
    """Write the heads of a run, with their base where the layout needs it, for a serving engine.

    Examples:

        mtpd export runs/demo --to transformers -o out

        mtpd export runs/demo --to vllm -o out

        mtpd export runs/demo --to llama.cpp --depth 1 --base model.gguf -o out
    """
    # Imported heads that mtpd cannot compute have no recipe.
    if not (run / IMPORTED).is_file():
        check_finished(run)
        if depth is not None:
            read_config(run / "heads").check_depth(depth, key="--depth")
    with quiet_libraries(debug=debug):
        from mtpd.formats.export import export as write  # brings in torch
        from mtpd.formats.model_card import read_says
        from mtpd.formats.serving import to_a_completion

        layout, why = write(run, output, to=to, depth=depth, base=base, perturb=perturb, untrusted=untrusted)
        typer.echo(f"{output}: layout {layout.name} ({why}); README.md there says more")
        for command in to_a_completion(layout, read_says(output) or {}, output, engine=to):
            typer.echo(command)
