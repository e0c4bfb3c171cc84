"""`mtpd export`: heads in a form that serving engines load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mtpd.cli.import_ import Output
from mtpd.cli.options import Debug, UntrustedRun
from mtpd.cli.terminal import quiet_libraries
from mtpd.heads import read_config
from mtpd.run.check import check_finished

Target = Literal[
    "transformers",
    "vllm",
    "sglang",
    "in-place",
    "hf-mtp",
    "mimo-draft",
    "mimo",
    "fastmtp",
    "glm4moe",
    "speculators",
    "medusa",
]
"""Engines and layouts; written out here, so that a misspelt one is named before torch is imported."""


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory of mtpd distill or mtpd import.")],
    to: Annotated[
        Target,
        typer.Option(
            "--to",
            metavar="ENGINE | LAYOUT",
            help="The serving engine, for which a file layout is chosen: transformers, vllm or sglang. Or a layout: "
            "in-place, hf-mtp, mimo-draft, mimo, fastmtp, glm4moe, speculators, medusa.",
        ),
    ],
    output: Output,
    depth: Annotated[int | None, typer.Option("--depth", min=1, help="How many heads to export. Default: all.")] = None,
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

        mtpd export runs/demo --to vllm --depth 1 -o out
    """
    # Imported heads that mtpd cannot compute have no recipe.
    if not (run / "import.json").is_file():
        check_finished(run)
        if depth is not None:
            read_config(run / "heads").check_depth(depth, key="--depth")
    with quiet_libraries(debug=debug):
        from mtpd.formats.export import export as write  # brings in torch

        layout, why = write(run, output, to=to, depth=depth, perturb=perturb, untrusted=untrusted)
        typer.echo(f"{output}: layout {layout.name} ({why}); README.md there says how it is served")
