"""The loss between its products: kernels, sweeps and compiled sweeps, beside eager code, TRL and Liger."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from loss import Work
from measure import alternate, bandwidth, product_rate

from benchmarks.gpu.outcome import Options, Outcome
from mtpd.losses import on_gpu
from mtpd.losses.settings import LossSettings

WAYS = ("kernels", "sweeps", "compiled sweeps", "eager", "trl", "cross-entropy alone", "liger")
"""The last two compute cross-entropy, all others the KL."""
NEEDED = {"compiled sweeps": 30.0}
"""Seconds that are left at least where a way is begun."""


def work(options: Options) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    """All at the shape of an 8B model with a vocabulary of 151,936: value, and gradient in the states of four heads."""
    shape = (32, 2, 300, 16) if options.tiny else (4096, 4, 151_936, 4096)
    positions, depths, vocabulary, size = shape
    of_kl = Work(positions, depths, vocabulary, size, options.dtype, 0, options.device)
    rate = product_rate(positions, size, vocabulary, options.dtype, device=options.device)
    least = max(of_kl.operations / rate, of_kl.bytes / bandwidth(megabytes=64, device=options.device))
    for way in WAYS:
        yield f"loss by {way}", lambda way=way: timed(way, of_kl, least, options)


def timed(way: str, of_kl: Work, least: float, options: Options) -> Outcome:
    name = f"loss by {way}"
    if missing := reason_against(way, of_kl, options):
        return Outcome(name, None, missing)
    calls: dict[str, Callable[[], None]] = {
        "kernels": of_kl.fused,
        "sweeps": lambda: swept(of_kl, compiled=False),
        "compiled sweeps": lambda: swept(of_kl, compiled=True),
        "eager": of_kl.eager,
        "trl": of_kl.trl,
        "cross-entropy alone": lambda: cross_entropy(of_kl),
        "liger": lambda: liger(of_kl),
    }
    calls[way]()
    memory = None
    if options.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        calls[way]()
        memory = torch.cuda.max_memory_allocated() - held
    seconds = alternate({way: calls[way]}, runs=3)[way]
    figures = {"seconds": seconds, "least": least, "share of the roofline": least / seconds, "peak bytes": memory}
    said = f"{1e3 * seconds:.1f} ms, {least / seconds:.0%} of the roofline"
    return Outcome(name, True, said + ("" if memory is None else f", {memory / 1e9:.2f} GB"), figures)


def reason_against(way: str, of_kl: Work, options: Options) -> str:
    """Says why a way is left out; nothing where it is not."""
    head = of_kl.head
    if options.left < NEEDED.get(way, 10.0):
        return "no time is left"
    if way == "kernels" and on_gpu.kernels(torch.device(options.device), of_kl.settings, head, head, None) is None:
        return "no kernels here"
    if way == "liger" and importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return ""


@contextmanager
def without_kernels() -> Iterator[None]:
    """Within it the sweeps compute."""
    before, on_gpu.KERNEL_DEVICES = on_gpu.KERNEL_DEVICES, frozenset()
    try:
        yield
    finally:
        on_gpu.KERNEL_DEVICES = before


def swept(of_kl: Work, *, compiled: bool) -> None:
    with without_kernels():
        of_kl.fused(compiled=compiled)


def cross_entropy(of_kl: Work) -> None:
    depths = len(of_kl.students)
    before, of_kl.settings = of_kl.settings, LossSettings((1.0,) * depths, (0.0,) * depths)
    try:
        of_kl.fused()
    finally:
        of_kl.settings = before


def liger(of_kl: Work) -> None:
    """Cross-entropy, a call for each head."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    compute = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    for student, target in zip(of_kl.students, of_kl.targets, strict=True):
        torch.autograd.grad(compute(of_kl.head.weight, student, target), student)
