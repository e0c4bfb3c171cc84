"""What commands about checkpoints look at before torch is imported, so that a slip is answered at once."""

from __future__ import annotations

from pathlib import Path

import typer

from mtpd.errors import UserError
from mtpd.run.check import check_folder


def known_family(name: str | None) -> str | None:
    """The name of a family of heads, or None.

    Raises:
        typer.BadParameter: there is no such family.
    """
    from mtpd.formats.families import FAMILIES

    if name is not None and name not in FAMILIES:
        raise typer.BadParameter(f"{name} is not known; accepted: {', '.join(FAMILIES)}")
    return name


def new_output(path: Path) -> Path:
    """A path at which a directory can be written.

    Raises:
        UserError: something is there already, or a directory above it is none or cannot be written to.
    """
    if path.exists() or path.is_symlink():
        raise UserError(f"--output: {path} exists; choose another output, or delete it first")
    check_folder(path, key="--output")
    return path


def export_directory(path: Path) -> Path:
    """A directory that `mtpd export` wrote.

    Raises:
        UserError: it is something else.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; give the output of mtpd export")
    if not (path / "mtpd.json").is_file():
        run = (path / "recipe.yaml").is_file()
        told = (
            f"is a run; export it first: mtpd export {path} --to transformers -o OUT"
            if run
            else ("has no mtpd.json, so it is no export of mtpd; give the output of mtpd export")
        )
        raise UserError(f"{path}: {told}")
    return path
