"""`mtpd distill`: trains heads for a model and measures them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mtpd.cli.errors import disk_full, unexpected
from mtpd.cli.kept import RESUMES, RESUMES_WITHOUT_FRESH, keeping
from mtpd.cli.options import (
    DRY_RUN_OPTIONS,
    LAUNCH_OPTIONS,
    Debug,
    LauncherOption,
    Nodes,
    Processes,
    RecipeArguments,
    Untrusted,
    check_launch_options,
    given_words,
    split_arguments,
)
from mtpd.cli.terminal import quiet_libraries
from mtpd.errors import MtpdError, UserError
from mtpd.parallel.launch import launch
from mtpd.recipe import Recipe, load_recipe
from mtpd.run.check import check_recipe
from mtpd.train.checkpoints import named_checkpoint


def distill(
    context: typer.Context,
    arguments: RecipeArguments = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the plan (parameters, tokens, memory, disk, steps) and stop."),
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over: delete what an earlier run left in the run directory.")
    ] = False,
    resume: Annotated[
        str,
        typer.Option(
            "--resume",
            metavar="auto | CHECKPOINT",
            help="Where an interrupted training continues: auto is its newest complete checkpoint; or name one, such "
            "as checkpoint-200, and later ones are deleted.",
        ),
    ] = "auto",
    untrusted: Untrusted = False,
    launcher: LauncherOption = None,
    processes: Processes = None,
    nodes: Nodes = None,
    devices: Annotated[
        int | None,
        typer.Option(
            "--devices",
            min=1,
            help="With --dry-run: how many devices to plan for. Default: those of this machine.",
            show_default=False,
        ),
    ] = None,
    device_memory: Annotated[
        float | None,
        typer.Option(
            "--device-memory",
            min=0.001,
            help="With --dry-run: GB of memory of each device. Default: that of this machine.",
            show_default=False,
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Train MTP heads for a model by self-distillation, and measure what they gain.

    The same command resumes an interrupted run from its run directory, also with another number of processes.

    Ctrl-C and SIGTERM save a checkpoint after the step, and exit with 130 and 143. A second one exits at once.

    Examples:

        mtpd distill demo

        mtpd distill demo model=./my-checkpoint heads.depth=4

        mtpd distill model=Qwen/Qwen3-0.6B output=runs/qwen --dry-run

        mtpd distill llama-3.1-8b --dry-run --devices 8 --device-memory 80

        mtpd distill llama-3.1-8b train.deepspeed=zero2 --launcher deepspeed --processes 8
    """
    path, overrides = split_arguments(arguments)
    if fresh and resume != "auto":
        raise UserError(f"--resume: {resume} does nothing with --fresh, which starts over; accepted: one of them")
    recipe = load_recipe(path, overrides, untrusted=untrusted)
    _check_options(launcher, processes, nodes, devices, device_memory, dry_run=dry_run)
    check_recipe(recipe, weights=not dry_run)
    if resume != "auto":
        named_checkpoint(recipe.output, resume, whole=False)
    if launcher is not None and not dry_run:
        words = given_words(context, without=LAUNCH_OPTIONS | DRY_RUN_OPTIONS)
        with keeping(RESUMES_WITHOUT_FRESH if fresh else RESUMES):
            raise typer.Exit(launch(launcher, words, processes=processes, nodes=nodes))
    with quiet_libraries(debug=debug or bool(context.find_root().params.get("debug"))):
        if dry_run:
            typer.echo(_plan(recipe, devices=devices or processes, memory=device_memory))
            return
        with keeping(RESUMES_WITHOUT_FRESH if fresh else RESUMES):
            _run(recipe, fresh=fresh, resume=resume)


def _check_options(
    launcher: str | None,
    processes: int | None,
    nodes: Path | None,
    devices: int | None,
    device_memory: float | None,
    *,
    dry_run: bool,
) -> None:
    """Raises UserError for an option that nothing would read."""
    check_launch_options(launcher, processes, nodes)
    planning: dict[str, object] = {"--devices": devices, "--device-memory": device_memory}
    for name, value in planning.items():
        if value is not None and not dry_run:
            raise UserError(f"{name}: {value} is only for a plan; accepted: with --dry-run")


def _plan(recipe: Recipe, *, devices: int | None, memory: float | None) -> str:
    from mtpd.plan.plan import plan  # brings in torch

    return plan(recipe, devices=devices, device_memory=memory).table()


def _run(recipe: Recipe, *, fresh: bool, resume: str) -> None:
    from mtpd.parallel import ranks  # brings in torch
    from mtpd.run.distill import distill as run

    try:
        path = run(recipe, fresh=fresh, resume=resume)
        if ranks.speaks():
            typer.echo(f"done: {path}")
    except Exception as error:
        if full := disk_full(error, recipe.output):
            raise full from error
        if isinstance(error, EOFError | BrokenPipeError):
            # From a cut-off file or a lost worker; Typer would take them for the end of its own input or output.
            raise MtpdError(unexpected(error)) from error
        raise
