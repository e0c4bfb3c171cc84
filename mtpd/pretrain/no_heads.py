"""Heads that are none: a model that is trained alone goes the way of one with heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtpd.heads import Batch, Heads, Readout
from mtpd.heads.config import HeadsConfig
from mtpd.losses.settings import LossSettings, LossSums
from mtpd.trunk import Trunk


class NoHeads(Heads):
    """No heads: nothing to train, and no loss."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__(HeadsConfig.model_construct(kind="none", depth=0, hidden_size=trunk.hidden_size))
        self.layers = nn.ModuleList()

    def loss(
        self, trunk: Trunk, batch: Batch, readout: Readout, settings: LossSettings, *, compiled: bool = False
    ) -> tuple[Tensor, LossSums]:
        none = torch.zeros(0, dtype=torch.float64, device=batch.hidden.device)
        return none.sum().float(), LossSums(none, none, none, none)
