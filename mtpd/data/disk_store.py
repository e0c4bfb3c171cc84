"""A store of hidden states on the disk: written by threads of its own while training goes on, and read ahead of it.

A store is a directory: `hidden-00000.safetensors`, ... with a tensor `hidden` [n, T, D] each, and `index.json` with
the shapes, the fingerprints of what the states belong to, and for each shard its SHA-256 and its rows, in the order
in which they came. The index is written after each shard, so that what is interrupted goes on from the last whole one.

Several ranks fill a store together, each with shards (`hidden-00000.rank-1.safetensors`) and an index
(`index.rank-1.json`) of its own. The main rank takes the shards into the one index when all are done, or when the
store is opened next, with however many ranks.

While a shard is written and hashed by threads, the next one fills: two buffers take turns. On a GPU they are pinned,
and states come into them on a stream beside that of the computation.

Legend: N rows, B rows of a batch, T positions, D hidden size.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mtpd.data.packing import PackedRows, collate
from mtpd.data.shard import Shard
from mtpd.data.store import HiddenStates, bytes_needed, with_hidden
from mtpd.data.store_index import INDEX, SCHEMA, check_room, merge_indices, read_index, refuse_stale
from mtpd.files import fingerprint_file, sealed, write_whole, written_whole
from mtpd.parallel import ranks
from mtpd.progress import Bar
from mtpd.trunk import Trunk

logger = logging.getLogger(__name__)

SHARD_BYTES = 256 * 2**20
"""Size of a shard at most. What is lost when a run is killed is less than two of them."""
BUFFERS = 2
"""Shards that are in memory: one fills, the others are being written."""
AHEAD_BYTES = 256 * 2**20
"""Size of the rows that are read before they are asked for, at most."""


class DiskStore:
    """Hidden states in a directory, in the trunk's number format.

    Opening compares the size of each shard. Its SHA-256 is compared when it is read first, or by `check`. A damaged
    shard is dropped and its rows are computed again.

    Args:
        key: what the states belong to, by name (`store_key`).
        together: all ranks open it; each checks its share of the shards at once, since none could compute later alone
            what all need, and writes shards of its own.

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
        found = read_index(self.directory / INDEX)
        refuse_stale(self.directory, found, wanted)
        self.index = {**wanted, "shards": {} if found is None else found["shards"]}
        self._own: dict[str, Any] = {} if self.shared else self.index["shards"]
        self._checked: set[str] = set()
        self._files: dict[str, Any] = {}
        self._places: dict[int, tuple[str, int]] = {}
        self._held: dict[int, tuple[Shard, int]] = {}
        self._buffers: deque[Shard] = deque()
        self._ahead: dict[int, Future[Tensor | None]] = {}
        # Guards of what is held and of the index; and of the files that are read.
        self._changing, self._opening = threading.RLock(), threading.RLock()
        self._writer, self._hasher, self._reader = (ThreadPoolExecutor(1, "states") for _ in range(3))
        self._trunk, self._row_length = trunk, rows.row_length
        row_bytes = bytes_needed(1, rows.row_length, trunk)
        self._shard_rows = min(max(1, SHARD_BYTES // row_bytes), len(rows))
        self._most_ahead = max(1, AHEAD_BYTES // row_bytes)
        self._find_places()
        self._drop([name for name in self.index["shards"] if not self._has_its_size(name)], "size is not")
        if self.shared:
            self.check()
        check_room(self.directory, bytes_needed(len(rows) - len(self._places), rows.row_length, trunk))

    def __contains__(self, row: object) -> bool:
        return row in self._places or row in self._held

    def __getitem__(self, row: int) -> Tensor:
        ahead = self._ahead.pop(row, None)
        found = self._read(row) if ahead is None else ahead.result()
        if found is None:
            raise KeyError(row)
        return found

    def expect(self, row: int) -> None:
        if row in self._places and row not in self._ahead and len(self._ahead) < self._most_ahead:
            self._ahead[row] = self._reader.submit(self._read, row)

    def put(self, rows: Sequence[int], hidden_BTD: Tensor) -> None:
        """Keeps the states of these rows; waits where both buffers are full.

        Raises:
            MtpdError: shards before it could not be written.
        """
        for shard in self._buffers:
            if shard.written is not None and shard.written.done():
                shard.written.result()
        new = {row: at for at, row in enumerate(rows) if row not in self}
        if len(new) < len(rows):
            hidden_BTD = hidden_BTD[list(new.values())]
        numbers = list(new)
        while numbers:
            shard = self._filling()
            count, first = shard.room, len(shard.rows)
            shard.put(numbers[:count], hidden_BTD[:count])
            self._held |= {row: (shard, first + at) for at, row in enumerate(numbers[:count])}
            numbers, hidden_BTD = numbers[count:], hidden_BTD[count:]
            if not shard.room:
                self._hand_over(shard)

    def flush(self) -> None:
        """Writes the rows that are not on the disk yet as one more shard, and waits until all are there.

        Raises:
            MtpdError: they cannot be written.
        """
        if self._buffers and self._buffers[-1].rows:
            self._hand_over(self._buffers[-1])
        for shard in self._buffers:
            if shard.written is not None:
                shard.written.result()

    def check(self) -> None:
        """Compares each shard with its SHA-256 that was not compared yet; ranks that share it, each its share."""
        names = sorted(self.index["shards"].keys() - self._checked)
        damaged = [name for name in (ranks.share(names) if self.shared else names) if not self._intact(name)]
        if self.shared:
            damaged = [name for part in ranks.gather(damaged) for name in part]
        self._checked.update(names)
        self._drop(damaged, "SHA-256 is not")

    def join(self) -> None:
        """Makes what each rank has written known to all. All ranks that share the store call it."""
        self.flush()
        if self.shared:
            ranks.barrier()
            self._merge(self.index)
            found = read_index(self.directory / INDEX)
            if found is not None:
                self.index["shards"] = found["shards"]
                self._checked.update(found["shards"])
            self._own = {}
            self._find_places()

    def _filling(self) -> Shard:
        """The buffer that rows go into: what it was full of before is on the disk."""
        if self._buffers and self._buffers[-1].written is None:
            return self._buffers[-1]
        if len(self._buffers) < BUFFERS:
            pinned = self._trunk.device.type == "cuda"
            self._buffers.append(Shard(self._shard_rows, self._row_length, self._trunk, pinned=pinned))
        else:
            shard = self._buffers.popleft()
            self._buffers.append(shard)
            assert shard.written is not None, "only the last one fills"
            shard.written.result()
            shard.rows, shard.written = [], None
        return self._buffers[-1]

    def _hand_over(self, shard: Shard) -> None:
        if shard.written is None:
            shard.written = self._writer.submit(self._write, shard)

    def _write(self, shard: Shard) -> None:
        """Writes a shard and then the index, in the thread that writes; another one hashes meanwhile."""
        content = shard.content()
        own = f".rank-{ranks.rank()}" if self.shared else ""
        with self._changing:
            taken = [int(name.split(".")[0].removeprefix("hidden-")) for name in (*self.index["shards"], *self._own)]
        name = f"hidden-{max(taken, default=-1) + 1:05d}{own}.safetensors"
        digest = self._hasher.submit(_sha256, content)
        needed = sum(map(len, content))
        with written_whole(self.directory / name, needed=needed) as beside, open(beside, "wb") as file:
            file.writelines(content)
        with self._changing:
            self._own[name] = {"sha256": digest.result(), "rows": list(shard.rows)}
            self._write_index(self._own, own)
            self._checked.add(name)
            self._places |= {row: (name, place) for place, row in enumerate(shard.rows)}
            for row in shard.rows:
                del self._held[row]

    def _read(self, row: int) -> Tensor | None:
        """A row in memory; None where there is none, or a damaged one."""
        with self._changing:
            if row in self._held:
                shard, place = self._held[row]
                return shard.row(place)
        name, place = self._places.get(row, ("", 0))
        states = self._file(name) if name else None
        if states is None:
            return None
        mapped = states[place]
        # What is mapped is not read before it is copied.
        return torch.empty(mapped.shape, dtype=mapped.dtype, pin_memory=self._trunk.device.type == "cuda").copy_(mapped)

    def _file(self, name: str) -> Any:
        """The states of a shard, mapped; None where it turns out to be damaged."""
        with self._opening:
            if name not in self._checked:
                if not self._intact(name):
                    self._drop([name], "SHA-256 is not")
                    return None
                self._checked.add(name)
            if name not in self._files:
                self._files[name] = safe_open(self.directory / name, framework="pt").get_slice("hidden")
            return self._files[name]

    def _has_its_size(self, name: str) -> bool:
        """Whether a file is as long as it says, and has the states of its rows."""
        try:
            with safe_open(self.directory / name, framework="pt") as file:
                shape = file.get_slice("hidden").get_shape()
        except (OSError, SafetensorError):
            return False
        return bool(shape == [len(self.index["shards"][name]["rows"]), self._row_length, self._trunk.hidden_size])

    def _intact(self, name: str) -> bool:
        path = self.directory / name
        return path.is_file() and fingerprint_file(path) == self.index["shards"][name]["sha256"]

    def _drop(self, damaged: Sequence[str], why: str) -> None:
        """Forgets damaged shards: their rows are computed again."""
        if not damaged:
            return
        with self._changing:
            for name in damaged:
                logger.warning("%s: damaged (its %s that of the index); computed again", self.directory / name, why)
                for row in self.index["shards"].pop(name)["rows"]:
                    self._places.pop(row, None)
            if not self.shared or ranks.is_main():
                self._write_index(self.index["shards"], "")

    def _write_index(self, shards: Mapping[str, Any], own: str) -> None:
        path = (self.directory / INDEX).with_stem(f"{Path(INDEX).stem}{own}")
        write_whole(path, json.dumps(sealed({**self.index, "shards": shards})))

    def _merge(self, wanted: Mapping[str, Any]) -> None:
        """Takes the indices of ranks into the one; the main rank does, and the others wait."""
        if not self.shared or ranks.is_main():
            merge_indices(self.directory, wanted)
        if self.shared:
            ranks.barrier()

    def _find_places(self) -> None:
        self._places |= {
            row: (name, place)
            for name, shard in self.index["shards"].items()
            for place, row in enumerate(shard["rows"])
        }


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
    if isinstance(store, DiskStore):
        store.check()
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
                batch = [{**rows[row], "row": row} for row in missing[first : first + batch_rows]]
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


def _sha256(parts: Sequence[bytes | memoryview]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()
