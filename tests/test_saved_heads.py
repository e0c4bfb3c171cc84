"""Heads that are loaded, restored and put together: once in memory, in one number format, and as they were saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import TOKENS, random_heads, tiny_model
from kinds import FORMS, random_kind, settings

from mtpd.errors import UserError
from mtpd.heads import (
    Heads,
    build_heads,
    configure_heads,
    copy_heads,
    empty_heads,
    fill_heads,
    load_heads,
    restore_heads,
    save_heads,
)
from mtpd.heads.shared_layers.start import initialise
from mtpd.parallel.partition import gathered
from mtpd.train.finished_depths import FinishedDepths
from mtpd.trunk import Trunk


def trunk() -> Trunk:
    return Trunk(tiny_model("llama"), tokens=TOKENS)


def behind_layers(of: Trunk) -> Heads:
    chosen = settings("decoder", depth=2) | {"shared_layers": 1}
    heads = build_heads(of, configure_heads(chosen, of, vocabulary=0, fingerprint=""))
    initialise(heads, seed=0)
    return heads


def made(form: str, of: Trunk) -> Heads:
    """Heads of a form, with a draft vocabulary where it takes one."""
    if form == "behind layers":
        return behind_layers(of)
    if form == "adapted":
        return random_heads(of, depth=2).extended(of, depth=4, form="adapters", rank=2)
    return random_heads(of, shared=form == "shared chain") if "chain" in form else random_kind(of, form)


@pytest.mark.parametrize("form", ["chain", "shared chain", "adapted", "behind layers", *FORMS])
def test_heads_are_there_once(form: str, tmp_path: Path) -> None:
    """Fault: a second copy in float32 on each device while heads load; tied or frozen parameters that are not."""
    of = trunk()
    heads = made(form, of)
    save_heads(heads, tmp_path)
    empty = empty_heads(of, heads.config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert not any(buffer.is_meta for buffer in empty.buffers())
    before = build_heads(of, heads.config)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = load_heads(tmp_path, of, dtype=dtype)
        wanted = copy_heads(heads, dtype).state_dict()
        assert loaded.state_dict().keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())
        assert {each.dtype for each in loaded.parameters()} == {dtype}
        for parameter, other in zip(loaded.named_parameters(), before.named_parameters(), strict=True):
            assert (parameter[0], parameter[1].requires_grad) == (other[0], other[1].requires_grad)
        assert not loaded.training
    # What is beside parameters and state, such as the angles of positions.
    full = load_heads(tmp_path, of)
    for (name, buffer), (_, other) in zip(full.named_buffers(), heads.named_buffers(), strict=True):
        assert torch.equal(buffer, other), name
    restored = build_heads(of, heads.config)
    kept = {name: id(parameter) for name, parameter in restored.named_parameters()}
    restore_heads(restored, tmp_path)
    assert all(torch.equal(each, heads.state_dict()[name]) for name, each in restored.state_dict().items())
    assert kept == {name: id(parameter) for name, parameter in restored.named_parameters()}


def test_weights_of_other_heads_are_refused(tmp_path: Path) -> None:
    """Fault: a checkpoint whose tensors do not fit is half restored."""
    of = trunk()
    save_heads(random_heads(of), tmp_path)
    other = random_kind(of, "linear")
    before = {name: each.clone() for name, each in other.state_dict().items()}
    with pytest.raises(UserError, match="tensors missing, unexpected or of another shape"):
        restore_heads(other, tmp_path)
    assert all(torch.equal(each, before[name]) for name, each in other.state_dict().items())
    (tmp_path / "model.safetensors").unlink()
    for load in (lambda: restore_heads(other, tmp_path), lambda: load_heads(tmp_path, of)):
        with pytest.raises(UserError, match="no readable heads here"):
            load()


def test_what_is_put_together_is_kept_where_it_is_written() -> None:
    """Fault: each of eight processes holds all heads in main memory, for the one that writes them."""
    of = trunk()
    heads = random_heads(of, shared=True)
    assert gathered(heads, keep=False) == {}
    whole = gathered(heads, dtype=torch.bfloat16)
    filled = fill_heads(empty_heads(of, heads.config), whole.__getitem__, device=of.device, dtype=torch.bfloat16)
    wanted = copy_heads(heads, torch.bfloat16).state_dict()
    assert all(torch.equal(each, wanted[name]) for name, each in filled.state_dict().items())


def test_finished_depths_are_a_copy() -> None:
    """Fault: the depths that a stage does not train change with it, or in the number format of training."""
    of = trunk()
    heads: Any = random_heads(of)
    finished = FinishedDepths(of.to(torch.bfloat16), heads, None)
    assert {(each.dtype, each.requires_grad) for each in finished.heads.parameters()} == {(torch.bfloat16, False)}
    assert not finished.heads.training
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in heads.parameters())
