"""The loss of all depths without a [T, V] tensor: the values of `reference.py`, tile by tile.

The gradient of a row's loss with respect to its logits y is known as soon as y is, so loss and gradient need one
pass:

    y = finish(W h)      L and dL/dy from y and the teacher row (`fused_tile.py`)      dL/dh = (dL/dy · finish'(y)) W

That is two products a head and one for the teacher; and a third a head, dL/dW = Σ (dL/dy · finish'(y)) hᵀ, where W is
trained too. Depth k's student row t and teacher row t + k meet in one
block because blocks run over teacher rows: each teacher row is computed once for all depths.

Two sizes, because a CPU wants both: products are over blocks of many rows, so that W is read seldom; the sweeps
between them are over tiles of few rows, which stay in cache. On an NVIDIA GPU two kernels take the place of the sweeps
(`fused_kernels.py`). Gradients take the place of the logits they come from.

Losses may need something of other rows. The λ of a mixture (LK) is taken from a few rows before the pass. A loss that
joins the depths of a position (end-to-end TV) multiplies what lies in different teacher rows; but that only scales the
gradient of whole rows, so it is done after the pass. Where W is trained too, dL/dW is a sum over rows, each of which
needs its scale before it is added: then a first pass takes the values alone, and a second one the gradients.

Legend: P flat positions, D hidden size, R rows of a block, S rows of a tile, M columns in use, V tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtpd import alignment
from mtpd.losses import fused_tile, kinds, on_gpu
from mtpd.losses.settings import ESTIMATE_ROWS, LossSettings, LossSums
from mtpd.trunk import Unembedding

__all__ = ["BLOCK_BYTES", "TILE_BYTES", "LossSettings", "LossSums", "multi_depth_loss"]

BLOCK_ROWS = 256
"""Rows of a block at most: from there on matrix products are not faster on a CPU."""
BLOCK_BYTES = 512 * 2**20
"""Size of a block at most: logits of the teacher and of one depth, and what is kept of the teacher in float32."""
TILE_BYTES = 4 * 2**20
"""Size of one float32 tile. Larger ones leave the cache."""
LIVE_TILES = 8
"""Tiles that the sweeps hold at a time."""
GPU_BLOCK_ROWS = 2048
"""The same for accelerators, whose products want to read W more seldom."""
GPU_BLOCK_BYTES = 4 * 2**30
"""The same for accelerators. Without kernels a block is one tile there: what sweeps hold counts in."""
SWEPT_BLOCKS = 10
"""Float32 blocks that sweeps hold at most: those of JSD."""


def multi_depth_loss(
    students_PD: Sequence[Tensor],
    trunk_PD: Tensor,
    unembedding: Unembedding,
    *,
    targets_P: Sequence[Tensor],
    masks_P: Sequence[Tensor],
    settings: LossSettings,
    after: int = 0,
    teacher_head: Unembedding | None = None,
    main_head: Unembedding | None = None,
    columns_M: Tensor | None = None,
    compiled: bool = False,
) -> tuple[Tensor, LossSums]:
    """Σ_k Σ_rows α_k CE + β_k D, and the sums behind it.

    Args:
        students_PD: states of depth after+1..after+K at flat positions, each [P, D].
        trunk_PD: the trunk's states h at the same positions [P, D]; depth k is compared with row p + k.
        unembedding: shared, over the columns in use (no padding rows, or a draft vocabulary).
        targets_P: per depth, the column of the token to predict [P], -1 where it has no column.
        masks_P: per depth, which positions count [P] bool. They nest: where depth k counts, those before it do.
        settings: weights and form of the loss, for these K depths.
        after: how many depths there are before the first one here; they cost nothing.
        teacher_head: the teacher's over the same columns, where that is another one.
        main_head, columns_M: with a draft vocabulary, the teacher's over all tokens and the token of each column;
            read by losses of the teacher's true probabilities.
        compiled: runs the sweeps over a tile as code of torch.compile. Needs a compiler on the machine.

    Returns:
        The summed loss (a scalar in float32 that carries gradient to `students_PD`, and to weight and bias of
        `unembedding` if they require it) and the sums.
    """
    assert len(students_PD) == len(settings.alpha), "one alpha and one beta for each depth"
    heads = unembedding, teacher_head or unembedding, main_head
    walk = _Walk(trunk_PD.detach(), heads, targets_P, masks_P, settings, after, columns_M, compiled)
    loss, *sums = _FusedLoss.apply(walk, unembedding.weight, unembedding.bias, *students_PD)
    return loss, LossSums(*sums)


def block_size(
    columns: int, tokens: int, item: int, *, device: str = "cpu", swept: bool | None = None
) -> tuple[int, int]:
    """Rows of a block, and the bytes that the loss takes while it runs, gradients left out.

    Args:
        columns: M, of the students.
        tokens: of the teacher: M, or V for losses of its true probabilities.
        item: bytes of a number of the unembedding.
        device: the type of the device.
        swept: whether sweeps compute there; None for what computes the losses of this package.
    """
    products = (columns + tokens) * item
    if device == "cpu":
        row = products + 2 * columns * max(4, item)
        rows = max(1, min(BLOCK_ROWS, BLOCK_BYTES // row))
        return rows, rows * row + LIVE_TILES * max(TILE_BYTES, 4 * columns)
    if swept is None:
        swept = device not in on_gpu.KERNEL_DEVICES or not on_gpu.triton_works()
    row = products + (SWEPT_BLOCKS * columns * max(4, item) if swept else 0)
    rows = max(1, min(GPU_BLOCK_ROWS, GPU_BLOCK_BYTES // row))
    return rows, rows * row


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, walk: _Walk, weight: Tensor, bias: Tensor | None, *students_PD: Tensor) -> tuple[Tensor, ...]:
        _, of_weight, of_bias, *_ = ctx.needs_input_grad
        walk.of_weight = torch.zeros_like(weight, dtype=walk.exact) if of_weight else None
        walk.of_bias = torch.zeros_like(bias, dtype=walk.exact) if bias is not None and of_bias else None
        with on_gpu.exact_sums(weight.device):
            loss, sums, grads = walk.run(students_PD, needs_grad=any(ctx.needs_input_grad))
        ctx.save_for_backward(walk.of_weight, walk.of_bias, *grads)
        ctx.types = weight.dtype, None if bias is None else bias.dtype, *(grad.dtype for grad in grads)
        exact = torch.promote_types(students_PD[0].dtype, torch.float32)
        logged = sums.to(exact).unbind(0)
        ctx.mark_non_differentiable(*logged)
        return loss.to(exact), *logged

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Any, ...]:
        grads = zip(ctx.saved_tensors, ctx.types, strict=True)
        return (None, *(None if grad is None else (grad_loss.to(grad.dtype) * grad).to(kind) for grad, kind in grads))


class _Walk:
    """Passes over all teacher rows that are compared with something: one, or two (see above)."""

    def __init__(
        self,
        trunk_PD: Tensor,
        heads: tuple[Unembedding, Unembedding, Unembedding | None],
        targets_P: Sequence[Tensor],
        masks_P: Sequence[Tensor],
        settings: LossSettings,
        after: int,
        columns_M: Tensor | None,
        compiled: bool,
    ) -> None:
        self.trunk_PD = trunk_PD
        self.unembedding, self.teacher_head, main_head = heads
        self.exact = torch.promote_types(self.unembedding.weight.dtype, torch.float32)
        # Where they are asked for: the gradients of the unembedding's weight and bias, as far as the pass has come.
        self.of_weight: Tensor | None = None
        self.of_bias: Tensor | None = None
        self.targets_P, self.masks_P = targets_P, masks_P
        self.settings = settings
        self.depths = range(after + 1, after + 1 + len(masks_P))
        self.columns_M = None
        if settings.true_probabilities and columns_M is not None:
            assert main_head is not None, "columns_M comes with main_head"
            self.teacher_head, self.columns_M = main_head, columns_M
        columns, tokens = self.unembedding.weight.shape[0], self.teacher_head.weight.shape[0]
        device, item = trunk_PD.device, self.unembedding.weight.dtype.itemsize
        given = settings, self.teacher_head, self.unembedding, self.columns_M
        self.tiles: Any = on_gpu.kernels(device, *given)
        self.size, _ = block_size(columns, tokens, item, device=device.type, swept=self.tiles is None)
        if self.tiles is None:
            # Elsewhere than on a CPU, sweeps gain nothing from a cache and pay for each launch.
            rows = max(1, TILE_BYTES // (4 * columns)) if device.type == "cpu" else self.size
            self.tiles = fused_tile.Sweeps(*given, rows=rows, compiled=compiled)
            on_gpu.say("code of torch.compile" if compiled else "PyTorch's operators")

    def run(self, students_PD: Sequence[Tensor], *, needs_grad: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The loss, the sums [4, K] and the gradient of each depth."""
        if self.trunk_PD.device.type == "cpu":
            _keep_freed_memory()
        self.order = self._order()
        self.mixtures = self._mixtures(students_PD)
        joins = self.settings.entry.join is not None
        twice = needs_grad and joins and (self.of_weight is not None or self.of_bias is not None)
        *found, grads = self._pass(students_PD, needs_grad=needs_grad and not twice)
        loss, sums, slope_KP = self._finish(*found)
        if twice:
            *_, grads = self._pass(students_PD, needs_grad=True, slope_KP=slope_KP)
        elif slope_KP is not None:
            # dL/dTV of each row; the pass gave dTV/dh.
            for grad, slope_P in zip(grads, slope_KP, strict=True):
                grad.mul_(slope_P[:, None].to(grad.dtype))
        return loss, sums, grads

    def _pass(
        self, students_PD: Sequence[Tensor], *, needs_grad: bool, slope_KP: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Computes CE and D of each row [2, K, P], choices of heads [K, P] and of teacher rows, and gradients.

        Nothing in it waits for a device.

        Args:
            slope_KP: scales the gradient of each row, where it is known.
        """
        device, weight = self.trunk_PD.device, self.unembedding.weight
        depths, positions = len(students_PD), len(self.trunk_PD)
        rows, kept_KR, kept_on_host = self.order
        # Behind the last position is the place of what is computed in vain.
        grads = [student.new_zeros(positions + 1, student.shape[1]) for student in students_PD] if needs_grad else []
        values_KP = torch.zeros(2, depths, positions + 1, dtype=self.exact, device=device)
        # No choice of a student equals that of a teacher row which was not computed.
        drafted_KP = torch.full((depths, positions + 1), -2, dtype=torch.long, device=device)
        chosen = torch.full((positions + self.depths[-1],), -1, dtype=torch.long, device=device)
        size = min(self.size, len(rows))
        raw_z = weight.new_empty(size, self.teacher_head.weight.shape[0])
        raw_y = weight.new_empty(size, weight.shape[0])
        for start in range(0, len(rows), self.size):
            block = rows[start : start + self.size]
            logits = _product(self.trunk_PD[block], self.teacher_head, raw_z[: len(block)])
            teacher, chosen[block] = self.tiles.teacher(logits)
            for k in range(1, depths + 1):
                kept = kept_on_host[k - 1, start : start + self.size]
                if not kept.any():
                    continue
                # Where masks nest, the rows that depth k reads come first in a block, and none is in vain.
                count = int(kept.nonzero()[0][-1]) + 1
                source = at = block[:count] - self.depths[k - 1]
                in_vain = not kept[:count].all()
                if in_vain:
                    at = torch.where(kept_KR[k - 1, start : start + count], at, positions)
                    source = at.clamp_max(positions - 1)
                state = students_PD[k - 1][source]
                y = _product(state, self.unembedding, raw_y[:count])
                depth = fused_tile.Depth.of(self.settings, k, self.unembedding)
                values_KP[0, k - 1, at], values_KP[1, k - 1, at], drafted_KP[k - 1, at] = self.tiles.compare(
                    y,
                    teacher,
                    self.targets_P[k - 1][source],
                    depth=depth,
                    mixture=self.mixtures[k - 1],
                    needs_grad=needs_grad,
                )
                if not needs_grad:
                    continue
                if slope_KP is not None:
                    y.mul_(slope_KP[k - 1, source][:, None].to(y.dtype))
                if self.of_weight is not None or self.of_bias is not None:
                    self._add_own(y * (at < positions)[:, None] if in_vain else y, state, depth.factor)
                grads[k - 1][at] = (y @ weight).mul_(depth.factor).to(grads[k - 1].dtype)
        return values_KP[..., :-1], drafted_KP[:, :-1], chosen, [grad[:-1] for grad in grads]

    def _add_own(self, grad_RM: Tensor, state_RD: Tensor, factor: float) -> None:
        """The unembedding's own gradient, of rows whose gradient in the product is known."""
        if self.of_weight is not None:
            self.of_weight.add_(grad_RM.T @ state_RD.to(grad_RM.dtype), alpha=factor)
        if self.of_bias is not None:
            self.of_bias.add_(grad_RM.to(self.exact).sum(0), alpha=factor)

    def _order(self) -> tuple[Tensor, Tensor, Any]:
        """Teacher rows that count at some depth [R], those of most depths first, and at which [K, R] bool.

        A teacher row that counts at depth k counts at those before: in this order, the rows of a depth are the
        first ones of a block, so that none has to be gathered. The last of the three is the second one for the
        host: with it, the walk knows all shapes, and waits for a device no more.
        """
        positions = len(self.trunk_PD)
        shape = len(self.masks_P), positions + self.depths[-1]
        kept = torch.zeros(shape, dtype=torch.bool, device=self.trunk_PD.device)
        for row, k, mask in zip(kept, self.depths, self.masks_P, strict=True):
            row[alignment.teacher_row(0, k) :][:positions] = mask
        # A mask never reaches past its document, so a teacher row is always inside.
        order = kept.sum(0).argsort(descending=True, stable=True)
        kept = kept[:, order]
        on_host = kept.cpu().numpy()
        rows = int(on_host.any(0).sum())
        return order[:rows], kept[:, :rows], on_host[:, :rows]

    def _mixtures(self, students_PD: Sequence[Tensor]) -> list[Tensor]:
        """λ of each depth, for a loss that mixes two divergences: from a few rows, ahead of the pass."""
        weights = [torch.ones((), dtype=self.exact, device=self.trunk_PD.device)] * len(students_PD)
        mixture = self.settings.entry.mixture
        if mixture is None:
            return weights
        counts = self.order[2].sum(1).tolist()
        for place, (student_PD, mask, count) in enumerate(zip(students_PD, self.masks_P, counts, strict=True)):
            # The positions that count, in their order.
            at = (~mask).byte().argsort(stable=True)[:count]
            at = at[:: max(1, -(-count // ESTIMATE_ROWS))]
            step = max(1, TILE_BYTES // (4 * self.teacher_head.weight.shape[0]))
            accepted = [
                kinds.acceptance(
                    fused_tile.finished(_product(student_PD[few], self.unembedding), self.unembedding),
                    fused_tile.finished(
                        _product(self.trunk_PD[alignment.teacher_row(few, self.depths[place])], self.teacher_head),
                        self.teacher_head,
                    ),
                    columns_M=self.columns_M,
                    teacher_temperature=self.settings.teacher_temperature,
                )
                for few in at.split(step)
            ]
            if count:
                weights[place] = mixture(torch.cat(accepted))
        return weights

    def _finish(self, values_KP: Tensor, drafted_KP: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The loss, sums over rows [4, K], and the slope dL/dD of each row [K, P] where depths are joined."""
        settings = self.settings
        positions = drafted_KP.shape[1]
        counted_KP = torch.stack(list(self.masks_P))
        agree_KP = torch.stack(
            [
                drafted_P == chosen[alignment.teacher_row(0, k) :][:positions]
                for k, drafted_P in zip(self.depths, drafted_KP, strict=True)
            ]
        )
        ce_KP, value_KP = values_KP.double()
        sums = torch.stack(
            [counted_KP.sum(1), ce_KP.sum(1), value_KP.sum(1), (agree_KP.cumprod(0) * counted_KP).sum(1)]
        )
        join = settings.entry.join
        if join is None:
            weights = (*settings.alpha, *settings.beta)
            terms = [weight * total for weight, total in zip(weights, sums[1:3].flatten(), strict=True)]
            return torch.stack(terms).sum(), sums, None
        accepted_KP = torch.where(counted_KP, 1.0 - value_KP, 1.0).requires_grad_()
        with torch.enable_grad():
            loss = join(accepted_KP, counted_KP, settings.depth_weights).sum()
            (slope_KP,) = torch.autograd.grad(loss, accepted_KP)
        return loss.detach(), sums, -slope_KP


def _product(states_RD: Tensor, head: Unembedding, out: Tensor | None = None) -> Tensor:
    """W h + b, before `finish`: [R, M]."""
    states_RD = states_RD.to(head.weight.dtype)
    if head.bias is None:
        return torch.mm(states_RD, head.weight.T, out=out)
    return torch.addmm(head.bias, states_RD, head.weight.T, out=out)


@functools.cache
def _keep_freed_memory() -> None:
    """Lets freed tiles stay with the process, which otherwise doubles the time of the sweeps.

    The allocator of glibc gives large blocks back to the system when they are freed, and pays a page fault for each
    4 kB when it gets them again. What it takes for large grows to the size of the largest block that was freed, up
    to 32 MiB: so this frees one.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)
