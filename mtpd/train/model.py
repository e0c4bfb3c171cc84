"""The module that is trained: heads beside their frozen trunk, and the loss between them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtpd import alignment
from mtpd.errors import UserError
from mtpd.heads import Batch, Heads, Readout
from mtpd.losses.fused import multi_depth_loss
from mtpd.losses.settings import LossSettings, LossSums
from mtpd.parallel.sequence import SplitRows
from mtpd.train.joint_trunk import JointTrunk
from mtpd.trunk import Trunk


class DistillModel(nn.Module):
    """Heads with a loss, beside their trunk; only what is trained is part of the module.

    The trunk is not: wrappers of the module (DistributedDataParallel, a DeepSpeed engine) then broadcast, cast and
    shard nothing but the parameters that are trained.

    Args:
        settings: weights and form of the loss.
        compiled: runs the loss as code of torch.compile.
        checkpoint_blocks: computes what is inside of each head a second time in the backward pass.
        after: depths up to this one are finished: they are given as states, and have no loss.
        joint: trains the trunk too.
        trunk_gradient: whether the heads' gradient reaches the layers of a trunk that is trained.
        autocast: number format in which the heads are computed, where the trainer does not see to it.
        split: this process has parts of rows.
    """

    accepts_loss_kwargs = True

    def __init__(
        self,
        trunk: Trunk,
        heads: Heads,
        settings: LossSettings,
        *,
        compiled: bool = False,
        checkpoint_blocks: bool = False,
        after: int = 0,
        joint: JointTrunk | None = None,
        trunk_gradient: bool = True,
        autocast: torch.dtype | None = None,
        split: SplitRows | None = None,
    ) -> None:
        super().__init__()
        self.autocast = autocast
        self.split = split
        self.compiled = compiled
        self.after = after
        self.joint, self.trunk_gradient = joint, trunk_gradient
        if checkpoint_blocks:
            blocks = list(heads.blocks())
            if not blocks:
                raise UserError(
                    f"train.checkpoint_blocks: true does nothing for heads of kind {heads.config.kind}; accepted: false"
                )
            for head in blocks:
                _checkpoint(head)
        self._trunk = (trunk,)
        self.heads = heads
        # Of the trunk, what is trained: nothing, adapters, or all.
        self.of_trunk = nn.ParameterList([] if joint is None else joint.parameters.values())
        self.settings = settings
        self.sums: LossSums | None = None
        self.main_sums: LossSums | None = None
        """Of the main head, where the trunk is trained."""
        self.readout = Readout.of(trunk, heads.rows())

    @property
    def trunk(self) -> Trunk:
        return self._trunk[0]

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        hidden: Tensor | None = None,
        below: Tensor | None = None,
        ahead: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """The loss per response token.

        Args:
            input_ids, labels, position_ids: packed rows [B, T]; labels are -100 outside of responses.
            hidden: the frozen trunk's states [B, T, D] that heads read, if they were kept; the trunk runs otherwise.
            below: states [B, T, D] of depth `after`, where that is not 0.
            ahead: of parts of rows, ids, labels and positions [B, 3, A] that follow them.
            num_items_in_batch: response tokens of the whole optimizer step; those of this batch by default.
        """
        # Only where it is asked for: autocast that is not enabled would switch off that of the trainer.
        with torch.autocast(input_ids.device.type, self.autocast) if self.autocast is not None else nullcontext():
            total = self._sum(input_ids, labels, position_ids, hidden, below, ahead)
        if num_items_in_batch is None:
            num_items_in_batch = (labels != alignment.IGNORED).sum()
        return {"loss": total / num_items_in_batch}

    def _sum(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        hidden: Tensor | None,
        below: Tensor | None,
        ahead: Tensor | None,
    ) -> Tensor:
        """The loss summed over tokens, and over depths."""
        teacher: Tensor | None = None
        readout = self.readout
        if self.joint is not None:
            readout = self.joint.readout(readout)
            states = self.joint.states(input_ids, position_ids)
            teacher = states.detach() if hidden is None else hidden
            hidden = states if self.trunk_gradient else states.detach()
        elif hidden is None:
            before_last = self.heads.shared_layers
            hidden = self.trunk.hidden(input_ids, position_ids=position_ids, before_last=before_last)
        if self.split is not None:
            assert ahead is not None, "what follows the parts"
            known = hidden if teacher is None else teacher
            teacher = torch.cat([known, self.split.following(known)], dim=1)
            input_ids, labels, position_ids = (
                torch.cat([own, next_], dim=1)
                for own, next_ in zip((input_ids, labels, position_ids), ahead.unbind(1), strict=True)
            )
        batch = Batch(input_ids, labels, position_ids, hidden, teacher=teacher, below=below, after=self.after)
        main = None if self.joint is None else self._main_head_loss(readout, batch, states)
        total, self.sums = self.heads.loss(self.trunk, batch, readout, self.settings, compiled=self.compiled)
        return total if main is None else total + main

    def _main_head_loss(self, readout: Readout, batch: Batch, states_BTD: Tensor) -> Tensor:
        """The main head's cross-entropy on the tokens of responses: that of depth 0."""
        states_PD, tokens_P = batch.flat(states_BTD), batch.tokens(0)
        # What the model cannot say has no column.
        known_P = tokens_P < readout.main.weight.shape[0]
        loss, self.main_sums = multi_depth_loss(
            [states_PD],
            states_PD,
            readout.main,
            targets_P=[torch.where(known_P, tokens_P, -1)],
            masks_P=[batch.counted(0)],
            settings=LossSettings((1.0,), (0.0,)),
            after=-1,
            compiled=self.compiled,
        )
        return loss


def _checkpoint(head: nn.Module) -> None:
    """Keeps only the inputs of a head for its backward pass, where one will come."""
    inside = head.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return inside(*args, **kwargs)
        return checkpoint(inside, *args, use_reentrant=False, **kwargs)

    head.forward = forward
