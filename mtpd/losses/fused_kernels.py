"""A block of logits in two Triton kernels: what `fused_tile.py` computes in sweeps, on NVIDIA GPUs.

One program has one row. `teacher_rows` reads a teacher row and leaves a few numbers of it; `student_rows` reads a
student row beside its teacher row, and writes the gradient over the student's logits. Between them lie no tensors of
a block: q and p are computed anew from logits in their own number format and their log-sum-exp.

    log-sum-exp, arg-max, Σ q z, Σ q y      online, in one pass over the row (Milakov and Gimelshein, arXiv 1805.02867)
    what needs p first, as Σ min(p, q)      a second pass, for the divergences that have it
    gradient                                a last pass

The divergence is a constant of the kernels (`triton_rows.py`): one pair serves all of them. Which one stands for a
twin of `kinds.py` is in `DIVERGENCES`; a loss with another twin takes the sweeps. The top n of a teacher row are what
is not below a threshold, which is found bit by bit, from the highest on, in numbers that are ordered as the logits are.

Legend: R rows of a block, M columns in use, V tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtpd.losses import kinds, triton_rows
from mtpd.losses.fused_tile import Depth
from mtpd.losses.settings import LossSettings
from mtpd.trunk import Unembedding

TERMS = ("KL", "REVERSE", "JENSEN", "TOTAL")
DIVERGENCES: dict[Any, tuple[str, ...]] = {
    None: (),
    kinds.forward_kl_tile: ("KL",),
    kinds.reverse_kl_tile: ("REVERSE",),
    kinds.jsd_tile: ("JENSEN",),
    kinds.tv_tile: ("TOTAL",),
    kinds.lk_tile: ("KL", "TOTAL"),
}
"""The constants of each twin."""
FORMATS = (torch.bfloat16, torch.float16, torch.float32)
COLUMNS = 4096
"""Columns that a program has at a time."""
WARPS = 8


class Row(NamedTuple):
    """What is kept of teacher rows: their logits, and numbers [R] as in `settings.Teacher`."""

    logits: Tensor
    lse: Tensor
    negative_entropy: Tensor
    mass: Tensor
    threshold: Tensor
    """The n-th largest product; read where there is a top n."""


class Kernels:
    """A block of logits at a time, as `fused_tile.Sweeps`."""

    def __init__(
        self,
        settings: LossSettings,
        teacher_head: Unembedding,
        unembedding: Unembedding,
        columns_M: Tensor | None,
    ) -> None:
        self.settings, self.unembedding, self.columns_M = settings, unembedding, columns_M
        self.width = unembedding.weight.shape[0]
        terms = DIVERGENCES[settings.entry.twin] if any(settings.beta) else ()
        self.compared, self.terms = bool(terms), {name: name in terms for name in TERMS}
        self.top_n = settings.top_n if self.compared and settings.top_n < self.width else 0
        self.arithmetic = {
            "tokens": teacher_head.weight.shape[0],
            "width": self.width,
            "scale": float(unembedding.scale),
            "softcap": float(unembedding.softcap or 1.0),
            "temperature": float(settings.teacher_temperature),
            "CAPPED": unembedding.softcap is not None,
            "DRAFT": columns_M is not None,
            "COMPARED": self.compared,
            "BLOCK": COLUMNS,
        }

    def teacher(self, logits_RV: Tensor) -> tuple[Row, Tensor]:
        """Numbers of teacher rows, and the main head's choice among the columns [R]."""
        rows = len(logits_RV)
        numbers = torch.empty(4, rows, dtype=torch.float32, device=logits_RV.device)
        choice = torch.empty(rows, dtype=torch.long, device=logits_RV.device)
        launch(
            triton_rows.teacher_rows,
            rows,
            logits_RV,
            self.columns_M,
            numbers,
            choice,
            top_n=self.top_n,
            TOP_N=self.top_n > 0,
            BITS=8 * logits_RV.element_size(),
            **self.arithmetic,
        )
        return Row(logits_RV, *numbers.unbind(0)), choice

    def compare(
        self, logits_RM: Tensor, teacher: Row, target_R: Tensor, *, depth: Depth, mixture: Tensor, needs_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """CE, D and the student's choice of each row; overwrites the logits with the gradient, as `Sweeps.compare`."""
        rows = len(logits_RM)
        values = torch.empty(2, rows, dtype=torch.float32, device=logits_RM.device)
        choice = torch.empty(rows, dtype=torch.long, device=logits_RM.device)
        launch(
            triton_rows.student_rows,
            rows,
            logits_RM,
            *teacher,
            self.columns_M,
            target_R,
            mixture,
            values,
            choice,
            label_weight=float(depth.label_weight),
            teacher_share=kinds.JSD_MIX,
            DIVERGES=depth.diverges and self.compared,
            LABELS=any(self.settings.alpha),
            TOP_N=self.top_n > 0,
            GRADIENT=needs_grad,
            **self.terms,
            **self.arithmetic,
        )
        return values[0], values[1], choice


def launch(kernel: Any, rows: int, logits: Tensor, *tensors: Tensor | None, **numbers: Any) -> None:
    """Runs one program for each row. Triton itself takes the current device, whatever that of the tensors is."""
    with torch.cuda.device_of(logits):
        kernel[(rows,)](logits, *tensors, **numbers, num_warps=WARPS, enable_fp_fusion=True)
