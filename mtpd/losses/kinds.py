"""The losses: of each, the formula of its paper, its twin for a tile of the fused loss, and its entry.

To add one, write these three here, or in a file of your own that you import before the recipe is read. A twin takes
one tile of a student and of its teacher rows, and gives D of each row and dD/dy. With p = softmax(y), a gradient g in
p becomes dD/dy = p · (g - Σ p g) in y; what the twins compute is this, written out:

    KL          D = Σ q log q - Σ q y + lse(y)       dD/dy = p - q
    reverse KL  D = Σ p r,  r = log p - log q        dD/dy = p (r - D)
    JSD         D = π KL(q || m) + (1-π) KL(p || m)  dD/dy = (1-π) p (r - Σ p r),  r = log p - log m
    TV          D = 1 - Σ min(p, q)                  dD/dy = ½ p (Σ p s - s),  s = sign(q - p)

The functions use methods of tensors and nothing of torch itself, because recipes read the entries without it.

Legend: N rows, P flat positions, S rows of a tile, M columns in use (V, or a draft vocabulary), V tokens, K depths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mtpd.losses.settings import ESTIMATE_ROWS, Loss, LossSettings, Student, Teacher, register

if TYPE_CHECKING:
    from torch import Tensor

TRUE = frozenset({"teacher_temperature"})
RENORMALISED = TRUE | {"top_n"}
"""What divergences read: of the teacher's true probabilities, and of those renormalised over its top n."""
MTP_D_ALPHA, MTP_D_BETA = 0.3, 0.5
"""Weights of CE and KL in MTP-D; a single head has a KL of weight 1."""
JSD_MIX = 0.5
"""π, the share of the teacher in the mixture: both sides alike."""
LK_ETA = 3.0
"""η, how fast LK goes from KL to TV."""


def top_n(teacher_NM: Tensor, n: int) -> Tensor:
    """Marks the columns among the teacher's n largest; all of them when n is 0 or no fewer than M. [N, M] bool"""
    if n == 0 or n >= teacher_NM.shape[1]:
        return teacher_NM.new_ones(teacher_NM.shape).bool()
    smallest = teacher_NM.topk(n, dim=1).values[:, -1:]
    return teacher_NM >= smallest


def log_probabilities(
    student_NM: Tensor, teacher_NM: Tensor, *, n: int = 0, teacher_temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """log p, log q and which columns they are over: both renormalised over the teacher's top n, q detached."""
    y, z = student_NM, teacher_NM.detach() / teacher_temperature
    kept = top_n(teacher_NM, n)
    if kept.all():
        return y.log_softmax(1), z.log_softmax(1), kept
    log_p = y.masked_fill(~kept, -math.inf).log_softmax(1)
    log_q = z.masked_fill(~kept, -math.inf).log_softmax(1)
    # Columns left out: 0 times a finite number.
    return log_p.masked_fill(~kept, 0.0), log_q.masked_fill(~kept, 0.0), kept


def forward_kl(student_NM: Tensor, teacher_NM: Tensor, **settings: Any) -> Tensor:
    """KL(q || p), with teacher q and student p. [N]

    MTP-D (arXiv 2603.23911), L_KL: forward direction, teacher detached, top n, temperature 1.
    """
    log_p, log_q, kept = log_probabilities(student_NM, teacher_NM, **settings)
    return (kept * log_q.exp() * (log_q - log_p)).sum(1)


def forward_kl_tile(
    student: Student, teacher: Teacher, settings: LossSettings, weight: Tensor
) -> tuple[Tensor, Tensor]:
    value = teacher.negative_entropy - (teacher.q * student.y).sum(1) + student.lse
    return value, student.p - teacher.q


def reverse_kl(student_NM: Tensor, teacher_NM: Tensor, **settings: Any) -> Tensor:
    """KL(p || q): punishes what the student likes and the teacher does not (MiniLLM, arXiv 2306.08543). [N]"""
    log_p, log_q, kept = log_probabilities(student_NM, teacher_NM, **settings)
    return (kept * log_p.exp() * (log_p - log_q)).sum(1)


def reverse_kl_tile(
    student: Student, teacher: Teacher, settings: LossSettings, weight: Tensor
) -> tuple[Tensor, Tensor]:
    assert teacher.z is not None
    ratio = (student.y - teacher.z).add_((teacher.lse - student.lse)[:, None])
    value = (student.p * ratio).sum(1)
    return value, ratio.sub_(value[:, None]).mul_(student.p)


def jsd(student_NM: Tensor, teacher_NM: Tensor, **settings: Any) -> Tensor:
    """π · KL(q || m) + (1 - π) · KL(p || m), m = π · q + (1 - π) · p (GKD, arXiv 2306.13649, eq. 1). [N]"""
    log_p, log_q, kept = log_probabilities(student_NM, teacher_NM, **settings)
    log_m = (log_q + math.log(JSD_MIX)).logaddexp(log_p + math.log(1 - JSD_MIX))
    terms = JSD_MIX * log_q.exp() * (log_q - log_m) + (1 - JSD_MIX) * log_p.exp() * (log_p - log_m)
    return (kept * terms).sum(1)


def jsd_tile(student: Student, teacher: Teacher, settings: LossSettings, weight: Tensor) -> tuple[Tensor, Tensor]:
    assert teacher.z is not None
    log_p = student.y - student.lse[:, None]
    log_q = teacher.z - teacher.lse[:, None]
    log_m = (log_q + math.log(JSD_MIX)).logaddexp(log_p + math.log(1 - JSD_MIX))
    of_teacher = (log_q.sub_(log_m).mul_(teacher.q)).sum(1)
    ratio = log_p.sub_(log_m)
    of_student = (student.p * ratio).sum(1)
    value = JSD_MIX * of_teacher + (1 - JSD_MIX) * of_student
    return value, ratio.sub_(of_student[:, None]).mul_(student.p).mul_(1 - JSD_MIX)


def acceptance(
    student_NM: Tensor,
    teacher_NV: Tensor,
    *,
    columns_M: Tensor | None = None,
    teacher_temperature: float = 1.0,
) -> Tensor:
    """Σ_x min(p(x), q(x)): the chance that rejection sampling accepts a draft (Leviathan et al., 2211.17192). [N]

    Args:
        columns_M: token ids of the student's columns, where it has a draft vocabulary: p is 0 elsewhere, and q is
            the teacher's probability among all tokens.
    """
    p = student_NM.softmax(1)
    q = (teacher_NV.detach() / teacher_temperature).softmax(1)
    return p.minimum(q if columns_M is None else q[:, columns_M]).sum(1)


def tv(student_NM: Tensor, teacher_NV: Tensor, *, columns_M: Tensor | None = None, **settings: Any) -> Tensor:
    """TV(p, q) = 1 - Σ min(p, q). [N]"""
    return 1.0 - acceptance(student_NM, teacher_NV, columns_M=columns_M, **settings)


def tv_tile(student: Student, teacher: Teacher, settings: LossSettings, weight: Tensor) -> tuple[Tensor, Tensor]:
    q = teacher.q if teacher.mass is None else teacher.q * teacher.mass[:, None]
    value = 1.0 - student.p.minimum(q).sum(1)
    sign = (q - student.p).sign_()
    mean = (student.p * sign).sum(1)
    return value, sign.sub_(mean[:, None]).mul_(student.p).mul_(-0.5)


def lk_weight(accepted_N: Tensor) -> Tensor:
    """λ = exp(-η · sg[α]) of a depth (LK, arXiv 2602.23881), α the mean acceptance of its rows in the batch.

    The mean is over every s-th row, s the least that leaves `ESTIMATE_ROWS` at most: λ has to be known before
    the one pass that computes the gradient, and a few rows give α to two or three hundredths.
    """
    stride = max(1, -(-len(accepted_N) // ESTIMATE_ROWS))
    return (-LK_ETA * accepted_N.detach()[::stride].mean()).exp()


def lk(student_NM: Tensor, teacher_NV: Tensor, *, columns_M: Tensor | None = None, **settings: Any) -> Tensor:
    """λ · KL(q || p) + (1 - λ) · TV(p, q) for the rows of one depth (arXiv 2602.23881). [N]

    With a draft vocabulary, q is renormalised over it in the KL, and is the true one in the TV.
    """
    accepted = acceptance(student_NM, teacher_NV, columns_M=columns_M, **settings)
    weight = lk_weight(accepted)
    teacher_NM = teacher_NV if columns_M is None else teacher_NV[:, columns_M]
    return weight * forward_kl(student_NM, teacher_NM, **settings) + (1.0 - weight) * (1.0 - accepted)


def lk_tile(student: Student, teacher: Teacher, settings: LossSettings, weight: Tensor) -> tuple[Tensor, Tensor]:
    of_kl, grad_kl = forward_kl_tile(student, teacher, settings, weight)
    of_tv, grad_tv = tv_tile(student, teacher, settings, weight)
    return of_tv.lerp(of_kl, weight), grad_tv.lerp_(grad_kl, weight)


def end_to_end_tv(accepted_KP: Tensor, counted_KP: Tensor, weights: Sequence[float]) -> Tensor:
    """Σ_k w_k (1 - Π_{i<=k} (1 - TV_i)) at each position, over the depths that count there. [P]

    With equal weights, and where all K depths count, it is 1 - (1/K) Σ_k Π_{i<=k} (1 - TV_i): Bebop
    (arXiv 2606.12370). Where a depth counts, those before it do.

    Args:
        accepted_KP: 1 - TV of each depth.
        weights: w_k, with sum 1.
    """
    chance_KP = accepted_KP.cumprod(0)
    lost_KP = counted_KP * (1.0 - chance_KP)
    # Numbers of the host times tensors: no copy that a device waits for.
    total_P = lost_KP[0] * weights[0]
    for lost_P, weight in zip(lost_KP[1:], weights[1:], strict=True):
        total_P = total_P + weight * lost_P
    return total_P


KL = Loss(
    "kl",
    "the KL divergence of a head from the main head, KL(main head || head)",
    reads=RENORMALISED,
    reference=forward_kl,
    twin=forward_kl_tile,
)
TV = Loss(
    "tv",
    "one minus the chance that rejection sampling accepts",
    reads=TRUE,
    reference=tv,
    twin=tv_tile,
    true_probabilities=True,
)
register(
    replace(
        KL,
        name="mtp_d",
        about="0.3 CE + 0.5 KL, and 0.3 CE + KL for one head (MTP-D, arXiv 2603.23911)",
        reads=KL.reads | {"beta"},
        terms=lambda depth: (MTP_D_ALPHA, 1.0 if depth == 1 else MTP_D_BETA),
        logged=KL.name,
    )
)
register(Loss("ce", "the cross-entropy of the true token", terms=lambda depth: (1.0, 0.0)))
register(KL)
register(
    Loss(
        "reverse_kl",
        "KL(head || main head)",
        reads=RENORMALISED,
        reference=reverse_kl,
        twin=reverse_kl_tile,
        log_q=True,
    )
)
register(
    Loss(
        "jsd",
        "the Jensen-Shannon divergence of the two",
        reads=RENORMALISED,
        reference=jsd,
        twin=jsd_tile,
        log_q=True,
    )
)
register(TV)
register(
    Loss(
        "lk",
        "from kl to tv as acceptance grows",
        reads=TRUE,
        reference=lk,
        twin=lk_tile,
        true_probabilities=True,
        mixture=lk_weight,
    )
)
register(
    # The product over depths is known after the pass: it scales whole rows of the gradient of the TV.
    replace(
        TV,
        name="end_to_end_tv",
        about="one minus the mean chance that a draft is accepted up to depth k",
        join=end_to_end_tv,
        logged=TV.name,
    )
)
