"""Checkpoints of a training: whole or none, checked before they are read, the newest ones kept.

A checkpoint is a folder `checkpoint-STEP` in the run directory. Its last file, `complete.json`, has the SHA-256 of
every other one; a folder without it was interrupted and is none. Older checkpoints are deleted after that.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtpd.errors import MtpdError, UserError
from mtpd.files import fingerprint_file, intact, sealed, sync, write_whole, writing

logger = logging.getLogger(__name__)

COMPLETE = "complete.json"
"""Written last into a checkpoint."""
STATE = "trainer_state.json"
"""transformers' own: the step, the best metric, what callbacks keep."""


def folder_of(directory: Path, step: int) -> Path:
    """Gives the folder in which transformers writes the checkpoint of a step."""
    return directory / f"checkpoint-{step}"


def complete(folder: Path, step: int) -> None:
    """Makes the files of a checkpoint durable, and marks it as whole.

    Raises:
        MtpdError: the disk is full or fails.
    """
    sums: dict[str, str] = {}
    with writing(folder):
        for file in _files(folder):
            sync(file)
            sums[file.relative_to(folder).as_posix()] = fingerprint_file(file)
            sync(file.parent)
        sync(folder.parent)
    write_whole(folder / COMPLETE, json.dumps(sealed({"step": step, "files": sums}), indent=1) + "\n")


def damage(folder: Path) -> str | None:
    """Says what is wrong with a checkpoint that was whole once, and names the file; None if nothing is.

    Reads all of it.
    """
    try:
        content = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        sums = content["files"]
        if not intact(content) or not isinstance(sums, dict):
            raise ValueError("its SHA-256 is not that of its content")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{folder / COMPLETE} is damaged ({error})"
    for name, digest in sums.items():
        file = folder / name
        # What is loaded lies in the run directory itself: a link could lead to a pickle of somebody else.
        if file.is_symlink() or file.parent.resolve() != folder.resolve() / Path(name).parent:
            return f"{file} is a link, or lies elsewhere"
        if not file.is_file():
            return f"{file} is missing"
        if fingerprint_file(file) != digest:
            return f"{file} is damaged: its SHA-256 is not the one in {COMPLETE}"
    return None


def check(folder: Path) -> None:
    """Raises MtpdError if a checkpoint is damaged."""
    if found := damage(folder):
        raise MtpdError(f"{found}; `--resume` with an older checkpoint goes on from there, `--fresh` starts over")


def last_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint that is whole, and whose best one is; None where training has to begin.

    Checkpoints that are damaged are left out with a warning: what they lost is trained again.
    """
    for step in sorted(_steps(directory), reverse=True):
        folder = folder_of(directory, step)
        found = damage(folder)
        best = None if found else best_step(folder)
        if found is None and best is not None and best != step:
            # The heads that are kept in the end are those of the best checkpoint.
            found = damage(folder_of(directory, best))
        if found is None:
            return folder
        logger.warning("%s; going on from what was saved before it", found)
    return None


def named_checkpoint(directory: Path, name: str, *, whole: bool = True) -> Path:
    """The checkpoint that a user names, by its folder or the name of that.

    Args:
        whole: whether to read all of it, to see that it is not damaged.

    Raises:
        UserError: it is none of this run's, or damaged.
    """
    known = [folder_of(directory, step).name for step in sorted(_steps(directory))]
    given = Path(name)
    folder = directory / given if given.name == name else given
    accepted = f"accepted: auto, {', '.join(known)}" if known else "accepted: auto (the run has no whole checkpoint)"
    if folder.name not in known or folder.resolve() != directory.resolve() / folder.name:
        raise UserError(f"--resume: {name} is no whole checkpoint of {directory}; {accepted}")
    folder = directory / folder.name
    if not whole:
        return folder
    best = None if damage(folder) else best_step(folder)
    if found := damage(folder) or (damage(folder_of(directory, best)) if best is not None else None):
        raise UserError(f"--resume: {found}; {accepted}")
    return folder


def discard_after(directory: Path, step: int) -> None:
    """Deletes the checkpoints of later steps, so that none of them is gone on from."""
    for later in [found for found in _steps(directory) if found > step]:
        discard(folder_of(directory, later))


def rotate(directory: Path, *, keep: int | None, best: int | None) -> None:
    """Deletes the oldest checkpoints, and what interrupted saves left before the newest whole one.

    Args:
        keep: how many stay, the best one and the newest in any case; None for all.
        best: step of the best one.
    """
    whole = sorted(_steps(directory))
    if not whole:
        return
    stay = {whole[-1], *([best] if best in whole else [])}
    older = [step for step in reversed(whole) if step not in stay]
    stay.update(older if keep is None else older[: max(0, keep - len(stay))])
    for folder in directory.glob("checkpoint-*"):
        step = _step(folder)
        if step is not None and step < whole[-1] and step not in stay:
            discard(folder)


def discard(folder: Path) -> None:
    """Deletes a checkpoint, the mark that it is whole first."""
    (folder / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def best_step(folder: Path) -> int | None:
    """Step of the best checkpoint so far, as a whole one knows it."""
    return _state(folder).get("best_global_step")


def ended(folder: Path) -> bool:
    """Whether the training had come to its end at this checkpoint: its last step, or no patience left."""
    control = _state(folder).get("stateful_callbacks", {}).get("TrainerControl", {})
    return bool(control.get("args", {}).get("should_training_stop", False))


def _state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return state


def _steps(directory: Path) -> Iterator[int]:
    for folder in directory.glob("checkpoint-*"):
        step = _step(folder)
        if step is not None and (folder / COMPLETE).is_file():
            yield step


def _step(folder: Path) -> int | None:
    digits = folder.name.removeprefix("checkpoint-")
    return int(digits) if digits.isdecimal() and folder.name == f"checkpoint-{int(digits)}" else None


def _files(folder: Path) -> list[Path]:
    """All files of a checkpoint but the mark, those of sub-folders too."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / COMPLETE)
