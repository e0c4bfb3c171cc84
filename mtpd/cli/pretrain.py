"""`mtpd pretrain`: trains a causal LM, new or a checkpoint, together with heads if wanted."""

from __future__ import annotations

from typing import Annotated

import typer

from mtpd.cli.kept import RESUMES, keeping
from mtpd.cli.options import (
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
from mtpd.parallel.launch import launch
from mtpd.recipe import load_pretrain_recipe
from mtpd.run.check import check_pretrain_recipe


def pretrain(
    context: typer.Context,
    arguments: RecipeArguments = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan (parameters, tokens, memory, arithmetic) and stop.")
    ] = False,
    untrusted: Untrusted = False,
    launcher: LauncherOption = None,
    processes: Processes = None,
    nodes: Nodes = None,
    debug: Debug = False,
) -> None:
    """Train a causal LM and MTP heads together: on text, from scratch or from a checkpoint.

    The same command resumes an interrupted run from its run directory, also with another number of processes.

    Examples:

        mtpd pretrain bytes-code

        mtpd pretrain bytes-code train.max_steps=20 output=runs/try

        mtpd pretrain papers/mtp-d

        mtpd pretrain papers/mtp-d-gpu --dry-run

        mtpd pretrain model=./checkpoint heads.depth=4 data.texts=texts.jsonl data.held_out=held-out.jsonl
    """
    path, overrides = split_arguments(arguments)
    recipe = load_pretrain_recipe(path, overrides, untrusted=untrusted)
    check_launch_options(launcher, processes, nodes)
    check_pretrain_recipe(recipe)
    if launcher is not None and not dry_run:
        words = given_words(context, without=LAUNCH_OPTIONS | {"dry_run"})
        with keeping(RESUMES):
            raise typer.Exit(launch(launcher, words, processes=processes, nodes=nodes))
    with quiet_libraries(debug=debug or bool(context.find_root().params.get("debug"))):
        if dry_run:
            from mtpd.plan.pretraining import pretraining_plan  # brings in torch

            typer.echo(pretraining_plan(recipe, processes=processes or 1))
            return
        from mtpd.parallel import ranks  # brings in torch
        from mtpd.pretrain.pretrain import pretrain as run

        with keeping(RESUMES):
            folder = run(recipe)
            if ranks.speaks():
                typer.echo(f"done: {folder}")
