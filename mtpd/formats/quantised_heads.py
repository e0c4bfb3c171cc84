"""Heads in FP8 or int8 with scales, read as bfloat16.

A weight `x.weight` [out, in] of small numbers q has its scales s in `x.weight_scale_inv` (DeepSeek-V3's blocks of 128 x
128; they multiply in spite of their name) or in `x.weight_scale` (compressed-tensors: one for the matrix, for a row, or
for a group of columns), and sometimes zero points z in `x.weight_zero_point`: w = s (q - z).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mtpd.errors import UserError
from mtpd.formats.tensors import FLOATS, Stored, dtype_name

SMALL = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
"""Number formats of quantised weights that are read."""
SCALES = ("_scale_inv", "_scale")
ZERO = "_zero_point"
FURTHER = (*SCALES, ZERO, "_shape", "_global_scale")
"""What tensors beside a quantised weight are called, behind its name."""
BLOCK = 128
"""Rows and columns of a block where a config does not say it."""
ACCEPTED = "accepted: bfloat16, float16 or float32, also beside a quantised base, or FP8 and int8 with scales"


def beside(name: str, tensors: Mapping[str, Stored]) -> bool:
    """Whether a tensor belongs to a quantised weight, as its scales do."""
    for ending in FURTHER:
        weight = name.removesuffix(ending)
        if weight != name and weight in tensors:
            return tensors[weight].dtype not in FLOATS
    stem, _, last = name.rpartition(".")
    return last in ("input_scale", "activation_scale") and f"{stem}.weight" in tensors


def scale_of(name: str, tensors: Mapping[str, Stored]) -> str | None:
    """The name of a weight's scales; None where there are none."""
    return next((name + ending for ending in SCALES if name + ending in tensors), None)


def plain(name: str, tensors: Mapping[str, Stored], settings: Mapping[str, Any] | None, *, shown: str) -> Stored:
    """A tensor of heads as it is, or in bfloat16 where it is quantised.

    Args:
        settings: `quantization_config` of the checkpoint.
        shown: the checkpoint, for people.

    Raises:
        UserError: it is quantised in another way than above, or its scales are missing or do not fit.
    """
    found = tensors[name]
    if found.dtype in FLOATS:
        return found
    scale = scale_of(name, tensors)
    what = f"{shown}: its MTP heads are quantised ({name} is {dtype_name(found.dtype)})"
    if found.dtype not in SMALL or len(found.shape) != 2:
        raise UserError(f"{what} in a form that is not read; {ACCEPTED}")
    if scale is None:
        raise UserError(f"{what} and {name}{SCALES[0]} or {name}{SCALES[1]} is missing; {ACCEPTED}")
    try:
        steps = _steps(found.shape, tensors[scale].shape, settings)
    except ValueError as error:
        raise UserError(f"{what} and {scale} {error}; {ACCEPTED}") from error

    def read(start: int, stop: int) -> Tensor:
        zero = tensors[name + ZERO].load() if name + ZERO in tensors else None
        whole = dequantise(found.load(), tensors[scale].load(), steps, zero)
        return whole.to(torch.bfloat16).flatten()[start:stop]

    return Stored(torch.bfloat16, found.shape, read)


def dequantise(weight: Tensor, scale: Tensor, steps: tuple[int, int], zero: Tensor | None = None) -> Tensor:
    """s (q - z) in float32, [out, in].

    Args:
        steps: rows and columns that have a scale.
        zero: zero points, in the shape of the scales.
    """
    values = weight.float()
    if zero is not None:
        values = values - _spread(zero, steps, values.shape)
    return values * _spread(scale, steps, values.shape)


def _steps(shape: tuple[int, ...], scales: tuple[int, ...], settings: Mapping[str, Any] | None) -> tuple[int, int]:
    told = (settings or {}).get("weight_block_size") or (BLOCK, BLOCK)
    counts = (*scales, 1, 1)[:2] if len(scales) < 2 else scales
    if len(counts) != 2:
        raise ValueError(f"has the shape {list(scales)}")
    steps = []
    for size, count, block in zip(shape, counts, told, strict=True):
        if count in (1, size):
            steps.append(size // count)
        elif -(-size // block) == count:
            steps.append(int(block))
        elif count and size % count == 0:
            steps.append(size // count)
        else:
            raise ValueError(f"has the shape {list(scales)}, which does not divide {list(shape)}")
    return steps[0], steps[1]


def _spread(scale: Tensor, steps: tuple[int, int], shape: torch.Size) -> Tensor:
    """One number for each element."""
    high, wide = (-(-size // step) for size, step in zip(shape, steps, strict=True))
    spread = scale.float().reshape(high, wide)
    spread = spread.repeat_interleave(steps[0], 0)[: shape[0]]
    return spread.repeat_interleave(steps[1], 1)[:, : shape[1]]
