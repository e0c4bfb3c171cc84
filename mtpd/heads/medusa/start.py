"""Starts Medusa heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mtpd.errors import UserError
from mtpd.heads.medusa.heads import MedusaHeads
from mtpd.trunk import Trunk

STARTS = ("identity", "random")


def configure(settings: Mapping[str, Any], trunk: Trunk) -> dict[str, Any]:
    """Works out what Medusa heads add to `HeadsConfig`, from the `heads` section of a recipe."""
    if settings["init"] not in (None, *STARTS):
        raise UserError(
            f"heads.init: {settings['init']} is not accepted for medusa heads; accepted: {', '.join(STARTS)}"
        )
    return {"columns": settings["columns"]}


@torch.no_grad()
def initialise(heads: MedusaHeads, trunk: Trunk, start: str | None, *, seed: int = 0) -> bool:
    """Gives new heads their first weights, and says that `fit` never has to follow."""
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
