"""Every loss in value and gradient beside the reference in float64, at the width of a real vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.outcome import Options, Outcome
from mtpd.losses import on_gpu, reference
from mtpd.losses.fused import multi_depth_loss
from mtpd.losses.settings import LOSSES, LossSettings
from mtpd.trunk import Unembedding

DEPTHS = 2
WITHIN = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (2e-2, 5e-2), torch.float16: (1e-2, 2e-2)}
"""How far a loss, and the length of the difference of gradients, may be from the reference, relative to it."""


def work(options: Options) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    for dtype in (torch.float32, options.dtype):
        for loss, entry in LOSSES.items():
            for top_n in (0, 30 if options.tiny else 10_000) if "top_n" in entry.reads else (0,):
                for softcap in (None, 30.0):
                    name = f"loss {loss}, {str(dtype).removeprefix('torch.')}"
                    name += f", top {top_n}" * bool(top_n) + ", soft-capped" * bool(softcap)
                    settings = LossSettings(*weights(loss), loss=loss, top_n=top_n)
                    yield name, lambda name=name, of=(settings, dtype, softcap): compared(name, *of, options)


def weights(loss: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of CE and of the divergence, as the loss has them."""
    of_label, of_teacher = LOSSES[loss].terms(DEPTHS)
    return (of_label,) * DEPTHS, (of_teacher,) * DEPTHS


def compared(name: str, settings: LossSettings, dtype: torch.dtype, softcap: float | None, options: Options) -> Outcome:
    positions, tokens, size = (24, 300, 16) if options.tiny else (96, 151_936, 1024)
    draw = torch.Generator(options.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device=options.device).to(dtype)

    students = [normal(positions, size).requires_grad_() for _ in range(DEPTHS)]
    trunk, head = normal(positions, size), Unembedding(normal(tokens, size).mul_(2 * size**-0.5), softcap=softcap)
    targets = torch.randint(tokens, (DEPTHS, positions), generator=draw, device=options.device).unbind()
    masks = [torch.arange(positions, device=options.device) < positions - k for k in range(1, DEPTHS + 1)]
    given: dict[str, Any] = {"targets_P": targets, "masks_P": masks, "settings": settings}
    ours, _ = multi_depth_loss(students, trunk, head, **given)
    found = torch.autograd.grad(ours, students)
    exact = [student.detach().double().requires_grad_() for student in students]
    wide = replace(head, weight=head.weight.double())
    theirs = reference.multi_depth_loss(exact, trunk.double(), wide, **given)
    wanted = torch.autograd.grad(theirs, exact)
    of_value = (abs(ours.double() - theirs) / abs(theirs)).item()
    apart = sum((a.double() - b).square().sum() for a, b in zip(found, wanted, strict=True))
    of_gradient = (apart / sum(each.square().sum() for each in wanted)).sqrt().item()
    kernels = on_gpu.kernels(torch.device(options.device), settings, head, head, None)
    figures = {"loss": ours.item(), "of the loss": of_value, "of the gradient": of_gradient}
    good = of_value <= WITHIN[dtype][0] and of_gradient <= WITHIN[dtype][1]
    said = f"{'sweeps' if kernels is None else 'kernels'}: off by {of_value:.1e}, its gradient by {of_gradient:.1e}"
    return Outcome(name, good, said, figures)
