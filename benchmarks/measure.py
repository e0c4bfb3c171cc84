"""What the speed benchmarks share: alternating runs, bytes of live tensors, and what the machine can do."""

from __future__ import annotations

import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def seconds(function: Callable[[], Any]) -> float:
    """Of one call, and of what it left a GPU to do."""
    began = clock()
    function()
    return clock() - began


def clock() -> float:
    """Seconds since some moment, when a GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def alternate(functions: Mapping[str, Callable[[], Any]], *, runs: int) -> dict[str, float]:
    """Median seconds of each function, all of them called in turn: what slows the machine slows them alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return {name: statistics.median(found) for name, found in times.items()}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made under it that still live; `peak` is the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.holders: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)}
        output = func(*args, **(kwargs or {}))
        for leaf in tree_iter(output):
            if isinstance(leaf, Tensor):
                pointer, size = leaf.untyped_storage().data_ptr(), leaf.untyped_storage().nbytes()
                if not size or (pointer in given and not self.holders[pointer]):
                    continue
                if not self.holders[pointer]:
                    self.live += size
                    self.peak = max(self.peak, self.live)
                self.holders[pointer] += 1
                weakref.finalize(leaf, self._gone, pointer, size)
        return output

    def _gone(self, pointer: int, size: int) -> None:
        self.holders[pointer] -= 1
        if not self.holders[pointer]:
            self.live -= size


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most bytes that tensors made by a call take at a time."""
    with LiveBytes() as counted:
        function()
    return counted.peak


def product_rate(
    rows: int, inner: int, columns: int, dtype: torch.dtype, *, runs: int = 5, device: str = "cpu"
) -> float:
    """FLOP/s of torch.mm on [rows, inner] x [inner, columns], the best of some runs."""
    left, right = (torch.randn(size, inner, device=device).to(dtype) for size in (rows, columns))
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    best = min(seconds(lambda: torch.mm(left, right.T, out=out)) for _ in range(runs))
    return 2 * rows * inner * columns / best


def bandwidth(*, megabytes: int = 512, runs: int = 5, device: str = "cpu") -> float:
    """Bytes/s of a copy between two tensors larger than the caches, read and written ones together."""
    source = torch.empty(megabytes * 2**18, device=device).fill_(1.0)
    target = torch.empty_like(source).fill_(0.0)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source)) for _ in range(runs))
