"""`mtpd data`: what training reads beside its recipe, made ahead of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mtpd.cli.errors import disk_full
from mtpd.cli.kept import KEPT_RESPONSES, RESUMES, keeping
from mtpd.cli.options import Debug, RecipeArguments, Untrusted, split_arguments
from mtpd.cli.terminal import quiet_libraries
from mtpd.recipe import load_recipe
from mtpd.run.check import check_file, check_recipe

app = typer.Typer(no_args_is_help=True, help="Compute the hidden states or the draft vocabulary of a run before it.")


@app.command()
def store(
    context: typer.Context, arguments: RecipeArguments = None, untrusted: Untrusted = False, debug: Debug = False
) -> None:
    """Compute the model's hidden states of all training rows, so that training does not run the model.

    They go to the directory that data.hidden_states names, or into the run directory. The same command resumes an
    interrupted one.

    Examples:

        mtpd data store demo

        mtpd data store demo data.hidden_states=/disk/states
    """
    path, overrides = split_arguments(arguments)
    recipe = load_recipe(path, overrides, untrusted=untrusted)
    check_recipe(recipe)
    with quiet_libraries(debug=debug or bool(context.find_root().params.get("debug"))):
        from mtpd.parallel import ranks  # brings in torch
        from mtpd.run.prepare_data import store_hidden_states

        try:
            with keeping(RESUMES):
                directory = store_hidden_states(recipe)
            if ranks.speaks():
                typer.echo(f"done: {directory}")
        except Exception as error:
            if full := disk_full(error, Path(recipe.data.store or recipe.output)):
                raise full from error
            raise


@app.command()
def vocab(
    context: typer.Context,
    arguments: RecipeArguments = None,
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("vocabulary.json"),
    untrusted: Untrusted = False,
    debug: Debug = False,
) -> None:
    """Write a draft vocabulary: the most frequent tokens of the training responses, and the special ones.

    The number heads.vocabulary of the recipe says how many. In other runs, heads.vocabulary takes the file.

    Heads then train and draft over these tokens only. The text does not change.

    Example:

        mtpd data vocab demo heads.vocabulary=8192 --out demo-vocabulary.json
    """
    path, overrides = split_arguments(arguments)
    recipe = load_recipe(path, overrides, untrusted=untrusted)
    check_recipe(recipe)
    check_file(out, key="--out")
    with quiet_libraries(debug=debug or bool(context.find_root().params.get("debug"))):
        from mtpd.parallel import ranks  # brings in torch
        from mtpd.run.prepare_data import count_vocabulary

        with keeping(KEPT_RESPONSES):
            count, share = count_vocabulary(recipe, out)
        if ranks.speaks():
            typer.echo(f"done: {out}, {count:,} tokens that are {share:.2%} of those in the training responses")
