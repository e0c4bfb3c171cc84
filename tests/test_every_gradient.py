"""Which parameters get a gradient in each pass: processes that train together need not look for those without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import TOKENS, random_heads, tiny_model
from kinds import random_kind

from mtpd.alignment import IGNORED
from mtpd.losses.settings import LossSettings
from mtpd.recipe import parse_recipe
from mtpd.train.arguments import training_arguments
from mtpd.train.model import DistillModel
from mtpd.trunk import Trunk

STATES = ["chain", "decoder", "linear", "residual"]


@pytest.mark.parametrize("form", STATES)
def test_all_parameters_of_heads_with_states_get_one(form: str) -> None:
    """Fault: DDP waits for a gradient that never comes, where a batch or a depth has no loss, and the run ends."""
    trunk = Trunk(tiny_model("llama"), tokens=TOKENS)
    heads = random_heads(trunk) if form == "chain" else random_kind(trunk, form)
    assert (heads.own_logits, heads.experts) == (False, False)
    weights = (0.5, 0.0, 0.0)
    model = DistillModel(trunk, heads.train(), LossSettings((0.0,) * 3, weights))
    ids = torch.randint(3, TOKENS, (1, 24), generator=torch.Generator().manual_seed(0))
    for labels in (ids, torch.full_like(ids, IGNORED)):
        model.zero_grad(set_to_none=True)
        model(ids, labels, torch.arange(24)[None], num_items_in_batch=1)["loss"].backward()
        without = [name for name, each in heads.named_parameters() if each.requires_grad and each.grad is None]
        assert not without


@pytest.mark.parametrize("every", [True, False])
def test_processes_look_for_others_where_there_may_be_some(every: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a walk over the graph in each step for nothing; or none where experts are left out."""
    recipe: Any = parse_recipe({"model": "tiny"})
    given = {"dtype": torch.float32, "device": torch.device("cpu"), "every_gradient": every}
    assert training_arguments(recipe, **given).ddp_find_unused_parameters is not every
