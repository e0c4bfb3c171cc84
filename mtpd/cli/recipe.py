"""`mtpd recipe`: shows, checks and documents recipes. Nothing here loads a model."""

from __future__ import annotations

import json

import typer

from mtpd.cli.options import Debug, RecipeArguments, Untrusted, split_arguments
from mtpd.recipe import Recipe, dump, load_recipe

app = typer.Typer(no_args_is_help=True, help="Show, check or document recipes.")


@app.command()
def show(arguments: RecipeArguments = None, debug: Debug = False) -> None:
    """Print the whole recipe as YAML, with overrides and defaults filled in.

    Example:

        mtpd recipe show recipes/demo.yaml heads.depth=2
    """
    typer.echo(dump(load_recipe(*split_arguments(arguments))), nl=False)


@app.command()
def check(arguments: RecipeArguments = None, untrusted: Untrusted = False, debug: Debug = False) -> None:
    """Say in one line whether a recipe is accepted; exit with 2 if it is not.

    Example:

        mtpd recipe check recipes/demo.yaml heads.depth=2
    """
    path, overrides = split_arguments(arguments)
    recipe = load_recipe(path, overrides, untrusted=untrusted)
    typer.echo(f"OK: {path or 'recipe'} (model {recipe.model}, output {recipe.output})")


@app.command()
def schema(debug: Debug = False) -> None:
    """Print the JSON schema of recipes: every key, its default, what it accepts and what it does.

    Example:

        mtpd recipe schema > recipe.schema.json
    """
    typer.echo(json.dumps(Recipe.model_json_schema(), indent=2, ensure_ascii=False))
