"""Medusa's heads: a residual block on h_t and an unembedding of their own (Cai et al., arXiv 2401.10774).

    p_t^k = softmax( W2_k (h_t + SiLU(W1_k h_t + b_k)) )        predicts x_{t+k+1}

W1 starts as 0 and W2 as the main head's matrix. The logit scale of the trunk is part of W2; a soft cap is not
repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mtpd.errors import UserError
from mtpd.heads.config import HeadsConfig
from mtpd.heads.logit_heads import LogitHeads
from mtpd.heads.parallel.heads import ResidualHead
from mtpd.trunk import Trunk

STARTS = ("identity", "random")


class MedusaHead(nn.Module):
    """One depth."""

    def __init__(self, trunk: Trunk, columns: int) -> None:
        super().__init__()
        self.residual = ResidualHead(trunk)
        self.unembed = nn.Linear(trunk.hidden_size, columns, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., M] of states [..., D]."""
        return self.unembed(self.residual(hidden))


class MedusaHeads(LogitHeads):
    """K heads."""

    independent = True

    def __init__(self, trunk: Trunk, config: HeadsConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(MedusaHead(trunk, config.columns) for _ in range(config.depth))

    def at(self, depth: int, hidden: Tensor, columns: Tensor, seen: Any) -> Tensor:
        return self.layers[depth - 1](hidden)

    def shorten(self, depth: int) -> None:
        assert 1 <= depth <= self.depth, "heads can only become fewer"
        self.layers = self.layers[:depth]
        self.config = self.config.model_copy(update={"depth": depth})


def configure(settings: Mapping[str, Any], trunk: Trunk) -> dict[str, Any]:
    """The part of `HeadsConfig` that is Medusa's own, from the `heads` section of a recipe."""
    if settings["init"] not in (None, *STARTS):
        raise UserError(
            f"heads.init: {settings['init']} is not accepted for medusa heads; accepted: {', '.join(STARTS)}"
        )
    return {"columns": settings["columns"]}


@torch.no_grad()
def initialise(heads: MedusaHeads, trunk: Trunk, start: str | None, *, seed: int = 0) -> bool:
    """Gives new heads their first weights. Returns whether `fit` has to follow: it never has."""
    random = torch.Generator().manual_seed(seed)
    std = float(getattr(trunk.config, "initializer_range", 0.02))
    main = trunk.unembedding.select(heads.rows())
    for each in heads.layers:
        head: Any = each
        project = head.residual.project
        project.weight.zero_()
        project.bias.zero_()
        head.unembed.weight.copy_(main.weight.float() * main.scale)
        if start == "random":
            project.weight.copy_(torch.randn(project.weight.shape, generator=random) * std)
            head.unembed.weight.copy_(torch.randn(head.unembed.weight.shape, generator=random) * std)
    return False


def fit(heads: MedusaHeads, trunk: Trunk, batches: Iterable[dict[str, Tensor]]) -> None:
    """No start of these heads is fitted."""
    raise AssertionError("initialise asks for no fit")
