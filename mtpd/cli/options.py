"""Options that all commands take, and the reading of `[RECIPE] [KEY=VALUE ...]`."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal

import typer

from mtpd.errors import UserError

RecipeArguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RECIPE | KEY=VALUE",
        help="A recipe: a YAML file, or the name of one that comes with mtpd (mtpd recipe ls). After it, keys of the "
        "recipe with other values, such as heads.depth=2. Without a recipe, model=... is needed.",
        show_default=False,
    ),
]

Debug = Annotated[
    bool,
    # `main` reads it from the command line itself: errors also happen before any option is parsed.
    typer.Option("--debug", help="Show the full traceback of an error.", show_default=False),
]

Untrusted = Annotated[
    bool,
    typer.Option(
        "--untrusted",
        help="For a recipe file from somebody else: refuse paths in it that lead out of this folder, and keys that run "
        "code or send data away. Keys on the command line are not limited.",
    ),
]

UntrustedRun = Annotated[
    bool,
    typer.Option("--untrusted", help="For a run from somebody else: do not run Python code that comes with its model."),
]
LauncherOption = Annotated[
    Literal["deepspeed", "torchrun"] | None,
    typer.Option(
        "--launcher", help="Share the work among several processes, which this program starts.", show_default=False
    ),
]
Processes = Annotated[
    int | None,
    typer.Option(
        "--processes",
        min=1,
        help="With --launcher: how many processes on each machine. Default: one for each accelerator.",
        show_default=False,
    ),
]
Nodes = Annotated[
    Path | None,
    typer.Option(
        "--nodes",
        metavar="HOSTFILE",
        help="With --launcher deepspeed: a file with one line `NAME slots=COUNT` for each machine. All machines must "
        "see the same file system.",
        show_default=False,
    ),
]
LAUNCH_OPTIONS = frozenset({"launcher", "processes", "nodes"})
DRY_RUN_OPTIONS = frozenset({"dry_run", "devices", "device_memory"})
"""Names of parameters, as a command has them."""


def check_launch_options(launcher: str | None, processes: int | None, nodes: Path | None) -> None:
    """Raises UserError for an option of a launcher that is not asked for."""
    for name, value in {"--processes": processes, "--nodes": nodes}.items():
        if value is not None and launcher is None:
            raise UserError(f"{name}: {value} needs --launcher; accepted: deepspeed, torchrun")


def given_words(context: typer.Context, *, without: Collection[str]) -> list[str]:
    """The words of a command as it was called, for another process: its name, arguments and options.

    Args:
        without: parameters that are left out.
    """
    arguments: list[str] = []
    options: list[str] = []
    for parameter in context.command.params:
        value = context.params.get(str(parameter.name))
        if parameter.name in without or value is None or value is False:
            continue
        if parameter.param_type_name == "argument":
            arguments += value if isinstance(value, list | tuple) else [str(value)]
        elif value is True:
            options.append(parameter.opts[0])
        else:
            options.append(f"{parameter.opts[0]}={value}")
    return [str(context.command.name), *arguments, *options]


def split_arguments(arguments: list[str] | None) -> tuple[str | None, list[str]]:
    """The recipe file or name, if the first word is one, and the overrides.

    Raises:
        UserError: a word after the first is no `key=value`.
    """
    words = list(arguments or [])
    path = words.pop(0) if words and ("=" not in words[0] or Path(words[0]).is_file()) else None
    for word in words:
        if "=" not in word:
            raise UserError(
                f"argument {word!r}: is not accepted; accepted: one recipe file or name, then key=value overrides "
                "without spaces"
            )
    return path, words
