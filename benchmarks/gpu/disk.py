"""The store of hidden states: filled from the GPU, beside what the disk takes, and read back."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from measure import alternate
from store import Work

from benchmarks.gpu.outcome import Options, Outcome


def work(options: Options) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    yield "store of hidden states", lambda: filled(options)


def filled(options: Options) -> Outcome:
    count, length, size = (8, 64, 512) if options.tiny else (128, 2048, 4096)
    work = Work(options.out, count=count, length=length, size=size, device=torch.device(options.device))
    times = alternate({"ours": work.ours, "dd": work.dd}, runs=2)
    opening, reading = work.read()
    rates = {name: work.bytes / seconds for name, seconds in {**times, "reading": reading}.items()}
    said = (
        f"filled at {rates['ours'] / 1e9:.2f} GB/s (dd {rates['dd'] / 1e9:.2f}), read at {rates['reading'] / 1e9:.2f}"
    )
    return Outcome("store of hidden states", True, said, {**rates, "opening": opening})
