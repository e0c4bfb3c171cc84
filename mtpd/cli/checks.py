"""Checks of commands about checkpoints that run before torch is imported, so that a slip is answered at once."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from mtpd.data.find_model import check_checkpoint
from mtpd.errors import UserError
from mtpd.finished_run import EXPORTED, RECIPE
from mtpd.formats.engines import ENGINES
from mtpd.heads import WEIGHTS, read_config
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


def known_checkpoint(name: str | None) -> str | None:
    """A checkpoint directory that is there, or what may be a hub id; or None.

    Raises:
        UserError: there is no such directory.
    """
    if name is not None:
        check_checkpoint(name)
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
    if not (path / EXPORTED).is_file():
        run = (path / RECIPE).is_file()
        told = (
            f"is a run; export it first: mtpd export {path} --to transformers -o OUT"
            if run
            else (f"has no {EXPORTED}, so it is no export of mtpd; give the output of mtpd export")
        )
        raise UserError(f"{path}: {told}")
    return path


def served_export(path: Path, *, engine: str, run: Path | None, drafts: int | None) -> None:
    """Looks at what `mtpd verify` is given.

    Raises:
        UserError: no export, one that the engine does not load, or no run with so many heads that it is of.
    """
    says = json.loads((export_directory(path) / EXPORTED).read_text(encoding="utf-8"))
    # Exports of earlier versions do not say it; then it is found out when the layout has been imported.
    able = [name for name in says.get("engines", [engine]) if name in ENGINES]
    if engine not in able:
        raise UserError(
            f"--engine {engine}: does not load layout {says['layout']}; accepted: {', '.join(able) or 'none'}"
        )
    heads = Path(run or says["run"]) / "heads"
    if not (heads / WEIGHTS).is_file():
        raise UserError(f"{heads}: holds no heads; give the run that was exported: --run RUN")
    if drafts is not None:
        read_config(heads).check_depth(drafts, key="--drafts")
