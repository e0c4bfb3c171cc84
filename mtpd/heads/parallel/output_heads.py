"""Parallel heads that are nothing but an output matrix each, on the trunk's own state.

    p_t^k = softmax(W_k h_t)        predicts x_{t+k+1}

These are the heads of byte models such as EvaByte, where a matrix is small. W_k starts as the main head's matrix,
behind the regression of the state k positions further on or as it is; the logit scale of the trunk is part of it, and a
soft cap is not repeated.

Shape legend: D hidden size, M columns in use.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mtpd.heads.config import HeadsConfig
from mtpd.heads.logit_heads import LogitHeads
from mtpd.heads.regression import shift_maps
from mtpd.trunk import Trunk, Unembedding

STARTS = ("regression", "identity", "random")


class UnembeddedHeads(LogitHeads):
    """K heads."""

    independent = True

    def __init__(self, trunk: Trunk, config: HeadsConfig) -> None:
        super().__init__(config)
        self.block = "unembedding"
        self.layers = nn.ModuleList(
            nn.Linear(trunk.hidden_size, config.columns, bias=False) for _ in range(config.depth)
        )

    def at(self, depth: int, hidden: Tensor, columns: Tensor, seen: Any) -> Tensor:
        return self.layers[depth - 1](hidden)

    def logits(self, depth: int, hidden_BTD: Tensor, main: Unembedding, *, position_ids_BT: Tensor) -> Tensor:
        """Logits [B, T, M] of one depth; the main head is not read."""
        return self.layers[depth - 1](hidden_BTD)

    def shorten(self, depth: int) -> None:
        assert 1 <= depth <= self.depth, "heads can only become fewer"
        self.layers = self.layers[:depth]
        self.config = self.config.model_copy(update={"depth": depth})


@torch.no_grad()
def initialise(heads: UnembeddedHeads, trunk: Trunk, start: str | None, *, seed: int = 0) -> bool:
    """Gives new heads their first weights. Returns whether `fit` has to follow."""
    start = start or STARTS[0]
    random = torch.Generator().manual_seed(seed)
    std = float(getattr(trunk.config, "initializer_range", 0.02))
    matrix = main_matrix(heads, trunk)
    for each in heads.layers:
        head: Any = each
        head.weight.copy_(torch.randn(matrix.shape, generator=random) * std if start == "random" else matrix)
    return start == "regression"


@torch.no_grad()
def fit(heads: UnembeddedHeads, trunk: Trunk, batches: Iterable[dict[str, Tensor]]) -> None:
    """Makes W_k the main head behind the ridge regression of the trunk's state k positions further on."""
    matrix = main_matrix(heads, trunk)
    for each, shift in zip(heads.layers, shift_maps(trunk, batches, depth=heads.depth), strict=True):
        head: Any = each
        head.weight.copy_(matrix @ shift)


def main_matrix(heads: UnembeddedHeads, trunk: Trunk) -> Tensor:
    """The main head's matrix over the heads' columns, with its scale, [M, D] in float32."""
    main = trunk.unembedding.select(heads.rows())
    return main.weight.float() * main.scale
