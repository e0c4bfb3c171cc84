"""Medusa's heads: a residual block on h_t and an unembedding of their own (Cai et al., arXiv 2401.10774).

    p_t^k = softmax( W2_k (h_t + SiLU(W1_k h_t + b_k)) )        predicts x_{t+k+1}

W1 starts as 0 and W2 as the main head's matrix. The logit scale of the trunk is part of W2; a soft cap is not
repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mtpd.heads.config import HeadsConfig
from mtpd.heads.logit_heads import LogitHeads
from mtpd.heads.parallel.heads import ResidualHead
from mtpd.trunk import Trunk


class MedusaHead(nn.Module):
    """The head of one depth."""

    def __init__(self, trunk: Trunk, columns: int) -> None:
        super().__init__()
        self.residual = ResidualHead(trunk)
        self.unembed = nn.Linear(trunk.hidden_size, columns, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Computes logits [..., M] of states [..., D]."""
        return self.unembed(self.residual(hidden))


class MedusaHeads(LogitHeads):
    """K Medusa heads."""

    independent = True

    def __init__(self, trunk: Trunk, config: HeadsConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(MedusaHead(trunk, config.columns) for _ in range(config.depth))

    def depth_logits(self, depth: int, hidden: Tensor, columns: Tensor, window: Any) -> Tensor:
        return self.layers[depth - 1](hidden)

    @classmethod
    def from_native(
        cls, tensors: Mapping[str, Any], *, source_layers: Sequence[int], depth: int, shared: bool, vocabulary: int
    ) -> dict[str, Any]:
        return {"columns": tensors["layers.0.unembed.weight"].shape[0]}
