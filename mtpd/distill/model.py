"""What the trainer trains: heads beside their frozen trunk, and the loss between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtpd import alignment
from mtpd.distill.joint import JointTrunk
from mtpd.heads import Heads
from mtpd.losses.fused import multi_depth_loss
from mtpd.losses.settings import LossSettings, LossSums
from mtpd.trunk import Trunk


class DistillModel(nn.Module):
    """Trunk and heads as one module with a loss; only the heads have gradients.

    Args:
        settings: weights and form of the loss.
        compiled: runs the loss as code of torch.compile.
        checkpoint_blocks: computes what is inside of each head a second time in the backward pass.
        after: depths up to this one are finished: they are given as states, and have no loss.
        joint: trains the trunk too.
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
    ) -> None:
        super().__init__()
        self.compiled = compiled
        self.after = after
        self.joint = joint
        if checkpoint_blocks:
            for head in dict.fromkeys(heads.chain()):
                _checkpoint(head)
        self.trunk = trunk
        self.heads = heads
        self.settings = settings
        self.sums: LossSums | None = None
        rows = heads.rows()
        self.main_head = trunk.unembedding.select(None)
        self.unembedding = trunk.unembedding.select(rows)
        # Column of each token among the unembedding's rows in use, -1 where it has none.
        columns = torch.full((trunk.unembedding.weight.shape[0],), -1, dtype=torch.long, device=trunk.device)
        used = torch.arange(self.unembedding.weight.shape[0], device=trunk.device)
        columns[used if rows is None else rows] = used
        self.register_buffer("columns", columns, persistent=False)

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
            hidden: the frozen trunk's states [B, T, D], if they were kept; the trunk runs otherwise.
            below: states [B, T, D] of depth `after`, where that is not 0.
            num_items_in_batch: response tokens of the whole optimizer step; those of this batch by default.
        """
        main: Tensor | None = None
        if self.joint is not None:
            states_BTD = self.joint.states(input_ids, position_ids)
            teacher_BTD = states_BTD.detach() if hidden is None else hidden
            main = self._main_head_loss(states_BTD, input_ids, labels, position_ids)
        else:
            if hidden is None:
                hidden = self.trunk.hidden(input_ids, position_ids=position_ids)
            states_BTD = teacher_BTD = hidden
        if self.after:
            assert below is not None, "the states that the first trained depth reads"
            states = self.heads(self.trunk, below, input_ids, position_ids_BT=position_ids, after=self.after)
        else:
            states = self.heads(self.trunk, states_BTD, input_ids, position_ids_BT=position_ids)
        depths = range(self.after + 1, self.after + 1 + len(states))
        columns: Any = self.columns
        total, self.sums = multi_depth_loss(
            [state.flatten(0, 1) for state in states],
            teacher_BTD.flatten(0, 1),
            self.unembedding,
            targets_P=[columns[alignment.target_tokens(input_ids, k)].flatten() for k in depths],
            masks_P=[alignment.counted(labels, position_ids, k).flatten() for k in depths],
            settings=self.settings,
            after=self.after,
            main_head=self.main_head,
            columns_M=self.heads.rows(),
            compiled=self.compiled,
        )
        if main is not None:
            total = total + main
        if num_items_in_batch is None:
            num_items_in_batch = (labels != alignment.IGNORED).sum()
        return {"loss": total / num_items_in_batch}

    def _main_head_loss(self, states_BTD: Tensor, input_ids: Tensor, labels: Tensor, position_ids: Tensor) -> Tensor:
        """The main head's weighted cross-entropy on the tokens of responses: that of depth 0."""
        assert self.joint is not None
        states_PD = states_BTD.flatten(0, 1)
        loss, _ = multi_depth_loss(
            [states_PD],
            states_PD,
            self.main_head,
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
