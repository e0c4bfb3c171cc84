"""A file of hidden states that fills in memory, and has its place in a store when it is on the disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from mtpd.trunk import Trunk

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""As safetensors spells them."""


class Shard:
    """A buffer of rows, which is filled, written, and filled again.

    Args:
        rows: that it has room for.
        pinned: whether a GPU copies into it by itself.
    """

    def __init__(self, rows: int, row_length: int, trunk: Trunk, *, pinned: bool) -> None:
        self.states_NTD = torch.empty(rows, row_length, trunk.hidden_size, dtype=trunk.dtype, pin_memory=pinned)
        self.rows: list[int] = []
        self.written: Future[None] | None = None
        """Once it is full: done when it is on the disk, or with what went wrong."""
        self._stream: Any = None
        self._copied: Any = None

    @property
    def room(self) -> int:
        return len(self.states_NTD) - len(self.rows)

    def put(self, rows: Sequence[int], hidden_BTD: Tensor) -> None:
        place = self.states_NTD[len(self.rows) : len(self.rows) + len(rows)]
        if hidden_BTD.device.type != "cuda":
            place.copy_(hidden_BTD)
        else:
            device = hidden_BTD.device
            if self._stream is None:
                self._stream, self._copied = torch.cuda.Stream(device), torch.cuda.Event()
            self._stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(self._stream):
                place.copy_(hidden_BTD, non_blocking=True)
                self._copied.record()
            # Its memory is not given away before it has been copied.
            hidden_BTD.record_stream(self._stream)
        self.rows += rows

    def content(self) -> tuple[bytes, memoryview]:
        """The head of a safetensors file, and what follows it, once that has come from the GPU."""
        if self._copied is not None:
            self._copied.synchronize()
        states = self.states_NTD[: len(self.rows)]
        about = {"dtype": DTYPES[states.dtype], "shape": list(states.shape), "data_offsets": [0, states.nbytes]}
        head = json.dumps({"hidden": about}).encode()
        head += b" " * (-len(head) % 8)
        return len(head).to_bytes(8, "little") + head, states.view(torch.uint8).flatten().numpy().data

    def row(self, place: int) -> Tensor:
        """A copy of a row, once that has come from the GPU."""
        if self._copied is not None:
            self._copied.synchronize()
        return self.states_NTD[place].clone()
