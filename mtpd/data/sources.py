"""Rows of prompts as they are stored: the built-in set, a JSONL file, or a `datasets` data set.

The hub's clients try each file five times over half a minute before they give up. `hub_access` asks
once and briefly first: a missing network becomes one clear line, and a cached copy is used at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants

from mtpd.data import stdlib
from mtpd.errors import UserError

Rows = Iterator[tuple[str, Any]]
"""Pairs of a place that messages name (file:line) and a row."""

BUILTIN = Path(__file__).parent / "builtin"
HELD_OUT = "heldout-"
OTHER = "other"
"""The file of prompts of other families than those that are trained on."""
BUILTIN_SETS = ("builtin", "builtin-held-out", "builtin-other")


def read(source: str, *, split: str, subset: str | None) -> Rows:
    """The rows of a source, as `mtpd.data.prompts.load_prompts` takes it.

    Raises:
        UserError: a missing file or data set, a line that is not JSON.
    """
    if source in BUILTIN_SETS:
        return _builtin_rows(source)
    if source in (stdlib.SOURCE, stdlib.HELD_OUT):
        return stdlib.pieces(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return _dataset_rows(str(path), split, subset, local=True)
    if at_hand(source):
        return _file_rows(path)
    return _dataset_rows(source, split, subset, local=False)


@cache
def hub_reachable() -> bool:
    """True when the hub answers within a few seconds, whatever the answer."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # of which library depends on the version of the hub's client
        return False
    return True


@contextmanager
def hub_access(*, needed: bool = True) -> Iterator[bool]:
    """Within it the hub's clients use only cached copies if the hub cannot be reached. Gives whether it can.

    Args:
        needed: False where nothing but local files is read; then the hub is not asked.
    """
    reachable = needed and hub_reachable()
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = not reachable
    try:
        yield reachable
    finally:
        constants.HF_HUB_OFFLINE = before


def at_hand(source: str) -> bool:
    """Whether a source is built in or a file (which may be missing), and so needs no `datasets` library."""
    path = Path(source).expanduser()
    looks_so = path.is_file() or path.suffix in (".jsonl", ".json") or source.startswith((".", "/", "~"))
    return source in (*BUILTIN_SETS, stdlib.SOURCE, stdlib.HELD_OUT) or (looks_so and not path.is_dir())


DATA = ("*.jsonl", "*.json", "*.csv", "*.tsv", "*.parquet", "*.arrow", "*.txt", "*.zip", "*.gz", "*.zst", "*.py")
"""Files that make a folder one that `datasets` reads."""
ACCEPTED = "accepted: builtin, a .jsonl file, a folder of data files, or a datasets id"
TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".txt", ".zip", ".gz")


def check_source(source: str, *, key: str, accepted: str = ACCEPTED) -> None:
    """Refuses a source that cannot be read, as far as a look at the file system tells.

    Args:
        key: of the recipe, named in messages.
        accepted: named in messages.

    Raises:
        UserError: a missing file, a file of another kind, or a folder without data.
    """
    path = Path(source).expanduser()
    if source in (*BUILTIN_SETS, stdlib.SOURCE, stdlib.HELD_OUT):
        return
    if path.is_dir():
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            raise UserError(
                f"{key}: {source} is what save_to_disk of datasets wrote, which is not read; write it with to_json as "
                "a .jsonl file"
            )
        if not any(True for pattern in DATA for _ in path.rglob(pattern)):
            raise UserError(f"{key}: {source} is a folder without data files; {accepted}")
    elif path.is_file():
        if path.suffix not in (".jsonl", ".json"):
            raise UserError(f"{key}: {source}: a file of prompts must be .jsonl, one JSON object a line")
        if not os.access(path, os.R_OK):
            raise UserError(f"{key}: {source}: cannot be read (no permission)")
    elif at_hand(source) or path.suffix in TABLES or source.count("/") > 1:
        raise UserError(f"{key}: {source}: no such file; {accepted}")


def _builtin_rows(source: str) -> Rows:
    for path in sorted(BUILTIN.glob("*.jsonl")):
        if _set_of(path) == source:
            yield from _file_rows(path)


def _set_of(path: Path) -> str:
    if path.name.startswith(HELD_OUT):
        return "builtin-held-out"
    return "builtin-other" if path.stem == OTHER else "builtin"


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(file:line, value) of each line that is not blank."""
    if path.suffix not in (".jsonl", ".json"):
        raise UserError(f"data.prompts: {path}: a file of prompts must be .jsonl, one JSON object a line")
    number = 0
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", json.loads(line)
    except FileNotFoundError as error:
        raise UserError(f"data.prompts: {path}: no such file") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{number}: not a JSON object on one line ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8 (after line {number})") from error
    except OSError as error:
        raise UserError(f"data.prompts: {path}: cannot read: {error.strerror}") from error


def _dataset_rows(source: str, split: str, subset: str | None, *, local: bool) -> Rows:
    from datasets import load_dataset  # takes seconds to import

    place = f"data.prompts: {source}" + (f" ({subset})" if subset else "")
    with hub_access(needed=not local) as reachable:
        try:
            rows = load_dataset(source, subset, split=split)
        except Exception as error:
            if not reachable and not local:
                raise UserError(
                    f"{place}: the hub cannot be reached and no copy is cached; without network these work: "
                    "builtin, a .jsonl file, or a local folder of data"
                ) from error
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"{place}, split {split}: {reason[0]}") from error
    for index, row in enumerate(rows):
        yield f"{source}[{split}] row {index}", row
