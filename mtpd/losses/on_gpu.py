"""What an NVIDIA GPU adds to the fused loss: which losses the Triton kernels compute, and exact sums of products."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mtpd.losses.settings import LossSettings
from mtpd.trunk import Unembedding

logger = logging.getLogger(__name__)

KERNEL_DEVICES = frozenset({"cuda"})
"""Where the kernels run."""


def kernels(
    device: torch.device,
    settings: LossSettings,
    teacher_head: Unembedding,
    unembedding: Unembedding,
    columns_M: Tensor | None,
) -> Any:
    """The Triton kernels for this loss, or None where the sweeps compute it."""
    if device.type not in KERNEL_DEVICES or not triton_works():
        return None
    from mtpd.losses import fused_kernels

    arithmetic = {(head.scale, head.softcap) for head in (teacher_head, unembedding)}
    served = unembedding.weight.dtype in fused_kernels.FORMATS and len(arithmetic) == 1 and unembedding.scale > 0
    if not served or settings.entry.twin not in fused_kernels.DIVERGENCES:
        return None
    say("Triton kernels")
    return fused_kernels.Kernels(settings, teacher_head, unembedding, columns_M)


@functools.cache
def triton_works() -> bool:
    """Whether Triton is there, a GPU for it, and a C compiler, which it needs for what launches its kernels."""
    if importlib.util.find_spec("triton") is None:
        missing, way = "Triton is not installed", "pip install triton"
    elif not any(map(shutil.which, (os.environ.get("CC") or "gcc", "gcc", "clang"))):
        missing, way = "Triton finds no C compiler", "install gcc, or name one in the environment variable CC"
    elif not torch.cuda.is_available():
        missing, way = "Triton finds no GPU", "run where torch.cuda.is_available()"
    else:
        return True
    logger.warning("the loss runs without its kernels, which takes about twice as long: %s; %s", missing, way)
    return False


@functools.cache
def say(how: str) -> None:
    """Logs, once, what computes the loss."""
    logger.info("the loss between its matrix products is computed by %s", how)


@contextmanager
def exact_sums(device: torch.device) -> Iterator[None]:
    """Within it, products of 16-bit numbers on an NVIDIA GPU add up in float32.

    PyTorch allows cuBLAS to add partial sums in 16 bits, and dL/dh is a sum over the whole vocabulary.
    """
    if device.type != "cuda":
        yield
        return
    products = torch.backends.cuda.matmul
    before = products.allow_bf16_reduced_precision_reduction, products.allow_fp16_reduced_precision_reduction
    products.allow_bf16_reduced_precision_reduction = products.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        products.allow_bf16_reduced_precision_reduction, products.allow_fp16_reduced_precision_reduction = before
