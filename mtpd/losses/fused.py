"""The loss of all depths without a [T, V] tensor: the values of `reference.py`, tile by tile.

The derivation. With frozen W, the gradient of a row's loss with respect to its logits y is known as
soon as y is, so loss and gradient need one pass:

    y = finish(W h)             p = softmax(y)         q = softmax(z / τ), z = finish(W h_teacher)
    CE  = lse(y) - y_x          dCE/dy = p - 1_x
    KL  = Σ q log q - Σ q y + lse_S(y)     dKL/dy = p_S - q        (S: the teacher's top n; p_S renormalised)
    dL/dh = (dL/dy · finish'(y)) W

That is two products a head and one for the teacher. Depth k's student row t and teacher row t + k meet
in one tile because tiles run over teacher rows: each teacher row is computed once for all depths.

Legend: P flat positions, D hidden size, S rows of a tile, M vocabulary columns in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtpd import alignment
from mtpd.trunk import Unembedding

TILE_BYTES = 4 * 2**20
"""Size of one float32 tile of logits; a handful of them live at a time. Larger ones leave the cache."""


@dataclass(frozen=True)
class LossSettings:
    """alpha and beta per depth; n of the top-n set (0: all columns); teacher temperature."""

    alpha: tuple[float, ...]
    beta: tuple[float, ...]
    top_n: int = 0
    teacher_temperature: float = 1.0


@dataclass(frozen=True)
class LossSums:
    """Sums over rows, per depth [K]: what is logged beside the loss. None of them holds a graph."""

    rows: Tensor
    cross_entropy: Tensor
    divergence: Tensor
    accepted: Tensor
    """Rows whose first k drafts all equal the main head's own choice, teacher-forced."""


def multi_depth_loss(
    students_PD: Sequence[Tensor],
    trunk_PD: Tensor,
    unembedding: Unembedding,
    *,
    targets_P: Sequence[Tensor],
    masks_P: Sequence[Tensor],
    settings: LossSettings,
) -> tuple[Tensor, LossSums]:
    """Σ_k Σ_rows α_k CE + β_k KL, and the sums behind it.

    Args:
        students_PD: states of depth 1..K at flat positions, each [P, D].
        trunk_PD: the trunk's states h at the same positions [P, D]; depth k is compared with row p + k.
        unembedding: shared and frozen, over the columns in use (no padding rows, or a draft vocabulary).
        targets_P: per depth, the column of the token to predict [P], -1 where it has no column.
        masks_P: per depth, which positions count [P] bool.
        settings: weights, top-n, temperature.

    Returns:
        The summed loss (a scalar in float32 that carries gradient to `students_PD` only) and the sums.
    """
    depths = len(students_PD)
    assert len(settings.alpha) == len(settings.beta) == depths, "one alpha and one beta for each depth"
    loss, *sums = _FusedLoss.apply(
        trunk_PD.detach(), unembedding, tuple(targets_P), tuple(masks_P), settings, *students_PD
    )
    return loss, LossSums(*sums)


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        trunk_PD: Tensor,
        unembedding: Unembedding,
        targets_P: tuple[Tensor, ...],
        masks_P: tuple[Tensor, ...],
        settings: LossSettings,
        *students_PD: Tensor,
    ) -> tuple[Tensor, ...]:
        depths = len(students_PD)
        device = trunk_PD.device
        positions = trunk_PD.shape[0]
        needs_grad = any(ctx.needs_input_grad[5:])
        sums = torch.zeros(4, depths, dtype=torch.float64, device=device)
        loss = torch.zeros((), dtype=torch.float64, device=device)
        grads = [torch.zeros_like(student) if needs_grad else None for student in students_PD]

        used = torch.zeros(positions + depths, dtype=torch.bool, device=device)
        for k, mask in enumerate(masks_P, start=1):
            used[k : k + positions] |= mask
        # A mask never reaches past its document, so a teacher row is always inside.
        teacher_rows = used.nonzero().squeeze(1)
        # accepted_so_far[p]: every depth up to the last one drafted from p what the main head chose.
        accepted_so_far = torch.ones(positions, dtype=torch.bool, device=device)
        chosen = torch.full((positions + depths,), -1, dtype=torch.long, device=device)
        drafted = torch.full((depths, positions), -2, dtype=torch.long, device=device)

        tile = max(1, TILE_BYTES // (4 * unembedding.weight.shape[0]))
        for rows in teacher_rows.split(tile):
            z = _exact(unembedding(trunk_PD[rows]))
            chosen[rows] = z.argmax(1)
            teacher = _Teacher(z, settings)
            for k in range(1, depths + 1):
                at = rows - k
                inside = at >= 0
                keep = inside & masks_P[k - 1][at.clamp_min(0)]
                if not bool(keep.any()):
                    continue
                at = at[keep]
                every = bool(keep.all())
                student = students_PD[k - 1][at]
                y = _exact(unembedding(student))
                alpha, beta = settings.alpha[k - 1], settings.beta[k - 1]
                ce, kl, drafted[k - 1, at], dy = teacher.compare(
                    y, targets_P[k - 1][at], None if every else keep, alpha, beta, needs_grad
                )
                sums[0, k - 1] += len(at)
                sums[1, k - 1] += ce
                sums[2, k - 1] += kl
                loss += alpha * ce + beta * kl
                if dy is not None:
                    if unembedding.softcap is not None:
                        dy *= 1.0 - (y / unembedding.softcap) ** 2
                    if unembedding.scale != 1.0:
                        dy *= unembedding.scale
                    weight = unembedding.weight
                    grad: Any = grads[k - 1]
                    grad[at] = (dy.to(weight.dtype) @ weight).to(grad.dtype)
        for k in range(1, depths + 1):
            mask = masks_P[k - 1]
            accepted_so_far &= (
                drafted[k - 1] == chosen[alignment.teacher_row(torch.arange(positions, device=device), k)]
            )
            sums[3, k - 1] = (accepted_so_far & mask).sum()
        ctx.save_for_backward(*[g for g in grads if g is not None])
        exact = torch.promote_types(students_PD[0].dtype, torch.float32)
        logged = sums.to(exact).unbind(0)
        ctx.mark_non_differentiable(*logged)
        return loss.to(exact), *logged

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Any, ...]:
        return (None, None, None, None, None, *(grad_loss.to(g.dtype) * g for g in ctx.saved_tensors))


def _exact(logits: Tensor) -> Tensor:
    """float32, or float64 where the inputs are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _Teacher:
    """One tile of teacher rows: computed once, compared with every depth."""

    def __init__(self, z: Tensor, settings: LossSettings) -> None:
        self.kept: Tensor | None = None
        self.q: Tensor | None = None
        if not any(settings.beta):
            return
        if 0 < settings.top_n < z.shape[1]:
            # The set of the n largest by its smallest member: found by selection, without sorting.
            threshold = z.kthvalue(z.shape[1] - settings.top_n + 1, dim=1).values
            self.kept = z >= threshold[:, None]
        if settings.teacher_temperature != 1.0:
            z = z / settings.teacher_temperature
        self.q, lse, _ = _softmax(z, self.kept)
        self.negative_entropy = (self.q * z).sum(1) - lse

    def compare(
        self, y: Tensor, target: Tensor, keep: Tensor | None, alpha: float, beta: float, needs_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Summed CE, summed KL, the student's choice [S] and the gradient of α CE + β KL in y [S, M]."""
        p, lse, choice = _softmax(y, None)
        known = target >= 0
        column = target.clamp_min(0)[:, None]
        ce = torch.where(known, lse - y.gather(1, column).squeeze(1), 0.0).sum()
        kl = y.new_zeros(())
        dy: Tensor | None = None
        weight = (alpha * known.to(y.dtype))[:, None]
        if self.q is None:
            dy = p.mul_(weight) if needs_grad else None
        else:
            q, kept, negative_entropy = self.q, self.kept, self.negative_entropy
            if keep is not None:
                q, negative_entropy = q[keep], negative_entropy[keep]
                kept = None if kept is None else kept[keep]
            p_inside, lse_inside = p, lse
            if kept is not None:
                p_inside, lse_inside, _ = _softmax(y, kept)
            kl = (negative_entropy - (q * y).sum(1) + lse_inside).sum()
            if needs_grad:
                if kept is None:
                    dy = p.mul_(weight + beta).sub_(q, alpha=beta)
                else:
                    dy = p.mul_(weight).add_(p_inside.sub_(q), alpha=beta)
        if dy is not None and alpha:
            dy.scatter_add_(1, column, -weight)
        return ce, kl, choice, dy


def _softmax(y: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax [S, M] (zero outside `kept`), log-sum-exp [S] and arg-max [S] in two sweeps.

    The log-sum-exp comes from the largest entry, whose probability is at least 1/M and so exact to
    rounding: `exp` and `logsumexp` of their own would cost three times the softmax kernel on a CPU.
    """
    if kept is not None:
        y = y.masked_fill(~kept, -torch.inf)
    p = torch.softmax(y, dim=1)
    largest, choice = y.max(1)
    return p, largest - p.gather(1, choice[:, None]).squeeze(1).log(), choice
