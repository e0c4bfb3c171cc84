"""Each loss in the few lines that the paper has. This is the oracle; `fused.py` is what training runs.

Those of one depth take logits in float and give one value a row.

Legend: N rows, P flat positions, D hidden size, V tokens, M columns in use (V, or a draft vocabulary).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mtpd import alignment
from mtpd.losses.settings import ESTIMATE_ROWS, LossSettings
from mtpd.trunk import Unembedding


def cross_entropy(student_NM: Tensor, target_N: Tensor) -> Tensor:
    """-log p(x), and 0 where the label x lies outside of the columns (target < 0). [N]"""
    return F.cross_entropy(student_NM, target_N.clamp_min(-1), ignore_index=-1, reduction="none")


def top_n(teacher_NM: Tensor, n: int) -> Tensor:
    """Which columns are among the teacher's n largest; all of them when n is 0 or no fewer than M. [N, M] bool"""
    if n == 0 or n >= teacher_NM.shape[1]:
        return torch.ones_like(teacher_NM, dtype=torch.bool)
    smallest = teacher_NM.topk(n, dim=1).values[:, -1:]
    return teacher_NM >= smallest


def log_probabilities(
    student_NM: Tensor,
    teacher_NM: Tensor,
    *,
    n: int = 0,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """log p, log q and which columns they are over: both renormalised over the teacher's top n, q detached."""
    y, z = student_NM / student_temperature, teacher_NM.detach() / teacher_temperature
    kept = top_n(teacher_NM, n)
    if kept.all():
        return F.log_softmax(y, dim=1), F.log_softmax(z, dim=1), kept
    log_p = F.log_softmax(y.masked_fill(~kept, -torch.inf), dim=1)
    log_q = F.log_softmax(z.masked_fill(~kept, -torch.inf), dim=1)
    # Columns left out: 0 times a finite number.
    return log_p.masked_fill(~kept, 0.0), log_q.masked_fill(~kept, 0.0), kept


def forward_kl(student_NM: Tensor, teacher_NM: Tensor, **settings: Any) -> Tensor:
    """KL(q || p), with teacher q and student p. [N]

    MTP-D (arXiv 2603.23911), L_KL: forward direction, teacher detached, top n, temperature 1.
    """
    log_p, log_q, kept = log_probabilities(student_NM, teacher_NM, **settings)
    return (kept * log_q.exp() * (log_q - log_p)).sum(1)


def reverse_kl(student_NM: Tensor, teacher_NM: Tensor, **settings: Any) -> Tensor:
    """KL(p || q): punishes what the student likes and the teacher does not (MiniLLM, arXiv 2306.08543). [N]"""
    log_p, log_q, kept = log_probabilities(student_NM, teacher_NM, **settings)
    return (kept * log_p.exp() * (log_p - log_q)).sum(1)


def jsd(student_NM: Tensor, teacher_NM: Tensor, *, mix: float = 0.5, **settings: Any) -> Tensor:
    """mix · KL(q || m) + (1 - mix) · KL(p || m), m = mix · q + (1 - mix) · p (GKD, arXiv 2306.13649, eq. 1). [N]"""
    log_p, log_q, kept = log_probabilities(student_NM, teacher_NM, **settings)
    log_m = torch.logaddexp(log_q + math.log(mix), log_p + math.log(1 - mix))
    terms = mix * log_q.exp() * (log_q - log_m) + (1 - mix) * log_p.exp() * (log_p - log_m)
    return (kept * terms).sum(1)


def mtp_d(
    student_NM: Tensor,
    teacher_NM: Tensor,
    target_N: Tensor,
    *,
    alpha: float,
    beta: float,
    **settings: Any,
) -> Tensor:
    """alpha * CE + beta * KL for one depth (MTP-D; alpha 0.3, beta 1.0 for one head and 0.5 for four). [N]"""
    return alpha * cross_entropy(student_NM, target_N) + beta * forward_kl(student_NM, teacher_NM, **settings)


def acceptance(
    student_NM: Tensor,
    teacher_NV: Tensor,
    *,
    columns_M: Tensor | None = None,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
) -> Tensor:
    """Σ_x min(p(x), q(x)): the chance that rejection sampling accepts a draft (Leviathan et al., 2211.17192). [N]

    Args:
        columns_M: token ids of the student's columns, where it has a draft vocabulary: p is 0 elsewhere, and q is
            the teacher's probability among all tokens.
    """
    p = (student_NM / student_temperature).softmax(1)
    q = (teacher_NV.detach() / teacher_temperature).softmax(1)
    return torch.minimum(p, q if columns_M is None else q[:, columns_M]).sum(1)


def tv(student_NM: Tensor, teacher_NV: Tensor, *, columns_M: Tensor | None = None, **settings: Any) -> Tensor:
    """TV(p, q) = 1 - Σ min(p, q). [N]"""
    return 1.0 - acceptance(student_NM, teacher_NV, columns_M=columns_M, **settings)


def lk_weight(accepted_N: Tensor, eta: float) -> Tensor:
    """λ = exp(-eta · sg[α]) of a depth (LK, arXiv 2602.23881), α the mean acceptance of its rows in the batch.

    The mean is over every s-th row, s the least that leaves `ESTIMATE_ROWS` at most: λ has to be known before
    the one pass that computes the gradient, and a few rows give α to two or three hundredths.
    """
    stride = max(1, -(-len(accepted_N) // ESTIMATE_ROWS))
    return torch.exp(-eta * accepted_N.detach()[::stride].mean())


def lk(
    student_NM: Tensor, teacher_NV: Tensor, *, eta: float = 3.0, columns_M: Tensor | None = None, **settings: Any
) -> Tensor:
    """λ · KL(q || p) + (1 - λ) · TV(p, q) for the rows of one depth (arXiv 2602.23881). [N]

    With a draft vocabulary, q is renormalised over it in the KL, and is the true one in the TV.
    """
    accepted = acceptance(student_NM, teacher_NV, columns_M=columns_M, **settings)
    weight = lk_weight(accepted, eta)
    teacher_NM = teacher_NV if columns_M is None else teacher_NV[:, columns_M]
    return weight * forward_kl(student_NM, teacher_NM, **settings) + (1.0 - weight) * (1.0 - accepted)


def end_to_end_tv(accepted_KP: Tensor, counted_KP: Tensor, weights: Sequence[float]) -> Tensor:
    """Σ_k w_k (1 - Π_{i<=k} (1 - TV_i)) at each position, over the depths that count there. [P]

    With equal weights, and where all K depths count, it is 1 - (1/K) Σ_k Π_{i<=k} (1 - TV_i): Bebop
    (arXiv 2606.12370). Where a depth counts, those before it do.

    Args:
        accepted_KP: 1 - TV of each depth.
        weights: w_k, with sum 1.
    """
    chance_KP = accepted_KP.cumprod(0)
    return (accepted_KP.new_tensor(weights)[:, None] * counted_KP * (1.0 - chance_KP)).sum(0)


RENORMALISED: dict[str, Callable[..., Tensor]] = {"kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}


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
    """What `fused.multi_depth_loss` computes, with all logits of a depth at once and autograd for the gradient.

    Args: as there.
    """

    def logits(head: Unembedding, states: Tensor) -> Tensor:
        return head(states).to(torch.promote_types(states.dtype, torch.float32))

    temperatures = {
        "teacher_temperature": settings.teacher_temperature,
        "student_temperature": settings.student_temperature,
    }
    draft = columns_M is not None and settings.true_probabilities
    teacher_head = main_head if draft and main_head is not None else unembedding
    losses: list[Tensor] = []
    accepted: list[Tensor] = []
    for k, (student_PD, mask) in enumerate(zip(students_PD, masks_P, strict=True), start=1):
        at = mask.nonzero().squeeze(1)
        y = logits(unembedding, student_PD[at])
        alpha, beta = settings.alpha[k - 1], settings.depth_weights[k - 1]
        if alpha:
            losses.append(alpha * cross_entropy(y, targets_P[k - 1][at]).sum())
        if not any(settings.beta):
            continue
        z = logits(teacher_head, trunk_PD[alignment.teacher_row(at, after + k)])
        if settings.divergence == "end_to_end_tv":
            value = acceptance(y, z, columns_M=columns_M, **temperatures)
            accepted.append(torch.ones_like(mask, dtype=value.dtype).index_put((at,), value))
            continue
        if settings.divergence in RENORMALISED:
            extra = {"mix": settings.mix} if settings.divergence == "jsd" else {}
            values = RENORMALISED[settings.divergence](y, z, n=settings.top_n, **extra, **temperatures)
        elif settings.divergence == "tv":
            values = tv(y, z, columns_M=columns_M, **temperatures)
        else:
            values = lk(y, z, eta=settings.eta, columns_M=columns_M, **temperatures)
        losses.append(beta * values.sum())
    if accepted:
        counted_KP = torch.stack(list(masks_P))
        losses.append(end_to_end_tv(torch.stack(accepted), counted_KP, settings.depth_weights).sum())
    return torch.stack(losses).sum()
