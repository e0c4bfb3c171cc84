"""First weights of heads: the identity is exact, copies are copies, and the regression beats the identity."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from architectures import TOKENS, new_heads, random_heads, random_tokens, tiny_model
from torch import Tensor, nn

from mtpd import alignment
from mtpd.alignment import IGNORED
from mtpd.errors import UnsupportedModel
from mtpd.heads import Heads
from mtpd.heads.chain.start import fit, initialise
from mtpd.heads.first_weights import silence, source_layers
from mtpd.heads.norms import gain
from mtpd.losses.fused import LossSettings
from mtpd.train.model import DistillModel
from mtpd.trunk import Trunk


def rows(trunk: Trunk, count: int, *, seed: int) -> dict[str, Tensor]:
    """Rows of two documents and padding, with the trunk's states."""
    ids = random_tokens(count, 64, seed=seed)
    positions = torch.cat([torch.arange(n) for n in (30, 26, 8)]).expand_as(ids)
    labels = torch.where((positions >= 3) & (torch.arange(64) < 56), ids, IGNORED)
    hidden = trunk.hidden(ids, position_ids=positions)
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "hidden": hidden}


def states(trunk: Trunk, heads: Heads, row: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return heads(trunk, row["hidden"], row["input_ids"], position_ids_BT=row["position_ids"])


def distances(trunk: Trunk, heads: Heads, row: dict[str, Tensor]) -> list[float]:
    """By depth, how far states point away from the trunk's states k positions further (mean of 1 - cosine)."""
    scale = gain(trunk.decoder.norm)
    found = []
    for k, state in enumerate(states(trunk, heads, row), start=1):
        b, t = alignment.counted(row["labels"], row["position_ids"], k).nonzero(as_tuple=True)
        wanted = row["hidden"][b, alignment.teacher_row(t, k)]
        found.append(1.0 - torch.cosine_similarity(state[b, t] / scale, wanted / scale, dim=-1).mean().item())
    return found


@pytest.mark.parametrize("start", ["identity", "regression"])
def test_identity_passes_the_state_on(trunk: Trunk, start: Any) -> None:
    """Fault: a gain that is applied twice, a norm's 1 + w, a residual path that is not silent."""
    row = rows(trunk, 1, seed=0)
    for state in states(trunk, new_heads(trunk, start), row):
        torch.testing.assert_close(state, row["hidden"], rtol=1e-5, atol=1e-5)


def test_identity_learns_gently(trunk: Trunk) -> None:
    """Fault: a start that nothing can leave, or one whose first small step is blown up (zeros before a norm)."""
    heads = new_heads(trunk, "identity")
    row = rows(trunk, 2, seed=0)
    optimizer = torch.optim.SGD(heads.parameters())
    model = DistillModel(trunk, heads, LossSettings((0.3,) * 3, (0.5,) * 3))
    first = model(**row)["loss"]
    first.backward()
    for name, parameter in heads.layers[0].named_parameters():
        if name == "project.weight":
            assert parameter.grad is not None
            assert all(bool(half.any()) for half in parameter.grad.chunk(2, dim=1)), "embedding or hidden half"
    block_gradients = [p.grad for n, p in heads.named_parameters() if "block.layers" in n and p.grad is not None]
    assert any(bool(gradient.any()) for gradient in block_gradients)
    norm = math.sqrt(sum(float(p.grad.pow(2).sum()) for p in heads.parameters() if p.grad is not None))
    # A step of one thousandth of the weights' size moves the states by about as little.
    optimizer.param_groups[0]["lr"] = 1e-2 / norm
    optimizer.step()
    for k, state in enumerate(states(trunk, heads, row), start=1):
        assert (state - row["hidden"]).norm() / row["hidden"].norm() < 0.02 * k
    assert model(**row)["loss"] < first


def test_gains_that_are_zero() -> None:
    """Fault: 1/g of a channel that the final norm switches off."""
    model: Any = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[3] = 0.0
        model.model.norm.weight[4] = -0.7
    trunk = Trunk(model, tokens=TOKENS)
    row = rows(trunk, 1, seed=0)
    for state in states(trunk, new_heads(trunk, "identity"), row):
        assert torch.isfinite(state).all()
        assert torch.cosine_similarity(state, row["hidden"], dim=-1).min() > 0.99


@pytest.mark.parametrize(("start", "layers"), [("copy_last", [2, 2, 2, 2, 2]), ("copy_last_k", [0, 0, 0, 1, 2])])
def test_copies_are_the_trunks_layers(trunk: Trunk, start: Any, layers: list[int]) -> None:
    """Fault: a copy of another layer, or one that leaves some of its tensors random."""
    assert source_layers(start, 5, trunk.depth) == layers
    heads = new_heads(trunk, start, depth=5)
    for head, layer in zip(heads.chain(), layers, strict=True):
        block: Any = head.block
        for name, tensor in trunk.decoder.layers[layer].state_dict().items():
            assert torch.equal(block.layers[0].state_dict()[name], tensor), name
        assert torch.equal(block.norm.weight, trunk.decoder.norm.weight)
    pointers = {parameter.data_ptr() for parameter in trunk.parameters()}
    assert not any(parameter.data_ptr() in pointers for parameter in heads.parameters())


@pytest.mark.parametrize("start", ["identity", "copy_last", "copy_last_k", "random", "regression"])
def test_seed_decides(llama: Trunk, start: Any) -> None:
    """Fault: first weights that depend on what ran before, or are not set at all."""
    heads = [new_heads(llama, start) for _ in range(3)]
    for index, each in enumerate(heads):
        for parameter in each.parameters():
            nn.init.constant_(parameter, float("nan") if parameter.ndim > 1 else 1.0)
        torch.manual_seed(index)
        initialise(each, llama, start, seed=index // 2)
    one, same, other = (each.state_dict() for each in heads)
    assert all(torch.isfinite(tensor).all() for tensor in one.values())
    assert all(torch.equal(one[name], same[name]) for name in one)
    if not start.startswith("copy"):
        assert any(not torch.equal(one[name], other[name]) for name in one)
    if start == "random":
        # Every head of its own.
        weights = [head.get_parameter("project.weight") for head in heads[0].chain()]
        assert not torch.equal(weights[0], weights[1])


def test_regression_is_nearer_than_the_identity(trunk: Trunk) -> None:
    """Fault: a fit to the wrong rows; it must help at every depth on rows that it has not seen."""
    heads = new_heads(trunk, "regression")
    unseen = rows(trunk, 4, seed=1)
    before = distances(trunk, heads, unseen)
    fit(heads, trunk, [rows(trunk, 12, seed=2), rows(trunk, 12, seed=3)])
    after = distances(trunk, heads, unseen)
    for depth in range(3):
        assert after[depth] < 0.95 * before[depth], (before, after)


@pytest.mark.parametrize("shared", [False, True])
def test_regression_finds_a_linear_rule(llama: Trunk, shared: bool) -> None:
    """Fault: a fit that is off by one, skips a depth, or takes in padding and other documents."""
    size = llama.hidden_size
    row = rows(llama, 24, seed=0)
    rotation = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(0))).Q
    embed = llama.embed(row["input_ids"])
    directions = embed @ rotation
    # States that are a rotated embedding of the newest token alone: what a head reads says all.
    directions *= directions.pow(2).mean(-1, keepdim=True).rsqrt()
    row["hidden"] = directions * gain(llama.decoder.norm)
    row["hidden"][:, 56:] = float("nan")
    heads = new_heads(llama, "regression", shared=shared)
    fit(heads, llama, [row])
    # Padding that the fit must not see. In attention even a weight of zero would spread it.
    row["hidden"] = row["hidden"].nan_to_num(0.0)
    assert max(distances(llama, heads, row)) < 1e-3


def test_half_precision_trunks(name: str) -> None:
    """Fault: heads that inherit the trunk's number format, in which small updates are lost."""
    trunk = Trunk(tiny_model(name).bfloat16(), tokens=TOKENS)
    heads = new_heads(trunk, "regression", depth=2)
    fit(heads, trunk, [rows(trunk, 2, seed=0)])
    assert {parameter.dtype for parameter in heads.parameters()} == {torch.float32}
    assert all(torch.isfinite(parameter).all() for parameter in heads.parameters())


def test_layers_without_the_usual_names() -> None:
    """Fault: an identity start that is none, because no projection was found."""
    layer = nn.ModuleDict({"attention_out": nn.Linear(4, 4), "down_proj": nn.Linear(4, 4)})
    with pytest.raises(UnsupportedModel, match=r"OddForCausalLM: heads.init: .*accepted here: copy_last"):
        silence(layer, "OddForCausalLM")


def test_draft_vocabulary_survives(llama: Trunk) -> None:
    """Fault: a start that overwrites the draft vocabulary."""
    vocabulary = torch.tensor([3, 5, 8])
    heads = random_heads(llama, vocabulary=vocabulary)
    fit(heads, llama, [rows(llama, 2, seed=0)])
    assert torch.equal(heads.rows(), vocabulary)
