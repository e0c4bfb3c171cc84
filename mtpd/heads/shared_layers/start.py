"""Starts heads behind adapted layers: adapters that add nothing, and the states that the inner heads are fitted to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from mtpd.errors import UnsupportedModel, UserError
from mtpd.heads.kinds import KINDS
from mtpd.heads.shared_layers.heads import SharedLayerHeads
from mtpd.trunk import Trunk

RANK = 16
"""Of the adapters."""


def configure(settings: Mapping[str, Any], trunk: Trunk) -> dict[str, int]:
    """Works out which layers are shared, for `HeadsConfig`, from the `heads` section of a recipe.

    Raises:
        UserError: layers that the trunk does not have, or heads that cannot read them.
        UnsupportedModel: the last layers of the model do not run apart from the others.
    """
    layers = settings.get("shared_layers", 0)
    if not layers:
        return {}
    if layers > trunk.depth:
        raise UserError(
            f"heads.shared_layers: {layers} is more than the {trunk.depth} layers of {trunk.name}; accepted: 0 to "
            f"{trunk.depth}"
        )
    kind = KINDS[settings["kind"]]
    if kind.loops:
        raise UserError(
            f"heads.shared_layers: {layers} is not accepted with heads.kind: {kind.name}, which reads states of its "
            "own; accepted: 0, or another kind"
        )
    if trunk.device.type != "meta":
        _check(trunk, layers)
    return {"shared_layers": layers, "adapter_rank": RANK}


def _check(trunk: Trunk, layers: int) -> None:
    """Proves on a few tokens that the trunk is the same in two parts."""
    ids = torch.arange(1, 13, device=trunk.device).remainder(trunk.tokens or trunk.config.vocab_size).view(1, -1)
    positions = torch.arange(ids.shape[1], device=trunk.device)[None]
    ours, theirs = trunk.states(ids, position_ids=positions, before_last=layers)[0], trunk.hidden(ids)
    error = ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6)).item()
    if not error <= (1e-4 if trunk.dtype == torch.float32 else 5e-2):
        raise UnsupportedModel(
            f"heads.shared_layers: {layers} is not accepted for {trunk.name}, whose last layers give something else "
            f"when they run apart from the others (relative difference {error:.1e}); accepted: 0"
        )


@torch.no_grad()
def initialise(heads: SharedLayerHeads, *, seed: int = 0) -> None:
    """Gives the adapters their first weights, which add nothing."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in heads.adapters.named_parameters():
        if ".lora_B." in name:
            parameter.zero_()
        else:
            parameter.copy_(torch.randn(parameter.shape, generator=random) * parameter.shape[1] ** -0.5)


def fitting(
    heads: SharedLayerHeads, trunk: Trunk, batches: Callable[[], Iterable[Mapping[str, Any]]]
) -> Callable[[], list[dict[str, Any]]]:
    """Runs the trunk's own top layers over batches, which the inner heads are then fitted to."""

    def above() -> list[dict[str, Any]]:
        top = trunk.top(heads.shared_layers)
        found = []
        for batch in batches():
            with torch.no_grad():
                states = top(inputs_embeds=batch["hidden"], position_ids=batch["position_ids"], use_cache=False)
            found.append({**batch, "hidden": states.last_hidden_state})
        return found

    return above
