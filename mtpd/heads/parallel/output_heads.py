"""Output heads: parallel heads that are nothing but an output matrix each, on the trunk's own state.

    p_t^k = softmax(W_k h_t)        predicts x_{t+k+1}

These are the heads of byte models such as EvaByte, where a matrix is small. W_k starts as the main head's matrix,
behind the regression of the state k positions further on or as it is; the logit scale of the trunk is part of it, and a
soft cap is not repeated.

Shape legend: D hidden size, M columns in use.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mtpd.heads.config import HeadsConfig
from mtpd.heads.logit_heads import LogitHeads
from mtpd.trunk import Trunk, Unembedding


class OutputHeads(LogitHeads):
    """K output heads."""

    independent = True

    def __init__(self, trunk: Trunk, config: HeadsConfig) -> None:
        super().__init__(config)
        self.block = "unembedding"
        self.layers = nn.ModuleList(
            nn.Linear(trunk.hidden_size, config.columns, bias=False) for _ in range(config.depth)
        )

    def depth_logits(self, depth: int, hidden: Tensor, columns: Tensor, window: Any) -> Tensor:
        return self.layers[depth - 1](hidden)

    def logits(self, depth: int, hidden_BTD: Tensor, main: Unembedding, *, position_ids_BT: Tensor) -> Tensor:
        """Computes logits [B, T, M] of one depth; the main head is not read."""
        return self.layers[depth - 1](hidden_BTD)
