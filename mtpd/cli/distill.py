"""`mtpd distill`: trains heads for a model and measures them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mtpd.cli.arguments import Debug, RecipeArguments, Untrusted, split_arguments
from mtpd.cli.errors import disk_full, unexpected
from mtpd.cli.terminal import quiet_libraries
from mtpd.errors import MtpdError, UserError
from mtpd.recipe import Recipe, load_recipe


def distill(
    context: typer.Context,
    arguments: RecipeArguments = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the plan (parameters, tokens, memory, disk, steps) and stop."),
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over: what an earlier run left in the run directory is deleted.")
    ] = False,
    resume: Annotated[
        str,
        typer.Option(
            "--resume",
            metavar="auto | CHECKPOINT",
            help="What training goes on from: the newest whole checkpoint, or the one of that name (checkpoint-200); "
            "later ones are deleted then.",
        ),
    ] = "auto",
    untrusted: Untrusted = False,
    debug: Debug = False,
) -> None:
    """Train MTP heads for a model by self-distillation, and measure what they gain.

    The same command resumes an interrupted run from its run directory. Ctrl-C and SIGTERM save a checkpoint after the
    step and exit with 130 and 143; a second one exits at once.

    Examples:

        mtpd distill recipes/demo.yaml

        mtpd distill recipes/demo.yaml model=./my-checkpoint heads.depth=4

        mtpd distill model=Qwen/Qwen3-0.6B output=runs/qwen --dry-run
    """
    path, overrides = split_arguments(arguments)
    if fresh and resume != "auto":
        raise UserError(f"--resume: {resume} does nothing with --fresh, which starts over; accepted: one of them")
    recipe = load_recipe(path, overrides, untrusted=untrusted)
    with quiet_libraries(debug=debug or bool(context.find_root().params.get("debug"))):
        if dry_run:
            typer.echo(_plan(recipe))
        else:
            typer.echo(f"done: {_run(recipe, fresh=fresh, resume=resume)}")


def _plan(recipe: Recipe) -> str:
    from mtpd.distill.plan import plan  # brings in torch

    return plan(recipe).table()


def _run(recipe: Recipe, *, fresh: bool, resume: str) -> Path:
    from mtpd.distill.run import distill as run  # brings in torch

    try:
        return run(recipe, fresh=fresh, resume=resume)
    except Exception as error:
        if full := disk_full(error, recipe.output):
            raise full from error
        if isinstance(error, EOFError | BrokenPipeError):
            # From a cut-off file or a lost worker; Typer would take them for the end of its own input or output.
            raise MtpdError(unexpected(error)) from error
        raise
