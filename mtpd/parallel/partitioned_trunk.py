"""A trunk that is never whole on a device: each rank has a share of its layers from the loading of the model on.

The main rank reads the weights into main memory; from there one parameter at a time is sent to all ranks, which keep
their share of it. Whatever runs the trunk then takes all ranks, equally often: what otherwise the main rank does alone
they all do, and one writes; where each has a share of the work, who is done goes on with the others (`InStep`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mtpd.errors import UserError
from mtpd.parallel.deepspeed_config import load_settings
from mtpd.parallel.partition import deepspeed_running, move_outside_of_layers, partitioned
from mtpd.recipe import Recipe
from mtpd.trunk import Trunk


def is_apart(recipe: Recipe) -> bool:
    """Whether no rank is to have the whole trunk.

    Raises:
        UserError: the recipe asks for something that takes the whole trunk.
    """
    settings = load_settings(recipe.train.deepspeed)
    if settings is None or settings.stage != 3:
        return False
    problems = {
        "evaluation.decode_prompts": (recipe.evaluation.decode_prompts, 0, "0"),
        "heads.init": (recipe.heads.init in ("copy_last", "copy_last_k"), False, "regression, identity, random"),
    }
    for key, (found, wanted, accepted) in problems.items():
        if found != wanted:
            raise UserError(
                f"{key}: {recipe.heads.init if key == 'heads.init' else found} is not accepted with train.deepspeed: "
                f"{recipe.train.deepspeed}, under which no process has the whole trunk; accepted: {accepted}"
            )
    return True


@contextmanager
def trunk_apart(trunk: Trunk, recipe: Recipe, *, device: torch.device, folder: Path) -> Iterator[None]:
    """Shares the trunk's layers out over the ranks, for good, where the recipe says so.

    Args:
        trunk: in main memory, if it is to be shared out.
        device: of this rank.
        folder: gets what is offloaded to NVMe, where the configuration names no place.
    """
    settings = load_settings(recipe.train.deepspeed)
    if settings is None or not is_apart(recipe):
        yield
        return
    config = settings.for_trunk(trunk.decoder.layers, hidden_size=trunk.hidden_size, folder=folder)
    with deepspeed_running(device):
        move_outside_of_layers(trunk, device)
        with partitioned(trunk, config, for_good=True):
            yield
