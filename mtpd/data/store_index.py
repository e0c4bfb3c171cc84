"""The index of a store of hidden states: which rows are in which of its files, and what the states belong to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtpd.errors import MtpdError
from mtpd.files import intact, megabytes, sealed, write_whole

INDEX = "index.json"
SCHEMA = 2
MARGIN = 64 * 2**20
"""Bytes that stay free on the disk for the other files of a run."""


def refuse_stale(directory: Path, found: dict[str, Any] | None, wanted: Mapping[str, Any]) -> None:
    """Raises MtpdError if a directory has an index that cannot be read, or states of something else."""
    way_out = "delete the directory, or name another in data.hidden_states"
    if found is None:
        if any(directory.glob("hidden-*.safetensors")) and (directory / INDEX).exists():
            raise MtpdError(f"{directory / INDEX}: not readable as the index of hidden states; {way_out}")
        return
    names = dict.fromkeys([*wanted["key"], *found["key"]])
    other = [name for name in names if found["key"].get(name) != wanted["key"].get(name)]
    other += [name for name in ("row_length", "hidden_size", "dtype") if found.get(name) != wanted[name]]
    if other:
        raise MtpdError(f"{directory}: these hidden states are of another run: other {', '.join(other)}; {way_out}")


def merge_indices(directory: Path, wanted: Mapping[str, Any]) -> None:
    """Takes the shards that ranks have written into the index, and deletes their own indices then."""
    parts = sorted(directory.glob("index.rank-*.json"))
    if not parts:
        return
    shards: dict[str, Any] = {}
    for path in (directory / INDEX, *parts):
        found = read_index(path)
        refuse_stale(directory, found, wanted)
        shards |= {} if found is None else found["shards"]
    write_whole(directory / INDEX, json.dumps(sealed({**wanted, "shards": shards})))
    for part in parts:
        part.unlink()


def read_index(path: Path) -> dict[str, Any] | None:
    """Reads an index; None where there is none, or a damaged one."""
    try:
        index = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    whole = isinstance(index, dict) and index.get("schema") == SCHEMA and intact(index)
    return index if whole else None


def check_room(directory: Path, needed: int) -> None:
    """Raises MtpdError if the disk has no room for so many bytes."""
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if needed and needed + MARGIN > free:
        raise MtpdError(
            f"{directory}: the hidden states need {megabytes(needed)}, {megabytes(MARGIN)} are kept for the rest of "
            f"the run, and the disk has {megabytes(free)} free; "
            "set data.hidden_states to recompute, or to a directory on another disk"
        )
