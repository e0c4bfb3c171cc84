"""Tiles of logits: the value of a loss and its gradient in the logits, each in a few sweeps over the tile.

What a divergence computes there is its twin in `kinds.py`.

Sweeps are counted: on a CPU they cost as much as the matrix products in bfloat16. So the log-sum-exp comes out of
the softmax, the arg-max out of the maxima of blocks, and factors that a whole row has wait for the [S, D] product.

Legend: S rows of the tile, M columns in use, V tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtpd.losses.settings import LossSettings, Student, Teacher
from mtpd.trunk import Unembedding

BLOCK = 64
"""Columns in a block of the arg-max."""


class Sweeps:
    """A block of logits, tile by tile.

    Args:
        rows: of a tile.
        compiled: runs the sweeps over a tile as code of torch.compile.
    """

    def __init__(
        self,
        settings: LossSettings,
        teacher_head: Unembedding,
        unembedding: Unembedding,
        columns_M: Tensor | None,
        *,
        rows: int,
        compiled: bool,
    ) -> None:
        self.settings, self.columns_M, self.rows = settings, columns_M, rows
        self.teacher_head, self.unembedding = teacher_head, unembedding
        functions: tuple[Any, Any] = _compiled() if compiled else (teacher_tile, compare)
        self._teacher_tile, self._compare = functions

    def teacher(self, logits_RV: Tensor) -> tuple[list[Teacher | None], Tensor]:
        """What students are compared with, by tile, and the main head's choice of each row."""
        tiles = [
            self._teacher_tile(part, self.teacher_head, self.settings, self.columns_M)
            for part in logits_RV.split(self.rows)
        ]
        return [teacher for teacher, _ in tiles], _joined([choice for _, choice in tiles])

    def compare(
        self,
        logits_RM: Tensor,
        teacher: list[Teacher | None],
        target_R: Tensor,
        *,
        depth: Depth,
        mixture: Tensor,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes `compare` for rows of one depth, whose teacher rows are the first ones of the block."""
        exact = torch.promote_types(logits_RM.dtype, torch.float32)
        label_weight = torch.full((), depth.label_weight, dtype=exact, device=logits_RM.device)
        results = [
            self._compare(
                part,
                None if of_tile is None else of_tile.rows(len(part)),
                wanted,
                label_weight,
                mixture,
                self.unembedding,
                self.settings,
                diverges=depth.diverges,
                needs_grad=needs_grad,
            )
            for part, of_tile, wanted in zip(
                logits_RM.split(self.rows), teacher, target_R.split(self.rows), strict=False
            )
        ]
        ce, value, choice = (_joined(parts) for parts in zip(*results, strict=True))
        return ce, value, choice


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all tiles; without a copy where there is one, as on a GPU."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


@functools.cache
def _compiled() -> tuple[Any, Any]:
    """The sweeps as code of torch.compile, for any number of rows."""
    return torch.compile(teacher_tile, dynamic=True), torch.compile(compare, dynamic=True)


def teacher_tile(
    logits_SV: Tensor, head: Unembedding, settings: LossSettings, columns_M: Tensor | None
) -> tuple[Teacher | None, Tensor]:
    """Computes what all depths are compared with (None where CE is the whole loss), and the main head's choice [S].

    Args:
        logits_SV: the main head's product, before `finish`: over the columns in use, or over all tokens.
        head: for what follows the product.
        columns_M: the columns in use among those of `logits_SV`, or None if they are the same.
    """
    z = finished(logits_SV, head)
    if not any(settings.beta):
        return None, argmax(z)
    z = scaled(z, settings.teacher_temperature)
    mass: Tensor | None = None
    if columns_M is not None:
        everything = z.logsumexp(1)
        z = z.index_select(1, columns_M)
    outside: Tensor | None = None
    if 0 < settings.top_n < z.shape[1]:
        outside = (z < nth_largest(z, settings.top_n)[:, None]).to(z.dtype).mul_(torch.finfo(z.dtype).min / 2)
    q, lse, choice = softmax(z, outside)
    if columns_M is not None:
        mass = torch.exp(lse - everything)
    negative_entropy = (q * z).sum(1) - lse
    return Teacher(z if settings.entry.log_q else None, q, lse, negative_entropy, outside, mass), choice


def compare(
    logits_SM: Tensor,
    teacher: Teacher | None,
    target_S: Tensor,
    label_weight: Tensor,
    weight: Tensor,
    head: Unembedding,
    settings: LossSettings,
    *,
    diverges: bool,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """CE, D and the student's choice of each row; overwrites the logits with the gradient of their sum.

    The gradient lacks what is the same for the whole tile, `Depth.factor`.

    Args:
        logits_SM: the student's product, before `finish`.
        teacher: its rows, or None for a loss that is CE alone.
        target_S: the column of the label, -1 where it has none.
        label_weight: weight of CE where D has weight 1; a scalar.
        weight: λ of a loss that mixes two divergences; a scalar.
        diverges: whether D has a weight at this depth. If not, it is a number to log, and CE has weight 1.

    Returns:
        CE [S], D [S] (0 without a teacher) and the choice [S].
    """
    y = finished(logits_SM, head)
    p, lse, choice = softmax(y, None)
    known = target_S >= 0
    column = target_S.clamp_min(0)[:, None]
    ce = torch.where(known, lse - y.gather(1, column).squeeze(1), 0.0)
    labels = (label_weight * known)[:, None]
    if teacher is None:
        value, grad = torch.zeros_like(ce), p * labels
    else:
        student = Student(y, p, lse)
        if teacher.outside is not None:
            inside, inside_lse, _ = softmax(y, teacher.outside)
            student = Student(y, inside, inside_lse)
        twin = settings.entry.twin
        assert twin is not None, "the loss is cross-entropy alone"
        value, grad = twin(student, teacher, settings, weight)
        if not diverges:
            grad = p * labels
        elif any(settings.alpha):
            grad.addcmul_(p, labels)
    if needs_grad:
        if any(settings.alpha):
            grad.scatter_add_(1, column, -labels)
        if head.softcap is not None:
            grad = grad * (1.0 - (y / head.softcap) ** 2)
        logits_SM.copy_(grad)
    return ce, value, choice


class Depth(NamedTuple):
    """How `compare` treats a depth, and what it leaves out of the gradient for the whole tile."""

    diverges: bool
    label_weight: float
    factor: float

    @classmethod
    def of(cls, settings: LossSettings, depth: int, head: Unembedding) -> Depth:
        """For depth 1..K."""
        alpha, beta = settings.alpha[depth - 1], settings.beta[depth - 1]
        if settings.entry.join is not None:
            # The weights are in the factors that come after the pass.
            beta = 1.0
        if not beta:
            return cls(False, 1.0, alpha * head.scale)
        return cls(True, alpha / beta, beta * head.scale)


def finished(logits: Tensor, head: Unembedding) -> Tensor:
    """Logits in float32 (float64 where they are), after scale and soft-capping."""
    return head.finish(logits.to(torch.promote_types(logits.dtype, torch.float32)))


def scaled(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits / temperature


def softmax(y: Tensor, outside: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax [S, M] (0 in columns left out), log-sum-exp [S] and arg-max [S].

    The log-sum-exp comes from the largest entry, whose probability is at least 1/M and so exact to rounding.
    """
    if outside is not None:
        y = y + outside
    p = torch.softmax(y, dim=1)
    choice = argmax(y)
    at = choice[:, None]
    return p, (y.gather(1, at) - p.gather(1, at).log()).squeeze(1), choice


def argmax(y: Tensor) -> Tensor:
    """The first of the largest columns, [S]. By way of the maxima of blocks: four times as fast on a CPU."""
    whole = y.shape[1] // BLOCK * BLOCK
    blocks = y[:, :whole].unflatten(1, (-1, BLOCK)) if whole else y[:, None]
    best, block = blocks.amax(2).max(1)
    inside = blocks.gather(1, block[:, None, None].expand(-1, 1, blocks.shape[2])).squeeze(1).argmax(1)
    choice = block * blocks.shape[2] + inside
    if 0 < whole < y.shape[1]:
        last, place = y[:, whole:].max(1)
        choice = torch.where(last > best, whole + place, choice)
    return choice


def nth_largest(z: Tensor, n: int) -> Tensor:
    """The n-th largest of each row, [S]: by selection, without sorting."""
    smaller = z.shape[1] - n
    if z.device.type == "cpu":
        # NumPy selects with vector instructions: a tenth of the time of torch.kthvalue.
        return torch.from_numpy(np.partition(z.numpy(), smaller, axis=1)[:, smaller])
    return z.kthvalue(smaller + 1, dim=1).values
