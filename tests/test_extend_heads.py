"""Looped heads: what new depths start as, what they own, what is trained, and what is saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import random_heads, random_tokens
from torch import Tensor

from mtpd import alignment
from mtpd.alignment import IGNORED
from mtpd.errors import UserError
from mtpd.heads import Heads, load_heads, save_heads
from mtpd.heads.config import HeadsConfig
from mtpd.losses.settings import LossSettings
from mtpd.train.model import DistillModel
from mtpd.trunk import Trunk

FORMS = ["copies", "shared", "adapters"]


def row(trunk: Trunk, seed: int = 0) -> dict[str, Tensor]:
    """Two documents and padding, with the trunk's states."""
    ids = random_tokens(2, 48, seed=seed)
    positions = torch.cat([torch.arange(n) for n in (26, 18, 4)]).expand_as(ids)
    labels = torch.where((positions >= 2) & (torch.arange(48) < 44), ids, IGNORED)
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": positions,
        "hidden": trunk.hidden(ids, position_ids=positions),
    }


def states(trunk: Trunk, heads: Heads, batch: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return heads(trunk, batch["hidden"], batch["input_ids"], position_ids_BT=batch["position_ids"])


def trained(heads: Heads) -> Heads:
    """The same heads with adapters that do something."""
    with torch.no_grad():
        for name, parameter in heads.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return heads


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared", [False, True])
def test_a_loop_is_the_heads_applied_again(llama: Trunk, form: Any, shared: bool) -> None:
    """Fault: new depths that loop the wrong heads, read the wrong state or token, or change the old ones."""
    heads = random_heads(llama, depth=2, shared=shared)
    wider = heads.extended(llama, depth=4, form=form, rank=4).extended(llama, depth=7, form=form, rank=4)
    batch = row(llama)
    state, old = batch["hidden"], heads.chain()
    # Two heads, looped; then the last three of four.
    looped = [old[0], old[1], old[0], old[1], old[1], old[0], old[1]]
    found = states(llama, wider, batch)
    assert len(found) == wider.depth == 7
    for depth, head in enumerate(looped, start=1):
        embed = llama.embed(alignment.tokens_read(batch["input_ids"], depth))
        with torch.no_grad():
            state = head(embed, state, position_ids_BT=batch["position_ids"])
        torch.testing.assert_close(found[depth - 1], state, rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_trained(llama: Trunk, form: Any) -> None:
    """Fault: old heads that get gradients, new ones that get none, or new depths that own more than they say."""
    heads = random_heads(llama, depth=2)
    wider = heads.extended(llama, depth=4, form=form, rank=4)
    before = {name: tensor.clone() for name, tensor in wider.state_dict().items()}
    batch = row(llama)
    after = 0 if form == "shared" else 2
    settings = LossSettings((0.3,) * (4 - after), (0.5,) * (4 - after), top_n=20)
    model = DistillModel(llama, wider.train(), settings, after=after)
    below = states(llama, heads, batch)[1] if after else None
    parameters = [parameter for parameter in wider.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(2):
        # The first half of an adapter has a gradient once the second is not 0 any more.
        optimizer.zero_grad()
        model(**batch, below=below)["loss"].backward()
        optimizer.step()
    changed = {name for name, tensor in wider.state_dict().items() if not torch.equal(tensor, before[name])}
    assert all(parameter.grad is None for parameter in wider.parameters() if not parameter.requires_grad)
    matrices = {name for name in before if before[name].ndim > 1}
    expected = {
        "copies": {name for name in matrices if name.startswith(("layers.2", "layers.3"))},
        "shared": {name for name in matrices if name.startswith(("layers.0", "layers.1"))},
        "adapters": {name for name in matrices if name.startswith(("adapted.3", "adapted.4"))},
    }[form]
    assert expected <= changed
    if form != "shared":
        assert all(name.startswith(("layers.2", "layers.3", "adapted")) for name in changed)
        for old, new in zip(states(llama, heads, batch), states(llama, wider, batch), strict=False):
            torch.testing.assert_close(old, new, rtol=0, atol=0)
    owned = sum(tensor.numel() for tensor in wider.state_dict().values())
    alone = sum(tensor.numel() for tensor in heads.state_dict().values())
    assert {"copies": owned == 2 * alone, "shared": owned == alone, "adapters": alone < owned < 2 * alone}[form]


def test_deep_alignment(llama: Trunk) -> None:
    """Fault: depths 3 and 4 that are compared with the rows of depths 1 and 2, or old depths that still cost."""
    heads = random_heads(llama, depth=2)
    wider = heads.extended(llama, depth=4, form="copies")
    batch = row(llama)
    below = states(llama, heads, batch)[1]
    new = DistillModel(llama, wider, LossSettings((0.3, 0.2), (0.5, 0.1), top_n=20), after=2)
    whole = DistillModel(llama, wider, LossSettings((0.0, 0.0, 0.3, 0.2), (0.0, 0.0, 0.5, 0.1), top_n=20))
    ours, expected = new(**batch, below=below), whole(**batch)
    torch.testing.assert_close(ours["loss"], expected["loss"])
    assert new.sums is not None
    assert whole.sums is not None
    for name in ("rows", "cross_entropy", "divergence"):
        torch.testing.assert_close(getattr(new.sums, name), getattr(whole.sums, name)[2:])
    gradients = []
    for loss in (ours, expected):
        wider.zero_grad()
        loss["loss"].backward()
        gradients.append([None if p.grad is None else p.grad.clone() for p in wider.layers[2:].parameters()])
    for found, wanted in zip(*gradients, strict=True):
        assert found is not None
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_saved_heads_come_back(llama: Trunk, form: Any, tmp_path: Path) -> None:
    """Fault: shared tensors saved twice or refused, adapters that are lost, an order of depths that is not kept."""
    wider = trained(random_heads(llama, depth=2).extended(llama, depth=3, form=form, rank=4))
    save_heads(wider, tmp_path)
    loaded = load_heads(tmp_path, llama)
    batch = row(llama)
    for saved, again, copied in zip(
        states(llama, wider, batch),
        states(llama, loaded, batch),
        states(llama, copy.deepcopy(wider), batch),
        strict=True,
    ):
        torch.testing.assert_close(saved, again, rtol=0, atol=0)
        torch.testing.assert_close(saved, copied, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["copies", "shared"])
def test_unrolled_heads_draft_the_same(llama: Trunk, form: Any) -> None:
    """Fault: a loop unrolled wrongly."""
    check_merged(llama, form)


def test_merged_heads_draft_the_same(trunk: Trunk) -> None:
    """Fault: an adapter merged with the wrong scale, into the shared block, or twice."""
    check_merged(trunk, "adapters")


def check_merged(trunk: Trunk, form: Any) -> None:
    """Heads against the same ones with a block for each depth."""
    wider = trained(random_heads(trunk, depth=2).extended(trunk, depth=4, form=form, rank=4))
    before = {name: tensor.clone() for name, tensor in wider.state_dict().items()}
    merged = wider.merged()
    assert merged.config == HeadsConfig(depth=4, hidden_size=trunk.hidden_size, source_layers=[1, 2, 1, 2])
    assert not any("lora" in name or "base_layer" in name for name in merged.state_dict())
    assert all(parameter.requires_grad for parameter in merged.parameters())
    batch = row(trunk)
    for depth, (ours, expected) in enumerate(
        zip(states(trunk, merged, batch), states(trunk, wider, batch), strict=True), start=1
    ):
        if form == "adapters" and depth > 2:
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        else:
            torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in wider.state_dict().items())
    if form == "adapters":
        own = wider.chain()[3].project
        exact = own.base_layer.weight + 2 * own.lora_B["default"].weight @ own.lora_A["default"].weight
        torch.testing.assert_close(merged.chain()[3].project.weight, exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_decoded_text_is_that_of_generate(llama: Trunk, form: Any) -> None:
    """Fault: drafters that mix up the caches or weights of looped depths; heads that cannot be shortened."""
    from architectures import greedy_text

    prompt, text = greedy_text("llama", 7)
    wider = trained(random_heads(llama, depth=4).extended(llama, depth=8, form=form, rank=4)).eval()
    assert decoded(llama, wider, prompt, len(text)) == text
    batch = row(llama)
    whole = states(llama, wider, batch)
    wider.shorten(6)
    short = states(llama, wider, batch)
    assert len(short) == 6
    for ours, expected in zip(short, whole, strict=False):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    assert decoded(llama, wider, prompt, len(text)) == text


def test_drafts_of_looped_heads_are_accepted(learned: Any) -> None:
    """Fault: decoding that drafts otherwise than training reads: heads that know a text must have drafts accepted."""
    trunk, sample = learned.trunk, learned.sample
    from mtpd.evaluate.offline import measure_offline

    wider = learned.perfect.extended(trunk, depth=6, form="adapters", rank=4)
    found = measure_offline(trunk, wider.eval(), [sample], progress=False)["prompts"]
    assert found.car[:3] == [1.0, 1.0, 1.0]
    merged = measure_offline(trunk, wider.merged().eval(), [sample], progress=False)["prompts"]
    assert merged.accepted == found.accepted


def decoded(trunk: Trunk, heads: Heads, prompt: list[int], count: int) -> list[int]:
    from mtpd.decode.engine import Engine
    from mtpd.decode.text import Request

    engine = Engine(trunk, heads, slots=1, capacity=len(prompt) + count)
    return next(iter(engine.run([Request(prompt, count)]))).tokens


def test_adapters_that_cannot_be(llama: Trunk) -> None:
    """Fault: a loop of adapted heads that silently drops their adapters, or mixes ranks."""
    heads = random_heads(llama, depth=2)
    wider = heads.extended(llama, depth=4, form="adapters", rank=4)
    with pytest.raises(UserError, match=r"extend\.form: shared is not accepted .*; accepted: copies, adapters"):
        wider.extended(llama, depth=8, form="shared")
    with pytest.raises(UserError, match=r"extend\.rank: 8 is not the rank .*; accepted: 4"):
        wider.extended(llama, depth=8, form="adapters", rank=8)
    looped = trained(wider).extended(llama, depth=8, form="adapters", rank=4)
    first, second = (looped.chain()[place].project.lora_B["default"].weight for place in (2, 6))
    assert first is not second
    assert torch.equal(first, second)
