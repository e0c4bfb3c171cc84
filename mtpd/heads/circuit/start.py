"""Starts circuit heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

from mtpd.errors import UserError
from mtpd.heads.base import Heads
from mtpd.heads.circuit.config import KIND, CircuitConfig
from mtpd.heads.circuit.heads import CircuitHeads
from mtpd.heads.first_weights import shift_maps
from mtpd.heads.parallel.start import matching
from mtpd.trunk import Trunk

STARTS = ("regression", "identity")
TRAINING_COPIES = 4
"""Copies of each weight in float32: itself, its gradient, and the two moments of Adam."""


def configure(settings: Mapping[str, Any], trunk: Trunk) -> dict[str, Any]:
    """Works out what circuit heads add to `HeadsConfig`, from the `heads` section of a recipe.

    Raises:
        UserError: full leaves that memory does not hold while they are trained.
    """
    given = {key: value for key, value in settings[KIND.name].items() if value is not None}
    if given.get("structure") == "ff" and given.setdefault("components", 1) != 1:
        raise UserError(
            f"heads.circuit.components: {given['components']} is not accepted for structure: ff; accepted: 1, or null"
        )
    if given.get("leaves", "shared") != "shared" and "rank" in given:
        raise UserError(
            f"heads.circuit.rank: {given['rank']} does nothing with leaves: {given['leaves']}; accepted: null, or "
            "leaves: shared"
        )
    shape = CircuitConfig.model_validate(given).resolved()
    if settings["init"] not in (None, *STARTS):
        raise UserError(
            f"heads.init: {settings['init']} is not accepted for circuit heads; accepted: {', '.join(STARTS)}"
        )
    places, columns = settings["depth"] + 1, settings["columns"]
    if shape.leaves != "full":
        return {KIND.name: shape, "columns": columns}
    needed = 4 * TRAINING_COPIES * places * shape.latent_values * columns * trunk.hidden_size
    room = psutil.virtual_memory().available
    if needed > room:
        raise UserError(
            f"heads.circuit.leaves: full needs {needed / 1e9:,.1f} GB for {places} x {shape.latent_values} "
            f"unembeddings of {columns:,} x {trunk.hidden_size:,} with gradients and optimizer, and "
            f"{room / 1e9:,.1f} GB are free; "
            "accepted: shared, tilted, or fewer components, or a draft vocabulary (heads.vocabulary)"
        )
    return {KIND.name: shape, "columns": columns}


@torch.no_grad()
def initialise(heads: CircuitHeads, trunk: Trunk, start: str | None, *, seed: int = 0) -> bool:
    """Gives new heads their first weights, and says whether `fit` has to follow.

    All components of a place start alike; what parts them is the random part of the sum weights, which therefore
    must not be zero.
    """
    random = torch.Generator().manual_seed(seed)
    _start_leaves(heads, trunk, [torch.eye(trunk.hidden_size)] * (heads.depth + 1), random)
    if heads.sums is not None:
        size = heads.sums.weight.shape
        heads.sums.weight.copy_(torch.randn(size, generator=random) * size[1] ** -0.5)
        heads.sums.bias.copy_(heads.circuit.start())
    return start in (None, "regression")


@torch.no_grad()
def fit(heads: CircuitHeads, trunk: Trunk, batches: Iterable[dict[str, Tensor]]) -> None:
    """Makes place k the main head behind the ridge regression of the trunk's state k positions further on."""
    maps = [torch.eye(trunk.hidden_size), *shift_maps(trunk, batches, depth=heads.depth)]
    _start_leaves(heads, trunk, maps, torch.Generator().manual_seed(0))


def _start_leaves(heads: CircuitHeads, trunk: Trunk, maps: list[Tensor], random: torch.Generator) -> None:
    heads.leaves.start(maps, trunk.unembedding.select(heads.rows()), random)


@torch.no_grad()
def adopt(heads: CircuitHeads, trunk: Trunk, source: Heads, *, seed: int = 0) -> None:
    """Starts every component of place k as the k-th linear head of `source`.

    Raises:
        UserError: those are others, or too few.
    """
    initialise(heads, trunk, "identity", seed=seed)
    maps = [each.project.weight.float() for each in matching(source, "linear", heads.depth)]
    _start_leaves(heads, trunk, [torch.eye(trunk.hidden_size), *maps], torch.Generator().manual_seed(seed))
