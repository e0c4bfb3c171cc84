"""What commands share: how `[RECIPE] [KEY=VALUE ...]` is read, and the options that all of them take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mtpd.errors import UserError

RecipeArguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RECIPE | KEY=VALUE",
        help="A recipe file (YAML), then overrides such as heads.depth=2. Without a file, model=... is needed.",
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
        help="The recipe file is somebody else's: paths in it stay inside this folder, and nothing in it runs code or "
        "sends data away. What the command line says is yours.",
    ),
]


def split_arguments(arguments: list[str] | None) -> tuple[Path | None, list[str]]:
    """The recipe file, if the first word is one, and the overrides.

    Raises:
        UserError: a word after the first is no `key=value`.
    """
    words = list(arguments or [])
    path = Path(words.pop(0)) if words and ("=" not in words[0] or Path(words[0]).is_file()) else None
    for word in words:
        if "=" not in word:
            raise UserError(f"argument {word!r}: is not accepted; accepted: one recipe file, then key=value overrides")
    return path, words
