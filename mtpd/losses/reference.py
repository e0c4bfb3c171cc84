"""Each loss in the few lines that the paper has. This is the oracle; `fused.py` is what training runs.

All take logits in float and give one value a row. Legend: N rows, V vocabulary (or draft vocabulary).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(student_NV: Tensor, target_N: Tensor) -> Tensor:
    """-log p(x), and 0 where the label x lies outside of the columns (target < 0). [N]"""
    return F.cross_entropy(student_NV, target_N.clamp_min(-1), ignore_index=-1, reduction="none")


def top_n(teacher_NV: Tensor, n: int) -> Tensor:
    """Which columns are among the teacher's n largest; all of them when n is 0 or no fewer than V. [N, V] bool"""
    if n == 0 or n >= teacher_NV.shape[1]:
        return torch.ones_like(teacher_NV, dtype=torch.bool)
    smallest = teacher_NV.topk(n, dim=1).values[:, -1:]
    return teacher_NV >= smallest


def forward_kl(student_NV: Tensor, teacher_NV: Tensor, *, n: int = 0, teacher_temperature: float = 1.0) -> Tensor:
    """KL(q~ || p~): teacher q and student p, both renormalised over the teacher's top n. [N]

    MTP-D (arXiv 2603.23911), L_KL: forward direction, teacher detached, temperature 1.
    """
    kept = top_n(teacher_NV, n)
    log_q = F.log_softmax((teacher_NV.detach() / teacher_temperature).masked_fill(~kept, -torch.inf), dim=1)
    log_p = F.log_softmax(student_NV.masked_fill(~kept, -torch.inf), dim=1)
    return torch.where(kept, log_q.exp() * (log_q - log_p), 0.0).sum(1)


def mtp_d(
    student_NV: Tensor,
    teacher_NV: Tensor,
    target_N: Tensor,
    *,
    alpha: float,
    beta: float,
    n: int = 0,
    teacher_temperature: float = 1.0,
) -> Tensor:
    """alpha * CE + beta * KL for one depth (MTP-D; alpha 0.3, beta 1.0 for one head and 0.5 for four). [N]"""
    labels = cross_entropy(student_NV, target_N)
    return alpha * labels + beta * forward_kl(student_NV, teacher_NV, n=n, teacher_temperature=teacher_temperature)


def acceptance(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """Σ_x min(p(x), q(x)): the chance that rejection sampling accepts a draft (Leviathan et al., 2211.17192). [N]"""
    return torch.minimum(student_NV.softmax(1), teacher_NV.softmax(1)).sum(1)
