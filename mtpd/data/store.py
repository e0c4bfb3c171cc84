"""The trunk's hidden states of training rows, kept so that the trunk runs over each row once.

The trunk is frozen, so h_t of a row never changes, and everything that training needs follows from it: h_t costs
2 D bytes a token in bfloat16, where logits would cost thirty times that. A store fills while it is used: a row that
it lacks is computed and kept (`with_hidden`), so that from the second epoch on the trunk does not run. `fill`
computes all rows ahead of that.

On disk a store is a directory: `hidden-00000.safetensors`, ... with a tensor `hidden` [n, T, D] each, and
`index.json` with the shapes, the fingerprints of what the states belong to, and for each shard its SHA-256 and its
rows, in the order in which they came. The index is written after each shard, so that what is interrupted goes on
from the last whole one.

Legend: N rows, B rows of a batch, T positions, D hidden size.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import psutil  # type: ignore[import-untyped]
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from mtpd.data.packing import PackedRows, collate
from mtpd.errors import MtpdError
from mtpd.files import fingerprint, fingerprint_file, fingerprint_json, intact, sealed, write_whole
from mtpd.trunk import Trunk

logger = logging.getLogger(__name__)

INDEX = "index.json"
SCHEMA = 2
SHARD_BYTES = 256 * 2**20
"""Size of a shard at most, and so of what is lost when a run is interrupted."""
MARGIN = 64 * 2**20
"""Bytes that stay free on the disk for the other files of a run."""


class HiddenStates(Protocol):
    """What keeps hidden states by the number of their row."""

    def __contains__(self, row: object) -> bool: ...

    def __getitem__(self, row: int) -> Tensor: ...

    def put(self, rows: Sequence[int], hidden_BTD: Tensor) -> None:
        """Keeps the states of these rows."""

    def flush(self) -> None:
        """Makes what was kept durable."""


def store_key(
    trunk: str, tokenizer: Any, prompts: Sequence[str], rows: PackedRows, *, before_last: int = 0
) -> dict[str, str]:
    """Fingerprints of all that the hidden states of packed rows depend on, by name.

    Args:
        trunk: fingerprint of the trunk.
        prompts: fingerprints of the prompts.
        before_last: how many layers stand above the states.
    """
    words = [sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map, tokenizer.chat_template]
    return {
        **({"layers above (heads.shared_layers)": str(before_last)} if before_last else {}),
        "trunk": trunk,
        "tokenizer": fingerprint_json(words),
        "prompts": fingerprint_json(sorted(prompts)),
        "packed rows": rows.fingerprint,
    }


def bytes_needed(rows: int, row_length: int, trunk: Trunk) -> int:
    """Size of the states of so many rows."""
    return rows * row_length * trunk.hidden_size * trunk.dtype.itemsize


class MemoryStore:
    """Hidden states in the memory of the process, in the trunk's number format.

    Raises:
        MtpdError: the memory has no room for all rows; the message says how much is needed.
    """

    def __init__(self, trunk: Trunk, rows: PackedRows) -> None:
        needed, free = bytes_needed(len(rows), rows.row_length, trunk), psutil.virtual_memory().available
        if needed > free:
            raise MtpdError(
                f"data.hidden_states: memory needs {needed / 1e9:.2f} GB for the hidden states, and "
                f"{free / 1e9:.2f} GB are free; accepted then: disk or recompute"
            )
        self._states: dict[int, Tensor] = {}
        self._dtype = trunk.dtype

    def __contains__(self, row: object) -> bool:
        return row in self._states

    def __getitem__(self, row: int) -> Tensor:
        return self._states[row]

    def put(self, rows: Sequence[int], hidden_BTD: Tensor) -> None:
        for row, hidden_TD in zip(rows, hidden_BTD.to("cpu", self._dtype), strict=True):
            self._states[row] = hidden_TD.clone()

    def flush(self) -> None:
        """Nothing: memory is not durable."""


class DiskStore:
    """Hidden states in a directory, in the trunk's number format, read from mapped files.

    Opening reads all shards once, to compare each with its SHA-256; a damaged one is dropped and its rows are
    computed again.

    Args:
        key: what the states belong to, by name (`store_key`).

    Raises:
        MtpdError: the directory has states that belong to something else, or the disk has no room for the rows
            that are missing; the message says how much is needed.
    """

    def __init__(self, directory: str | Path, trunk: Trunk, rows: PackedRows, *, key: Mapping[str, str]) -> None:
        self.directory = Path(directory)
        self._dtype = trunk.dtype
        wanted: dict[str, Any] = {
            "schema": SCHEMA,
            "key": dict(key),
            "rows": len(rows),
            "row_length": rows.row_length,
            "hidden_size": trunk.hidden_size,
            "dtype": str(trunk.dtype).removeprefix("torch."),
        }
        found = _read_index(self.directory)
        _refuse_stale(self.directory, found, wanted)
        self.index = {**wanted, "shards": {} if found is None else found["shards"]}
        self._shards: dict[str, Any] = {}
        self._pending: dict[int, Tensor] = {}
        self._places: dict[int, tuple[str, int]] = {}
        for name, shard in list(self.index["shards"].items()):
            if not _intact(self.directory / name, shard["sha256"]):
                logger.warning("%s: damaged (its SHA-256 is not that of the index); computed again", name)
                del self.index["shards"][name]
                continue
            self._places |= {row: (name, place) for place, row in enumerate(shard["rows"])}
        self._shard_rows = max(1, SHARD_BYTES // bytes_needed(1, rows.row_length, trunk))
        _check_room(self.directory, bytes_needed(len(rows) - len(self._places), rows.row_length, trunk))

    def __contains__(self, row: object) -> bool:
        return row in self._places or row in self._pending

    def __getitem__(self, row: int) -> Tensor:
        """Hidden states [T, D] of a row."""
        if row in self._pending:
            return self._pending[row]
        name, place = self._places[row]
        if name not in self._shards:
            self._shards[name] = safe_open(self.directory / name, framework="pt").get_slice("hidden")
        return self._shards[name][place]

    def put(self, rows: Sequence[int], hidden_BTD: Tensor) -> None:
        for row, hidden_TD in zip(rows, hidden_BTD.to("cpu", self._dtype), strict=True):
            self._pending[row] = hidden_TD.clone()
        if len(self._pending) >= self._shard_rows:
            self.flush()

    def flush(self) -> None:
        """Writes the rows that are not on the disk yet as one more shard."""
        if not self._pending:
            return
        shards = self.index["shards"]
        taken = [int(name.removesuffix(".safetensors").rpartition("-")[2]) for name in shards]
        name = f"hidden-{max(taken, default=-1) + 1:05d}.safetensors"
        content = save({"hidden": torch.stack(list(self._pending.values()))})
        write_whole(self.directory / name, content)
        shards[name] = {"sha256": fingerprint(content), "rows": list(self._pending)}
        write_whole(self.directory / INDEX, json.dumps(sealed(self.index)))
        self._places |= {row: (name, place) for place, row in enumerate(self._pending)}
        self._pending.clear()


def with_hidden(
    batch: dict[str, Tensor], trunk: Trunk, store: HiddenStates | None, *, before_last: int = 0
) -> dict[str, Tensor]:
    """A batch with the trunk's states "hidden" [B, T, D] in place of the numbers of its rows, "row" [B].

    The trunk runs over the rows that the store lacks, and the store keeps them.

    Args:
        before_last: how many layers stand above the states (`Trunk.hidden`); those of a store have to be of the same.
    """

    def hidden(missing: dict[str, Tensor]) -> Tensor:
        return trunk.hidden(missing["input_ids"], position_ids=missing["position_ids"], before_last=before_last)

    batch = {**batch, "hidden": stored_states(batch, store, hidden, device=trunk.device)}
    del batch["row"]
    return batch


def stored_states(
    batch: Mapping[str, Tensor],
    store: HiddenStates | None,
    compute: Callable[[dict[str, Tensor]], Tensor],
    *,
    device: torch.device,
) -> Tensor:
    """States [B, T, D] of the rows of a batch, from a store; what it lacks is computed and kept.

    Args:
        batch: tensors with one entry a row, the numbers of the rows, "row" [B], among them.
        compute: states of a batch of the missing rows alone, on `device`.
    """
    numbers: list[int] = batch["row"].tolist()
    missing = [at for at, row in enumerate(numbers) if store is None or row not in store]
    computed: dict[int, Tensor] = {}
    if missing:
        states = compute({name: tensor[missing].to(device) for name, tensor in batch.items()})
        if store is not None:
            store.put([numbers[at] for at in missing], states)
        computed = dict(zip(missing, states, strict=True))
    return torch.stack(
        [computed[at] if at in computed or store is None else store[row].to(device) for at, row in enumerate(numbers)]
    )


def fill(
    store: HiddenStates,
    trunk: Trunk,
    rows: PackedRows,
    *,
    batch_rows: int = 8,
    before_last: int = 0,
    progress: bool = True,
) -> None:
    """Runs the trunk over all rows that the store lacks.

    Args:
        batch_rows: rows a forward pass of the trunk.
        before_last: how many layers stand above the states.
    """
    missing = [row for row in range(len(rows)) if row not in store]
    bar = tqdm(
        total=len(missing) * rows.row_length,
        desc="hidden states",
        unit="token",
        unit_scale=True,
        disable=not (progress and missing),
    )
    with bar:
        try:
            for first in range(0, len(missing), batch_rows):
                batch = [{**rows[row], "row": torch.tensor(row)} for row in missing[first : first + batch_rows]]
                with_hidden(collate(batch), trunk, store, before_last=before_last)
                bar.update(len(batch) * rows.row_length)
        except (KeyboardInterrupt, SystemExit):
            store.flush()
            raise
    store.flush()


def _refuse_stale(directory: Path, found: dict[str, Any] | None, wanted: Mapping[str, Any]) -> None:
    way_out = "delete the directory, or name another in data.store"
    if found is None:
        if any(directory.glob("hidden-*.safetensors")) and (directory / INDEX).exists():
            raise MtpdError(f"{directory / INDEX}: not readable as the index of hidden states; {way_out}")
        return
    names = dict.fromkeys([*wanted["key"], *found["key"]])
    other = [name for name in names if found["key"].get(name) != wanted["key"].get(name)]
    other += [name for name in ("row_length", "hidden_size", "dtype") if found.get(name) != wanted[name]]
    if other:
        raise MtpdError(f"{directory}: these hidden states are of another run: other {', '.join(other)}; {way_out}")


def _intact(path: Path, digest: str) -> bool:
    return path.is_file() and fingerprint_file(path) == digest


def _read_index(directory: Path) -> dict[str, Any] | None:
    try:
        index = json.loads((directory / INDEX).read_text())
    except (FileNotFoundError, ValueError):
        return None
    whole = isinstance(index, dict) and index.get("schema") == SCHEMA and intact(index)
    return index if whole else None


def _check_room(directory: Path, needed: int) -> None:
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if needed and needed + MARGIN > free:
        raise MtpdError(
            f"{directory}: the hidden states need {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; "
            "set data.hidden_states=recompute, or data.store to another disk"
        )
