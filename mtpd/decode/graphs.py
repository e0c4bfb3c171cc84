"""Passes of decoding as CUDA graphs: one launch in the place of the thousands that a pass of a trunk has.

A graph is the kernels that a function launched once, with the addresses and the numbers of the host that they were
launched with. So a function that becomes one reads and writes buffers that stay where they are, and whatever differs
from round to round lies in them (`mtpd.slots.Bounded`).

The first calls with a key run the function as it is, on the stream that captures: that is the warming up which
libraries want before a capture. The first of them is watched, and what would make the host wait, or move numbers to or
from it, ends the use of graphs before anything is captured: a capture that fails may leave PyTorch's allocator in
disorder.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtpd.errors import is_out_of_memory
from mtpd.slots import Tensors
from mtpd.trunk import Trunk

logger = logging.getLogger(__name__)

FIRST = 2
"""Calls with a key that are not replayed. A capture takes as long as a few of them: it has to be worth it."""
MOST = 512
"""Graphs that are kept; those that were not needed for longest go."""
WAITING = frozenset(
    [
        "_local_scalar_dense",
        "_unique2",
        "equal",
        "is_nonzero",
        "masked_select",
        "nonzero",
        "unique_consecutive",
        "unique_dim",
    ]
)
"""Operators for whose result the host waits."""


_aside = threading.Lock()
"""Held by the thread that uses the stream beside that of the computation."""


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all engines: libraries keep memory for each stream that they are used on."""
    return torch.cuda.Stream(device)


@dataclass
class _Held:
    calls: int = 0
    graph: Any = None
    outputs: Tensors = ()
    """Not in the memory that graphs share: that is the next graph's, as soon as it is replayed."""


class Graphs:
    """Graphs of one engine: its buffers have fixed addresses.

    Args:
        device: of CUDA.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.refused = False
        """Whether something could not be captured; from then on functions run as they are."""
        self._held: dict[Hashable, _Held] = {}
        self._pool = torch.cuda.graph_pool_handle()

    @classmethod
    def of(cls, trunk: Trunk) -> Graphs | None:
        """Graphs for passes of a trunk; None where there can be none."""
        places = set(getattr(trunk.model, "hf_device_map", {}).values())
        return cls(trunk.device) if trunk.device.type == "cuda" and not trunk.partitioned and len(places) < 2 else None

    def __len__(self) -> int:
        """Counts the graphs that there are."""
        return sum(held.graph is not None for held in self._held.values())

    def run(self, key: Hashable, function: Callable[[], Tensors]) -> Tensors:
        """What a function gives; tensors that the next call with this key writes over.

        Args:
            key: calls with the same one launch the same kernels, over the same addresses and numbers of the host.
        """
        if self.refused:
            return function()
        held = self._held.pop(key, None) or _Held()
        self._held[key] = held
        if len(self._held) > MOST:
            del self._held[next(iter(self._held))]
        held.calls += 1
        try:
            if held.calls <= FIRST:
                held.outputs = self._warm_up(function, watched=held.calls == 1)
                return held.outputs
            if held.graph is None:
                held.graph = self._capture(function, held.outputs)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self.refused = True
            self._held.clear()
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            logger.warning("Decoding without CUDA graphs, kernel by kernel: %s", reason)
            return function()
        held.graph.replay()
        return held.outputs

    def _warm_up(self, function: Callable[[], Tensors], *, watched: bool) -> Tensors:
        here, stream = torch.cuda.current_stream(self.device), _stream(self.device)
        with _aside:
            stream.wait_stream(here)
            try:
                with torch.cuda.stream(stream), _Watch() if watched else nullcontext():
                    return function()
            finally:
                here.wait_stream(stream)

    def _capture(self, function: Callable[[], Tensors], outputs: Tensors) -> Any:
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile.
        aside: dict[str, Any] = {
            "pool": self._pool,
            "stream": _stream(self.device),
            "capture_error_mode": "thread_local",
        }
        with _aside, torch.cuda.graph(graph, **aside):
            for held, found in zip(outputs, function(), strict=True):
                held.copy_(found)
        return graph


class _Watch(TorchDispatchMode):
    """Raises RuntimeError where the host waits for the device, or numbers go from one to the other."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, Tensor)]
        # Operators take numbers of the host, tensors without dimensions, as constants; copying waits for each.
        devices = {each.device for each in tensors if each.dim() or name in ("_to_copy", "copy_")}
        masks = [each for each in tree_leaves(args[1:2]) if isinstance(each, Tensor) and each.dtype == torch.bool]
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and masks
        if name in WAITING or by_mask or len(devices) > 1:
            raise RuntimeError(f"{name} has to know numbers of the device, or of the host")
        return result
