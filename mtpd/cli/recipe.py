"""`mtpd recipe`: lists, copies, shows, checks and documents recipes. Nothing here loads a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mtpd.cli.options import Debug, RecipeArguments, Untrusted, split_arguments
from mtpd.errors import UserError
from mtpd.files import write_whole
from mtpd.recipe import dump, load_recipe, recipe_schema
from mtpd.recipe.shipped import about, find_recipe, shipped_folder, shipped_names
from mtpd.recipe.trackers import check_trackers
from mtpd.run.check import check_file

app = typer.Typer(
    no_args_is_help=True, help="List, copy, show, check or document recipes.\n\nExample:\n\n    mtpd recipe ls"
)


@app.command()
def ls(debug: Debug = False) -> None:
    """List the recipes that come with mtpd. Their names are accepted wherever a recipe file is.

    Example:

        mtpd recipe ls
    """
    names = shipped_names()
    width = max(map(len, names))
    for name in names:
        typer.echo(f"{name:<{width}}  {about(shipped_folder() / f'{name}.yaml')}")


@app.command()
def copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A recipe that mtpd recipe ls lists.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The file to write, which must not exist. Default: NAME.yaml here."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a recipe that comes with mtpd as a file of your own.

    Example:

        mtpd recipe copy demo
    """
    if name not in shipped_names():
        raise UserError(f"recipe {name}: is none of mtpd's; accepted: {', '.join(shipped_names())}")
    file = output or Path(f"{Path(name).name}.yaml")
    if file.exists():
        raise UserError(f"{file}: exists, and is not overwritten; choose another name with --output")
    check_file(file, key="--output")
    write_whole(file, find_recipe(name).read_bytes())
    typer.echo(f"written: {file}")


@app.command()
def show(arguments: RecipeArguments = None, debug: Debug = False) -> None:
    """Print a recipe as YAML with all its keys: your changes and the defaults filled in.

    Example:

        mtpd recipe show demo heads.depth=2
    """
    typer.echo(dump(load_recipe(*split_arguments(arguments))), nl=False)


@app.command()
def check(arguments: RecipeArguments = None, untrusted: Untrusted = False, debug: Debug = False) -> None:
    """Say in one line whether a recipe is accepted; exit with 2 if it is not.

    Example:

        mtpd recipe check demo heads.depth=2
    """
    path, overrides = split_arguments(arguments)
    recipe = load_recipe(path, overrides, untrusted=untrusted)
    check_trackers(recipe.train.report_to)
    typer.echo(f"OK: {path or 'recipe'} (model {recipe.model}, output {recipe.output})")


@app.command()
def schema(debug: Debug = False) -> None:
    """Print the JSON schema of recipes: keys that people change, the others, and what each accepts and does.

    Example:

        mtpd recipe schema > recipe.schema.json
    """
    typer.echo(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))
