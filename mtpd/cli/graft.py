"""`mtpd graft`: MTP layers back onto a checkpoint that lost them."""

from __future__ import annotations

from typing import Annotated

import typer

from mtpd.cli.checks import known_checkpoint
from mtpd.cli.import_ import Output
from mtpd.cli.inspect import FamilyOption
from mtpd.cli.options import Debug
from mtpd.cli.terminal import quiet_libraries


def graft(
    base: Annotated[
        str,
        typer.Argument(
            metavar="BASE", callback=known_checkpoint, help="A fine-tuned checkpoint without its MTP layers."
        ),
    ],
    original: Annotated[
        str, typer.Option("--from", callback=known_checkpoint, help="The checkpoint that it was tuned from.")
    ],
    output: Output,
    family: FamilyOption = None,
    debug: Debug = False,
) -> None:
    """Put the MTP layers of the original onto a fine-tuned checkpoint that lost them.

    Example:

        mtpd graft ./tuned --from Qwen/Qwen3.5-4B -o ./tuned-mtp
    """
    with quiet_libraries(debug=debug):
        from mtpd.formats.importing import graft as join  # brings in torch

        native = join(base, original=original, output=output, family=family)
        heads = f"{native.count} head{'s' * (native.count > 1)} of family {native.family.name}"
        typer.echo(
            f"{output}: {heads} from {original}; they were trained on another base: "
            f"mtpd distill model={output} heads=native"
        )
