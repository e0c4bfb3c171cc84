"""The trunk's hidden states of all rows, on disk, so that the trunk runs once.

The trunk is frozen, so h_t of a row never changes, and everything that training needs follows from it:
a store of h_t costs 2 D bytes a token in bfloat16, where logits would cost thirty times that.

A store is a directory: `hidden-00000.safetensors`, ... with a tensor `hidden` [n, T, D] each, and
`index.json` with the shapes, the key that says what the states belong to, and the SHA-256 of each
shard. The index is written after each shard, so that an interrupted build goes on where it stopped.

Shape legend: N rows, T positions, D hidden size.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from mtpd.data.packing import PackedRows, collate
from mtpd.errors import MtpdError
from mtpd.files import fingerprint, fingerprint_file, write_whole
from mtpd.trunk import Trunk

INDEX = "index.json"
SHARD_ROWS = 64
MARGIN = 64 * 2**20
"""Bytes that stay free on the disk for the other files of a run."""


class HiddenStore:
    """Hidden states by row: `store[i]` is [T, D] in the trunk's number format, read from a mapped file."""

    def __init__(self, directory: Path, index: dict[str, Any]) -> None:
        self.directory = directory
        self.index = index
        self._slices: dict[str, Any] = {}

    @classmethod
    def build(
        cls,
        trunk: Trunk,
        rows: PackedRows,
        directory: str | Path,
        *,
        key: str,
        batch_rows: int = 8,
        progress: bool = True,
    ) -> HiddenStore:
        """Runs the trunk over all rows, or over those that an earlier build of the same key has not reached.

        Args:
            key: fingerprint of trunk and rows; a store of another key in `directory` is replaced.
            batch_rows: rows a forward pass of the trunk.

        Raises:
            MtpdError: the disk has no room; the message says how much is needed.
        """
        directory = Path(directory)
        length = len(rows[0]["input_ids"])
        wanted = {
            "schema": 1,
            "key": key,
            "rows": len(rows),
            "row_length": length,
            "hidden_size": trunk.hidden_size,
            "dtype": str(trunk.dtype).removeprefix("torch."),
            "shard_rows": SHARD_ROWS,
        }
        index = _read_index(directory)
        if index is None or any(index.get(name) != value for name, value in wanted.items()):
            clear(directory)
            index = {**wanted, "shards": {}}
        shards: dict[str, str] = index["shards"]
        for name in [name for name, digest in shards.items() if not _intact(directory / name, digest)]:
            del shards[name]
        count = -(-len(rows) // SHARD_ROWS)
        numbers = [number for number in range(count) if _shard_name(number) not in shards]
        missing = sum(min(SHARD_ROWS, len(rows) - number * SHARD_ROWS) for number in numbers)
        _check_room(directory, missing * length * trunk.hidden_size * trunk.dtype.itemsize)

        bar = tqdm(
            total=missing * length,
            desc="hidden states",
            unit="token",
            unit_scale=True,
            disable=not (progress and missing),
        )
        with bar:
            for number in numbers:
                name, start = _shard_name(number), number * SHARD_ROWS
                stop = min(start + SHARD_ROWS, len(rows))
                parts = []
                for first in range(start, stop, batch_rows):
                    batch = collate([rows[row] for row in range(first, min(first + batch_rows, stop))])
                    hidden = trunk.hidden(
                        batch["input_ids"].to(trunk.device), position_ids=batch["position_ids"].to(trunk.device)
                    )
                    parts.append(hidden.to("cpu", trunk.dtype))
                    bar.update(batch["input_ids"].numel())
                content = save({"hidden": torch.cat(parts).contiguous()})
                write_whole(directory / name, content)
                shards[name] = fingerprint(content)
                write_whole(directory / INDEX, json.dumps(index, indent=1))
        return cls(directory, index)

    @classmethod
    def open(cls, directory: str | Path, *, key: str) -> HiddenStore:
        """Opens a finished store, and reads it once to compare each shard with its SHA-256.

        Raises:
            MtpdError: there is none, it belongs to another trunk or other rows, or it is damaged or unfinished.
        """
        directory = Path(directory)
        index = _read_index(directory)
        way_out = "delete the directory, it is built again from the trunk"
        if index is None:
            raise MtpdError(f"{directory}: no store of hidden states is here")
        if index["key"] != key:
            raise MtpdError(f"{directory}: these hidden states belong to another trunk or other rows; {way_out}")
        for number in range(-(-index["rows"] // index["shard_rows"])):
            name = _shard_name(number)
            if name not in index["shards"]:
                raise MtpdError(f"{directory}: the store of hidden states is not finished: {name} is missing")
            if not _intact(directory / name, index["shards"][name]):
                raise MtpdError(f"{directory / name}: damaged (its SHA-256 is not that of the index); {way_out}")
        return cls(directory, index)

    def __len__(self) -> int:
        return int(self.index["rows"])

    def __getitem__(self, row: int) -> Tensor:
        """Hidden states [T, D] of a row."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        number, place = divmod(row, self.index["shard_rows"])
        return self._slice(_shard_name(number))[place]

    def __getstate__(self) -> dict[str, Any]:
        # Mapped files do not travel to other processes; each one maps its own.
        return {**self.__dict__, "_slices": {}}

    def _slice(self, name: str) -> Any:
        if name not in self._slices:
            self._slices[name] = safe_open(self.directory / name, framework="pt").get_slice("hidden")
        return self._slices[name]


def clear(directory: Path) -> None:
    """Removes the files of a store, the index first, and nothing else."""
    (directory / INDEX).unlink(missing_ok=True)
    for path in directory.glob("hidden-*.safetensors"):
        path.unlink()


def _shard_name(number: int) -> str:
    return f"hidden-{number:05d}.safetensors"


def _intact(path: Path, digest: str) -> bool:
    return path.is_file() and fingerprint_file(path) == digest


def _read_index(directory: Path) -> dict[str, Any] | None:
    try:
        index = json.loads((directory / INDEX).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return index if isinstance(index, dict) and index.get("schema") == 1 else None


def _check_room(directory: Path, needed: int) -> None:
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if needed + MARGIN > free:
        raise MtpdError(
            f"{directory}: the hidden states need {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; "
            "set data.hidden_states=recompute, or output to another disk"
        )
