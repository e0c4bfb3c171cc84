"""How fast a store of hidden states on the disk fills, beside what the disk takes, and how fast it is read.

    python benchmarks/store.py --directory runs --json store.json

States of a stand-in for a trunk, at hand already, go into a store row by row; `dd` writes as many bytes with fsync into
the same directory. Both in turns; times are medians. Then the store is opened and its rows are read once in another
order, with the first comparison of their SHA-256.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lab import machine, write_rows
from measure import alternate, clock

from mtpd.data.disk_store import DiskStore
from mtpd.data.packing import PackedRows


class Work:
    """States of some rows, and the places that they are written to."""

    def __init__(self, directory: Path, *, count: int, length: int, size: int, device: torch.device) -> None:
        self.directory, self.count = directory, count
        self.trunk: Any = SimpleNamespace(hidden_size=size, dtype=torch.bfloat16, device=device)
        nothing = torch.zeros(count, length, dtype=torch.int32)
        self.rows = PackedRows(nothing, nothing, nothing, documents=count, cut=0, dropped=0)
        self.states = torch.randn(4, length, size, device=device).to(torch.bfloat16)
        self.bytes = count * self.states[0].nbytes

    def fill(self, folder: Path) -> DiskStore:
        store = DiskStore(folder, self.trunk, self.rows, key={})
        for row in range(self.count):
            store.put([row], self.states[row % 4 : row % 4 + 1])
        store.flush()
        return store

    def ours(self) -> None:
        with tempfile.TemporaryDirectory(dir=self.directory) as folder:
            self.fill(Path(folder))

    def dd(self) -> None:
        """What `dd` does with zeros."""
        with tempfile.TemporaryDirectory(dir=self.directory) as folder:
            count = f"count={self.bytes >> 20}"
            command = ["dd", "if=/dev/zero", f"of={folder}/zeros", "bs=1M", count, "conv=fsync", "status=none"]
            subprocess.run(command, check=True)

    def read(self) -> tuple[float, float]:
        """Seconds of opening a store, and of reading its rows once."""
        with tempfile.TemporaryDirectory(dir=self.directory) as folder:
            self.fill(Path(folder))
            began = clock()
            store = DiskStore(folder, self.trunk, self.rows, key={})
            opened = clock()
            order = random.Random(0).sample(range(self.count), self.count)
            for at, row in enumerate(order):
                for following in order[at : at + 4]:
                    store.expect(following)
                store[row].to(self.trunk.device, non_blocking=True, copy=True)
            return opened - began, clock() - opened


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path(), help="on the disk that is measured")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    work = Work(
        options.directory,
        count=options.rows,
        length=options.length,
        size=options.size,
        device=torch.device(options.device),
    )
    times = alternate({"ours": work.ours, "dd": work.dd}, runs=options.runs)
    opening, reading = work.read()
    rates = {name: work.bytes / seconds for name, seconds in {**times, "reading": reading}.items()}
    row = {"name": "store filled", "ours": rates["ours"], "other": rates["dd"], "against": "dd", "unit": "bytes/s"}
    row |= {"ratio": rates["ours"] / rates["dd"], "opening": opening, "reading": rates["reading"]}
    print(
        f"{work.bytes / 1e9:.2f} GB: filled at {rates['ours'] / 1e9:.2f} GB/s, dd {rates['dd'] / 1e9:.2f}: "
        f"{row['ratio']:.2f}; opened in {opening:.3f} s, read at {rates['reading'] / 1e9:.2f} GB/s",
        flush=True,
    )
    write_rows(options.json, [{**row, "runs": options.runs, "machine": machine()}])


if __name__ == "__main__":
    main()
