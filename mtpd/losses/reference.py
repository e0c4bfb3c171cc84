"""The loss of all depths with all logits of a depth at once and autograd for the gradient.

This is the oracle; `fused.py` is what training runs. The formula of each loss is in `kinds.py`.

Legend: N rows, P flat positions, D hidden size, V tokens, M columns in use (V, or a draft vocabulary), K depths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mtpd import alignment
from mtpd.losses.settings import LossSettings
from mtpd.trunk import Unembedding

Logits = Callable[[int, Tensor], Tensor]
"""(place of a depth from 0 on, positions [N]) -> logits in float."""


def cross_entropy(student_NM: Tensor, target_N: Tensor) -> Tensor:
    """-log p(x), and 0 where the label x lies outside of the columns (target < 0). [N]"""
    return F.cross_entropy(student_NM, target_N.clamp_min(-1), ignore_index=-1, reduction="none")


def divergence(student_NM: Tensor, teacher_NV: Tensor, settings: LossSettings, *, columns_M: Tensor | None) -> Tensor:
    """D of each row [N]. Where depths are joined, it is the D of this one by itself."""
    entry = settings.entry
    assert entry.reference is not None, "the loss is cross-entropy alone"
    arguments: dict[str, Any] = {"n": settings.top_n} if "top_n" in entry.reads else {}
    if entry.true_probabilities:
        arguments["columns_M"] = columns_M
    return entry.reference(student_NM, teacher_NV, teacher_temperature=settings.teacher_temperature, **arguments)


def loss_of_logits(
    student: Logits,
    teacher: Logits,
    *,
    targets_P: Sequence[Tensor],
    masks_P: Sequence[Tensor],
    settings: LossSettings,
    columns_M: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Σ_k Σ_rows α_k CE + β_k D, and beside it the sums of CE and D of each depth [2, K], without a graph.

    Args:
        student: logits [N, M] of a depth.
        teacher: logits of the teacher rows that they are compared with, [N, V] for losses of its true probabilities,
            else [N, M]. Not asked for where CE is the whole loss.
        targets_P, masks_P, columns_M: as `fused.multi_depth_loss` takes them.
    """
    device = masks_P[0].device
    total = torch.zeros((), device=device)
    sums = torch.zeros(2, len(masks_P), dtype=torch.float64, device=device)
    accepted: list[Tensor] = []
    for k, (target_P, mask_P) in enumerate(zip(targets_P, masks_P, strict=True)):
        at = mask_P.nonzero().squeeze(1)
        y = student(k, at)
        if any(settings.beta):
            with torch.no_grad():
                z = teacher(k, at)
            value = divergence(y, z, settings, columns_M=columns_M)
            sums[1, k] = value.detach().sum()
            if settings.entry.join is not None:
                accepted.append(torch.ones_like(mask_P, dtype=y.dtype).index_put((at,), 1.0 - value))
            else:
                total = total + settings.beta[k] * value.sum()
        ce = cross_entropy(y, target_P[at])
        sums[0, k] = ce.detach().sum()
        if settings.alpha[k]:
            total = total + settings.alpha[k] * ce.sum()
    if settings.entry.join is not None and accepted:
        counted_KP = torch.stack(list(masks_P))
        total = total + settings.entry.join(torch.stack(accepted), counted_KP, settings.depth_weights).sum()
    return total, sums


def multi_depth_loss(
    students_PD: Sequence[Tensor],
    trunk_PD: Tensor,
    unembedding: Unembedding,
    *,
    targets_P: Sequence[Tensor],
    masks_P: Sequence[Tensor],
    settings: LossSettings,
    after: int = 0,
    main_head: Unembedding | None = None,
    columns_M: Tensor | None = None,
) -> Tensor:
    """Computes what `fused.multi_depth_loss` does.

    Args: as there.
    """

    def logits(head: Unembedding, states: Tensor) -> Tensor:
        return head(states).to(torch.promote_types(states.dtype, torch.float32))

    draft = columns_M is not None and settings.true_probabilities
    teacher_head = main_head if draft and main_head is not None else unembedding
    loss, _ = loss_of_logits(
        lambda k, at: logits(unembedding, students_PD[k][at]),
        lambda k, at: logits(teacher_head, trunk_PD[alignment.teacher_row(at, after + k + 1)]),
        targets_P=targets_P,
        masks_P=masks_P,
        settings=settings,
        columns_M=columns_M,
    )
    return loss
