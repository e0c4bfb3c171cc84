"""What the trainer trains: heads beside their frozen trunk, and the loss between them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtpd import alignment
from mtpd.distill.joint import JointTrunk
from mtpd.errors import UserError
from mtpd.heads import Batch, Heads, Readout
from mtpd.losses.fused import multi_depth_loss
from mtpd.losses.settings import LossSettings, LossSums
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
        autocast: number format in which the heads are computed, where the trainer does not see to it.
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
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.autocast = autocast
        self.compiled = compiled
        self.after = after
        self.joint = joint
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
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """The loss per response token.

        Args:
            input_ids, labels, position_ids: packed rows [B, T]; labels are -100 outside of responses.
            hidden: the frozen trunk's states [B, T, D] that heads read, if they were kept; the trunk runs otherwise.
            below: states [B, T, D] of depth `after`, where that is not 0.
            num_items_in_batch: response tokens of the whole optimizer step; those of this batch by default.
        """
        # Only where it is asked for: autocast that is not enabled would switch off that of the trainer.
        with torch.autocast(input_ids.device.type, self.autocast) if self.autocast is not None else nullcontext():
            total = self._sum(input_ids, labels, position_ids, hidden, below)
        if num_items_in_batch is None:
            num_items_in_batch = (labels != alignment.IGNORED).sum()
        return {"loss": total / num_items_in_batch}

    def _sum(
        self, input_ids: Tensor, labels: Tensor, position_ids: Tensor, hidden: Tensor | None, below: Tensor | None
    ) -> Tensor:
        """The loss summed over tokens, and over depths."""
        main: Tensor | None = None
        teacher: Tensor | None = None
        readout = self.readout
        if self.joint is not None:
            readout = self.joint.readout(readout)
            states = self.joint.states(input_ids, position_ids)
            teacher = states.detach() if hidden is None else hidden
            main = self._main_head_loss(readout, states, input_ids, labels, position_ids)
            hidden = states
        elif hidden is None:
            before_last = self.heads.shared_layers
            hidden = self.trunk.hidden(input_ids, position_ids=position_ids, before_last=before_last)
        batch = Batch(input_ids, labels, position_ids, hidden, teacher=teacher, below=below, after=self.after)
        total, self.sums = self.heads.loss(self.trunk, batch, readout, self.settings, compiled=self.compiled)
        return total if main is None else total + main

    def _main_head_loss(
        self, readout: Readout, states_BTD: Tensor, input_ids: Tensor, labels: Tensor, position_ids: Tensor
    ) -> Tensor:
        """The main head's weighted cross-entropy on the tokens of responses: that of depth 0."""
        assert self.joint is not None
        states_PD = states_BTD.flatten(0, 1)
        loss, _ = multi_depth_loss(
            [states_PD],
            states_PD,
            readout.main,
            targets_P=[alignment.target_tokens(input_ids, 0).flatten()],
            masks_P=[alignment.counted(labels, position_ids, 0).flatten()],
            settings=LossSettings((self.joint.loss_weight,), (0.0,)),
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
