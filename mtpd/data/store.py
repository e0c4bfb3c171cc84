"""The trunk's hidden states of training rows, kept so that the trunk runs over each row once.

The trunk is frozen, so h_t of a row never changes, and everything that training needs follows from it: h_t costs
2 D bytes a token in bfloat16, where logits would cost thirty times that. A store fills while it is used: a row that
it lacks is computed and kept (`with_hidden`), so that from the second epoch on the trunk does not run. `fill`
computes all rows ahead of that.

On disk a store is a directory: `hidden-00000.safetensors`, ... with a tensor `hidden` [n, T, D] each, and
`index.json` with the shapes, the fingerprints of what the states belong to, and for each shard its SHA-256 and its
rows, in the order in which they came. The index is written after each shard, so that what is interrupted goes on
from the last whole one.

Several ranks fill a store together, each with shards (`hidden-00000.rank-1.safetensors`) and an index
(`index.rank-1.json`) of its own. The main rank takes the shards into the one index when all are done, or when the
store is opened next, with however many ranks.

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

from mtpd.data.packing import PackedRows, collate
from mtpd.errors import MtpdError
from mtpd.files import fingerprint, fingerprint_file, fingerprint_json, intact, megabytes, sealed, write_whole
from mtpd.parallel import ranks
from mtpd.progress import Bar
from mtpd.trunk import Trunk

logger = logging.getLogger(__name__)

INDEX = "index.json"
SCHEMA = 2
SHARD_BYTES = 256 * 2**20
"""Size of a shard at most, and so of what is lost when a run is interrupted."""
MARGIN = 64 * 2**20
"""Bytes that stay free on the disk for the other files of a run."""


class HiddenStates(Protocol):
    """Keeps hidden states by the number of their row."""

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
                f"data.hidden_states: memory needs {megabytes(needed)} for the hidden states, and "
                f"{megabytes(free)} are free; accepted then: disk or recompute"
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
        together: all ranks open it; each reads its share of the shards to compare them, and writes shards of its own.

    Raises:
        MtpdError: the directory has states that belong to something else, or the disk has no room for the rows
            that are missing; the message says how much is needed.
    """

    def __init__(
        self,
        directory: str | Path,
        trunk: Trunk,
        rows: PackedRows,
        *,
        key: Mapping[str, str],
        together: bool = False,
    ) -> None:
        self.directory = Path(directory)
        self._dtype = trunk.dtype
        self.shared = together and ranks.count() > 1
        """Whether several ranks have opened it together."""
        wanted: dict[str, Any] = {
            "schema": SCHEMA,
            "key": dict(key),
            "rows": len(rows),
            "row_length": rows.row_length,
            "hidden_size": trunk.hidden_size,
            "dtype": str(trunk.dtype).removeprefix("torch."),
        }
        self._merge(wanted)
        found = _read_index(self.directory / INDEX)
        _refuse_stale(self.directory, found, wanted)
        self.index = {**wanted, "shards": {} if found is None else found["shards"]}
        self._own: dict[str, Any] = {} if self.shared else self.index["shards"]
        self._shards: dict[str, Any] = {}
        self._pending: dict[int, Tensor] = {}
        self._places: dict[int, tuple[str, int]] = {}
        self._drop_damaged()
        self._find_places()
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
        taken = [int(name.split(".")[0].removeprefix("hidden-")) for name in (*self.index["shards"], *self._own)]
        own = f".rank-{ranks.rank()}" if self.shared else ""
        name = f"hidden-{max(taken, default=-1) + 1:05d}{own}.safetensors"
        content = save({"hidden": torch.stack(list(self._pending.values()))})
        write_whole(self.directory / name, content)
        self._own[name] = {"sha256": fingerprint(content), "rows": list(self._pending)}
        index = Path(INDEX).with_stem(f"{Path(INDEX).stem}{own}")
        write_whole(self.directory / index, json.dumps(sealed({**self.index, "shards": self._own})))
        self._places |= {row: (name, place) for place, row in enumerate(self._pending)}
        self._pending.clear()

    def join(self) -> None:
        """Makes what each rank has written known to all. All ranks that share the store call it."""
        self.flush()
        if self.shared:
            ranks.barrier()
            self._merge(self.index)
            found = _read_index(self.directory / INDEX)
            if found is not None:
                self.index["shards"] = found["shards"]
            self._own = {}
            self._find_places()

    def _merge(self, wanted: Mapping[str, Any]) -> None:
        """Takes the indices of ranks into the one; the main rank does, and the others wait."""
        if not self.shared or ranks.is_main():
            _merge_indices(self.directory, wanted)
        if self.shared:
            ranks.barrier()

    def _drop_damaged(self) -> None:
        shards = self.index["shards"]
        names = sorted(shards)
        damaged = [
            name
            for name in (ranks.share(names) if self.shared else names)
            if not _intact(self.directory / name, shards[name]["sha256"])
        ]
        if self.shared:
            damaged = [name for part in ranks.gather(damaged) for name in part]
        for name in damaged:
            logger.warning("%s: damaged (its SHA-256 is not that of the index); computed again", name)
            del shards[name]
        if damaged and (not self.shared or ranks.is_main()):
            write_whole(self.directory / INDEX, json.dumps(sealed(self.index)))

    def _find_places(self) -> None:
        self._places |= {
            row: (name, place)
            for name, shard in self.index["shards"].items()
            for place, row in enumerate(shard["rows"])
        }


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
    together: int = 1,
    progress: bool = True,
) -> None:
    """Runs the trunk over all rows that the store lacks; ranks that share it, each over its share of them.

    Args:
        trunk: gives the states of whole rows, also where ranks run it together.
        batch_rows: rows a forward pass of the trunk.
        before_last: how many layers stand above the states.
        together: so many neighbouring ranks run the trunk over the same rows, and the first of them keeps the states.
    """
    keeper = store if ranks.rank() % together == 0 else None
    missing = [row for row in range(len(rows)) if row not in store]
    joint = store if isinstance(store, DiskStore) and store.shared else None
    passes = -(-len(missing) // batch_rows)
    if joint is not None:
        # The first rank has the largest share.
        passes = -(-len(missing[:: ranks.count() // together]) // batch_rows)
        missing = ranks.share(missing, together=together)
    bar = Bar(
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
                with_hidden(collate(batch), trunk, keeper, before_last=before_last)
                bar.update(len(batch) * rows.row_length)
        except (KeyboardInterrupt, SystemExit):
            store.flush()
            raise
        for _ in range(passes - -(-len(missing) // batch_rows) if trunk.partitioned else 0):
            trunk.hidden(torch.zeros(1, 1, dtype=torch.long, device=trunk.device))
    if joint is None:
        store.flush()
    else:
        joint.join()


def _refuse_stale(directory: Path, found: dict[str, Any] | None, wanted: Mapping[str, Any]) -> None:
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


def _intact(path: Path, digest: str) -> bool:
    return path.is_file() and fingerprint_file(path) == digest


def _merge_indices(directory: Path, wanted: Mapping[str, Any]) -> None:
    """Takes the shards that ranks have written into the index, and deletes their own indices then."""
    parts = sorted(directory.glob("index.rank-*.json"))
    if not parts:
        return
    shards: dict[str, Any] = {}
    for path in (directory / INDEX, *parts):
        found = _read_index(path)
        _refuse_stale(directory, found, wanted)
        shards |= {} if found is None else found["shards"]
    write_whole(directory / INDEX, json.dumps(sealed({**wanted, "shards": shards})))
    for part in parts:
        part.unlink()


def _read_index(path: Path) -> dict[str, Any] | None:
    try:
        index = json.loads(path.read_text())
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
            f"{directory}: the hidden states need {megabytes(needed)}, {megabytes(MARGIN)} are kept for the rest of "
            f"the run, and the disk has {megabytes(free)} free; "
            "set data.hidden_states to recompute, or to a directory on another disk"
        )
