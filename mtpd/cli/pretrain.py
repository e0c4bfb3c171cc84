"""`mtpd pretrain`: trains a causal LM from scratch, with parallel heads beside it if wanted."""

from __future__ import annotations

import typer

from mtpd.cli.kept import RESUMES, keeping
from mtpd.cli.options import Debug, RecipeArguments, Untrusted, split_arguments
from mtpd.cli.terminal import quiet_libraries
from mtpd.recipe import load_pretrain_recipe
from mtpd.run.check import check_pretrain_recipe


def pretrain(
    context: typer.Context, arguments: RecipeArguments = None, untrusted: Untrusted = False, debug: Debug = False
) -> None:
    """Train a causal LM from scratch: a configuration in, a checkpoint out.

    The same command resumes an interrupted run from its run directory.

    Examples:

        mtpd pretrain bytes-code

        mtpd pretrain bytes-code train.max_steps=20 output=runs/try
    """
    path, overrides = split_arguments(arguments)
    recipe = load_pretrain_recipe(path, overrides, untrusted=untrusted)
    check_pretrain_recipe(recipe)
    with quiet_libraries(debug=debug or bool(context.find_root().params.get("debug"))):
        from mtpd.pretrain.pretrain import pretrain as run  # brings in torch

        with keeping(RESUMES):
            typer.echo(f"done: {run(recipe)}")
