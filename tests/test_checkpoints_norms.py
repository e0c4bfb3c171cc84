"""Layouts whose engines hand on the state before a norm: the same logits where they are written, refused elsewhere."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoints_export import finished_run
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.cache_utils import MtpCache

from mtpd.alignment import tokens_read
from mtpd.errors import UserError
from mtpd.formats.directory import Checkpoint
from mtpd.formats.engines.with_transformers import mtp_model
from mtpd.formats.export import export
from mtpd.formats.find_heads import find_heads
from mtpd.heads import Heads
from mtpd.heads.norms import gain, set_gain
from mtpd.trunk import Trunk


def with_gains(heads: Heads, *gains: Tensor | None) -> Heads:
    """The heads with these gains [D] in their last norms; None leaves one as it is."""
    heads = copy.deepcopy(heads)
    for head, value in zip(heads.layers, gains, strict=True):
        if value is not None:
            set_gain(head.get_submodule("block.norm"), value)
    return heads


def served_logits(folder: Path, ids: Tensor, *, before: bool, depth: int) -> list[Tensor]:
    """Teacher-forced logits of each depth of an export, in transformers, handing on one state or the other."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    native = find_heads(Checkpoint(folder))
    mtp = mtp_model(model, folder, native)
    raw: list[Tensor] = []
    for layer in mtp.layers:
        each: Any = layer
        each.post_norm.register_forward_pre_hook(lambda _, args: raw.append(args[0]))
    positions = torch.arange(ids.shape[1])[None]
    state, found = Trunk(model).hidden(ids), []
    for k in range(depth):
        cache = MtpCache(config=model.config.get_mtp_config())
        index = k % native.count
        after = mtp.forward_layer(index, state, positions, cache, input_ids=tokens_read(ids, k + 1))
        found.append(model.lm_head(after))
        state = raw[-1] if before else after
    return found


def assert_served(trunk: Trunk, heads: Heads, folder: Path) -> None:
    """Exports heads as glm4moe, and compares them with what both conventions then compute."""
    export(finished_run(folder, trunk, heads), folder / "out", to="glm4moe")
    ids = architectures.random_tokens(1, 12)
    with torch.no_grad():
        states = heads(trunk, trunk.hidden(ids), ids, position_ids_BT=torch.arange(12)[None])
        for before in (True, False):
            theirs = served_logits(folder / "out", ids, before=before, depth=heads.depth)
            for depth, (state, logits) in enumerate(zip(states, theirs, strict=True), start=1):
                ours = trunk.unembedding(state)[:, : 12 - depth]
                torch.testing.assert_close(logits[:, : 12 - depth], ours, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_gains_of_one_size_may_be_handed_on_before_the_norm(name: str, tmp_path: Path) -> None:
    """Fault: a layout refused that is exact; signs of gains that get lost; a last head refused for nothing."""
    trunk = architectures.tiny_trunk(name)
    signs = torch.ones(trunk.hidden_size)
    signs[::3] = -1.0
    heads = architectures.random_heads(trunk, depth=3)
    assert_served(trunk, with_gains(heads, 1.5 * signs, torch.full_like(signs, 0.8), None), tmp_path)


def test_a_shared_block_may_be_handed_on_before_the_norm(tmp_path: Path) -> None:
    """Fault: the norm of the one block, whose state it reads itself, not looked at or turned only once."""
    trunk = architectures.tiny_trunk("llama")
    signs = torch.ones(trunk.hidden_size)
    signs[1::2] = -1.0
    heads = architectures.random_heads(trunk, depth=2, shared=True)
    with pytest.raises(UserError, match="those of head 1 are not; accepted: --depth 1"):
        export(finished_run(tmp_path / "no", trunk, heads), tmp_path / "no" / "out", to="glm4moe")
    assert_served(trunk, with_gains(heads, 0.7 * signs), tmp_path / "yes")


def test_uneven_gains_are_refused_because_they_compute_something_else(tmp_path: Path) -> None:
    """Fault: heads written that an engine then runs on another state, or gains so small that epsilon decides."""
    trunk = architectures.tiny_trunk("llama")
    heads = architectures.random_heads(trunk, depth=2)
    ones = torch.ones(trunk.hidden_size)
    for number, each in enumerate((heads, with_gains(heads, 1e-3 * ones, ones))):
        folder = tmp_path / str(number)
        with pytest.raises(UserError, match="glm4moe: vLLM hands a head's state on before its last norm.*head 1 are"):
            export(finished_run(folder, trunk, each), folder / "out", to="glm4moe")
    # What the refusal is for: equal gains written, and the uneven ones put back.
    run = finished_run(tmp_path / "even", trunk, with_gains(heads, ones, None))
    export(run, tmp_path / "even" / "out", to="glm4moe", perturb=False)
    shard = tmp_path / "even" / "out" / "model.safetensors"
    tensors = load_file(shard)
    tensors["model.layers.3.shared_head.norm.weight"] = gain(heads.layers[0].get_submodule("block.norm"))
    save_file(tensors, shard, metadata={"format": "pt"})
    ids = architectures.random_tokens(1, 12)
    with torch.no_grad():
        before, after = (served_logits(shard.parent, ids, before=each, depth=2) for each in (True, False))
    torch.testing.assert_close(before[0], after[0])
    assert (before[1] - after[1])[:, :10].abs().max() > 0.05


def test_mimo_needs_equal_gains_in_the_base(tmp_path: Path) -> None:
    """Fault: a base's final norm that the engine leaves out, written as if it did not matter."""
    trunk = architectures.tiny_trunk("llama")
    run = finished_run(tmp_path / "a", trunk, architectures.random_heads(trunk, depth=1))
    with pytest.raises(UserError, match="mimo: the engine hands on the base's state before its final norm"):
        export(run, tmp_path / "a" / "out", to="mimo")
    for number, value in enumerate((0.7, -0.7)):
        model = architectures.tiny_model("llama")
        model.model.norm.weight.data.fill_(value)
        folder = tmp_path / str(number)
        level = finished_run(folder, Trunk(model), architectures.random_heads(Trunk(model), depth=1))
        if value < 0:
            with pytest.raises(UserError, match="where all gains of the norm are equal"):
                export(level, folder / "out", to="mimo")
            continue
        export(level, folder / "out", to="mimo")
        with torch.no_grad():
            served: Any = AutoModelForCausalLM.from_pretrained(folder / "out")
            ids = architectures.random_tokens(1, 8)
            torch.testing.assert_close(served(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
