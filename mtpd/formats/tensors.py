"""Tensors that stay in their files until they are written elsewhere.

A `Stored` tensor knows its shape and can read any range of its elements. Renaming, slicing and joining
tensors then cost nothing, and writing streams: the memory needed is a chunk, whatever the tensors' sizes.
The container is the safetensors format (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtpd.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Number formats that heads may have."""

CHUNK = 64 * 2**20
"""Bytes that are in memory at a time while tensors are written."""


@dataclass(frozen=True)
class Stored:
    """A tensor by its shape, number format, and `read(start, stop)` of its flattened elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[int, int], Tensor]
    where: tuple[Path, int] | None = None
    """The file and the byte in it where the tensor lies unchanged, if it does."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.elements * self.dtype.itemsize

    def load(self) -> Tensor:
        """The tensor in memory."""
        return self.read(0, self.elements).reshape(self.shape)

    def same(self, other: Stored) -> bool:
        """Whether both hold the same bytes."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        step = max(1, CHUNK // self.dtype.itemsize)
        return all(
            torch.equal(_bytes(self.read(start, stop)), _bytes(other.read(start, stop)))
            for start in range(0, self.elements, step)
            for stop in (min(start + step, self.elements),)
        )


def stored(tensor: Tensor) -> Stored:
    """A tensor that is in memory."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return Stored(flat.dtype, tuple(tensor.shape), lambda start, stop: flat[start:stop])


def part(source: Stored, start: int, shape: Sequence[int]) -> Stored:
    """The elements from `start` on, in another shape: rows of a matrix, or one expert of a stack of them."""
    assert start + math.prod(shape) <= source.elements, "a part lies inside"
    return Stored(source.dtype, tuple(shape), lambda first, last: source.read(start + first, start + last))


def joined(sources: Sequence[Stored], shape: Sequence[int]) -> Stored:
    """Tensors one behind the other in memory, as one of `shape`."""
    sources = list(sources)
    assert sum(source.elements for source in sources) == math.prod(shape), "the parts make up the whole"
    assert len({source.dtype for source in sources}) == 1, "the parts have one number format"

    def read(start: int, stop: int) -> Tensor:
        pieces, begin = [], 0
        for source in sources:
            end = begin + source.elements
            if begin < stop and start < end:
                pieces.append(source.read(max(start, begin) - begin, min(stop, end) - begin))
            begin = end
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces) if pieces else torch.empty(0, dtype=dtype)

    dtype = sources[0].dtype
    return Stored(dtype, tuple(shape), read)


def computed(source: Stored, change: Callable[[Tensor], Tensor], shape: Sequence[int] | None = None) -> Stored:
    """A tensor with a function of it; for small ones, which it holds in memory while it reads."""

    def read(start: int, stop: int) -> Tensor:
        return change(source.load()).contiguous().flatten()[start:stop]

    return Stored(source.dtype, tuple(source.shape if shape is None else shape), read)


def cast(source: Stored, dtype: torch.dtype) -> Stored:
    """The same values, rounded to another number format."""
    if source.dtype == dtype:
        return source
    return Stored(dtype, source.shape, lambda start, stop: source.read(start, stop).to(dtype))


def is_zero(source: Stored) -> bool:
    """Whether all elements are zero; for small tensors."""
    return not bool(source.load().any())


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a safetensors file and its metadata, without reading a tensor.

    Raises:
        UserError: the file is none, or is cut off.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError("its header does not fit into it")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        tensors = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{name} has the number format {entry['dtype']}")
            tensor = _in_file(path, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + begin)
            if end - begin != tensor.size or 8 + length + end > size:
                raise ValueError(f"{name} is cut off")
            tensors[name] = tensor
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be read as safetensors: {reason}") from error
    return tensors, metadata


def write_tensors(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Writes a safetensors file chunk by chunk, flushed to disk."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.size
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for piece in chunks(tensor):
                file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def dtype_name(dtype: torch.dtype) -> str:
    """As config.json has it."""
    return str(dtype).removeprefix("torch.")


def chunks(tensor: Stored) -> Any:
    """Its bytes, a chunk at a time."""
    step = max(1, CHUNK // tensor.dtype.itemsize)
    for start in range(0, tensor.elements, step):
        yield _bytes(tensor.read(start, min(start + step, tensor.elements))).numpy().data


def overwrite(file: Path, old: Stored, new: Stored) -> None:
    """Puts a tensor of the same size in the place of one that lies in a file, of a checkpoint or of its copy."""
    assert old.where is not None, "a tensor of a checkpoint lies in a file"
    with file.open("r+b") as opened:
        opened.seek(old.where[1])
        for piece in chunks(new):
            opened.write(piece)


def _bytes(flat: Tensor) -> Tensor:
    return flat.contiguous().view(torch.uint8)


def _in_file(path: Path, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> Stored:
    def read(start: int, stop: int) -> Tensor:
        if stop <= start:
            return torch.empty(0, dtype=dtype)
        data = bytearray((stop - start) * dtype.itemsize)
        with path.open("rb") as file:
            file.seek(offset + start * dtype.itemsize)
            count = file.readinto(data)
        if count != len(data):
            raise UserError(f"{path}: ends before its tensors do; it was cut off while it was read")
        return torch.frombuffer(data, dtype=dtype)

    return Stored(dtype, shape, read, (path, offset))
