"""What the trainer trains: heads beside their frozen trunk, and the loss between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtpd import alignment
from mtpd.errors import UserError
from mtpd.heads import Batch, Heads, Readout
from mtpd.losses.settings import LossSettings, LossSums
from mtpd.trunk import Trunk


class DistillModel(nn.Module):
    """Trunk and heads as one module with a loss; only the heads have gradients.

    Args:
        settings: weights and form of the loss.
        compiled: runs the loss as code of torch.compile.
        checkpoint_blocks: computes what is inside of each head a second time in the backward pass.
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
    ) -> None:
        super().__init__()
        self.compiled = compiled
        if checkpoint_blocks:
            blocks = list(heads.blocks())
            if not blocks:
                raise UserError(
                    f"train.checkpoint_blocks: true does nothing for heads of kind {heads.config.kind}; accepted: false"
                )
            for head in blocks:
                _checkpoint(head)
        self.trunk = trunk
        self.heads = heads
        self.settings = settings
        self.sums: LossSums | None = None
        self.readout = Readout.of(trunk, heads.rows())

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        hidden: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """The loss per response token.

        Args:
            input_ids, labels, position_ids: packed rows [B, T]; labels are -100 outside of responses.
            hidden: the trunk's states [B, T, D], if they were kept; the trunk runs otherwise.
            num_items_in_batch: response tokens of the whole optimizer step; those of this batch by default.
        """
        if hidden is None:
            hidden = self.trunk.hidden(input_ids, position_ids=position_ids)
        batch = Batch(input_ids, labels, position_ids, hidden)
        total, self.sums = self.heads.loss(self.trunk, batch, self.readout, self.settings, compiled=self.compiled)
        if num_items_in_batch is None:
            num_items_in_batch = (labels != alignment.IGNORED).sum()
        return {"loss": total / num_items_in_batch}


def _checkpoint(head: nn.Module) -> None:
    """Keeps only the inputs of a head for its backward pass, where one will come."""
    inside = head.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return inside(*args, **kwargs)
        return checkpoint(inside, *args, use_reentrant=False, **kwargs)

    head.forward = forward
