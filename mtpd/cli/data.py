"""`mtpd data`: what training reads beside its recipe, made ahead of it; prompts for others to answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mtpd.cli.errors import disk_full
from mtpd.cli.kept import KEPT_RESPONSES, RESUMES, keeping
from mtpd.cli.options import Debug, RecipeArguments, Untrusted, split_arguments
from mtpd.cli.terminal import quiet_libraries
from mtpd.errors import UserError
from mtpd.recipe import load_recipe
from mtpd.run.check import check_file, check_recipe

app = typer.Typer(
    no_args_is_help=True,
    help="Prepare a training: write its prompts, compute its hidden states, or its draft vocabulary.\n\n"
    "Example:\n\n    mtpd data store demo",
)


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
    if not recipe.data.on_disk:
        raise UserError(
            f"data.hidden_states: {recipe.data.hidden_states} stores nothing on the disk; accepted: disk, or a path"
        )
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
    size = recipe.heads.vocabulary
    if not isinstance(size, int) or size == 0:
        raise UserError(f"heads.vocabulary: {size} leaves nothing to count; accepted: how many tokens are kept")
    check_recipe(recipe)
    check_file(out, key="--out")
    with quiet_libraries(debug=debug or bool(context.find_root().params.get("debug"))):
        from mtpd.parallel import ranks  # brings in torch
        from mtpd.run.prepare_data import count_vocabulary

        with keeping(KEPT_RESPONSES):
            count, share = count_vocabulary(recipe, out)
        if ranks.speaks():
            typer.echo(f"done: {out}, {count:,} tokens that are {share:.2%} of those in the training responses")


@app.command()
def prompts(
    context: typer.Context,
    arguments: RecipeArguments = None,
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("prompts.jsonl"),
    untrusted: Untrusted = False,
    debug: Debug = False,
) -> None:
    """Write all prompts of a recipe with their token ids and sampling settings, for another program to answer.

    One JSON object a line, of those that are trained on and those that are measured on. The model's weights are not
    needed. The program adds response_ids to each line, and data.responses takes the file. With a file there already,
    the prompts that it lacks are written, later turns of conversations among them.

    Example:

        mtpd data prompts demo --out prompts.jsonl
    """
    path, overrides = split_arguments(arguments)
    recipe = load_recipe(path, overrides, untrusted=untrusted)
    check_recipe(recipe, weights=False)
    check_file(out, key="--out")
    with quiet_libraries(debug=debug or bool(context.find_root().params.get("debug"))):
        from mtpd.run.write_prompts import write_prompts  # brings in torch

        counts = write_prompts(recipe, out)
        typer.echo(f"done: {out}, {counts['training']:,} prompts to train on and {counts['measuring']:,} to measure on")
