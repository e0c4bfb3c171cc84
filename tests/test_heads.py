"""Heads beside their trunk: packing, padding, what training touches, and what is saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures import TOKENS, WINDOW, new_heads, random_heads, random_tokens, tiny_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from mtpd.alignment import IGNORED
from mtpd.errors import UserError
from mtpd.heads import CONFIG, WEIGHTS, Heads, load_heads, save_heads
from mtpd.losses.fused import LossSettings
from mtpd.train.model import DistillModel
from mtpd.trunk import Trunk

SETTINGS = LossSettings((0.3,) * 3, (0.5,) * 3, top_n=20)
LENGTHS = [WINDOW + 9, 5, 1, 2 * WINDOW]


def documents() -> list[dict[str, Tensor]]:
    """Documents of one row each, some longer than the sliding window, all but the first tokens response."""
    rows = []
    for length in LENGTHS:
        ids = random_tokens(1, length, seed=length)
        labels = ids.clone()
        labels[:, : length // 4 + 1] = IGNORED
        rows.append({"input_ids": ids, "labels": labels, "position_ids": torch.arange(length)[None]})
    return rows


def joined(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([row[key] for row in rows], 1) for key in rows[0]}


def padding(length: int) -> dict[str, Tensor]:
    ids = torch.zeros(1, length, dtype=torch.long)
    return {"input_ids": ids, "labels": ids + IGNORED, "position_ids": torch.arange(length)[None]}


def states(trunk: Trunk, heads: Heads, row: dict[str, Tensor]) -> list[Tensor]:
    """States of depth 0 (the trunk) to K of a row, each [1, T, D]."""
    hidden = trunk.hidden(row["input_ids"], position_ids=row["position_ids"])
    with torch.no_grad():
        return [hidden, *heads(trunk, hidden, row["input_ids"], position_ids_BT=row["position_ids"])]


def loss(trunk: Trunk, heads: Heads, *rows: dict[str, Tensor]) -> tuple[float, list[Tensor]]:
    """The summed loss of rows and its gradients."""
    heads.zero_grad()
    total = torch.zeros(())
    for row in rows:
        total = total + DistillModel(trunk, heads, SETTINGS)(**row, num_items_in_batch=1)["loss"]
    total.backward()
    return total.item(), [torch.zeros_like(p) if p.grad is None else p.grad for p in heads.parameters()]


def test_packed_rows_are_separate_rows(trunk: Trunk) -> None:
    """Fault: attention, rotary positions or shifts that cross the border of documents in a row."""
    heads = random_heads(trunk)
    rows = documents()
    packed = [state.split(LENGTHS, dim=1) for state in states(trunk, heads, joined(rows))]
    for number, row in enumerate(rows):
        for depth, expected in enumerate(states(trunk, heads, row)):
            # The last `depth` positions read a token past the document: they never count.
            end = max(0, LENGTHS[number] - depth)
            ours = packed[depth][number][:, :end]
            torch.testing.assert_close(ours, expected[:, :end], rtol=1e-3, atol=1e-4, msg=f"{number} {depth}")
    ours, gradients = loss(trunk, heads, joined(rows))
    theirs, expected_gradients = loss(trunk, heads, *rows)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours > 1.0
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_changes_nothing(trunk: Trunk, side: str) -> None:
    """Fault: padding inside of the loss (left padding adds up to log V a row), or attended to."""
    heads = random_heads(trunk)
    row = documents()[0]
    before = [padding(7)] if side != "right" else []
    after = [padding(9)] if side != "left" else []
    padded = joined([*before, row, *after])
    start, end = 7 * len(before), 7 * len(before) + LENGTHS[0]
    for depth, (ours, expected) in enumerate(zip(states(trunk, heads, padded), states(trunk, heads, row), strict=True)):
        real = slice(start, end - depth)
        torch.testing.assert_close(ours[:, real], expected[:, : LENGTHS[0] - depth], rtol=1e-3, atol=1e-4)
    assert loss(trunk, heads, padded)[0] == pytest.approx(loss(trunk, heads, row)[0], rel=1e-5)


def test_left_padding_with_an_attention_mask(trunk: Trunk) -> None:
    """Fault: the trunk's states under the padding that `generate` uses."""
    ids = documents()[0]["input_ids"]
    padded = torch.cat([torch.zeros(1, 7, dtype=torch.long), ids], 1)
    mask = (torch.arange(padded.shape[1]) >= 7).long()[None]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    ours = trunk.hidden(padded, position_ids=positions, attention_mask=mask)[:, 7:]
    torch.testing.assert_close(ours, trunk.hidden(ids), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_training_touches_the_heads_only(tied: bool) -> None:
    """Fault: gradient leaks into the shared embedding or output head, or a trainer's mode changes the teacher."""
    model = tiny_model("llama")
    assert isinstance(model, LlamaForCausalLM)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    trunk = Trunk(model, tokens=TOKENS)
    heads = random_heads(trunk)
    row = documents()[0]
    with torch.no_grad():
        logits = model(input_ids=row["input_ids"]).logits
        first = [parameter.clone() for parameter in heads.parameters()]
    student = DistillModel(trunk, heads, SETTINGS)
    # Everything that asks for gradients, as a careless trainer would take it.
    trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in heads.parameters()}
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    for _ in range(3):
        student.train()
        student(**row)["loss"].backward()
        optimizer.step()
        assert all(parameter.grad is None for parameter in trunk.parameters())
        assert all(parameter.grad is not None for parameter in heads.parameters())
        optimizer.zero_grad()
    assert heads.training
    assert not any(module.training for module in trunk.modules())
    with torch.no_grad():
        assert torch.equal(model(input_ids=row["input_ids"]).logits, logits)
    assert all(not torch.equal(a, b) for a, b in zip(first, heads.parameters(), strict=True))


def test_every_depth_is_trained(trunk: Trunk) -> None:
    """Fault: a chain that is detached between heads, or parameters of a block that nothing reaches."""
    heads = random_heads(trunk)
    row = documents()[0]
    settings = LossSettings((0.0, 0.0, 1.0), (0.0, 0.0, 0.0))
    DistillModel(trunk, heads, settings)(**row)["loss"].backward()
    for name, parameter in heads.named_parameters():
        assert parameter.grad is not None, name
        # An expert that no token was sent to is the one thing that may stay without gradient.
        assert bool(parameter.grad.any()) or "experts" in name, name


def test_a_head_reads_embedding_then_hidden(llama: Trunk) -> None:
    """Fault: [hidden ; embedding] instead of [embedding ; hidden], or a head that reads the wrong token."""
    heads = random_heads(llama)
    row = documents()[0]
    base = states(llama, heads, row)
    ids = row["input_ids"].clone()
    ids[0, 10] = (ids[0, 10] + 1) % 100 + 3
    hidden = base[0]
    with torch.no_grad():
        changed = [hidden, *heads(llama, hidden, ids, position_ids_BT=row["position_ids"])]
        for depth in range(1, 4):
            first = int((changed[depth] != base[depth]).any(-1)[0].nonzero()[0])
            assert first == 10 - depth
        head = heads.chain()[0]
        size = llama.hidden_size
        nn.init.zeros_(head.project.weight[:, :size])
        embed = torch.randn(1, 4, size)
        assert torch.equal(head.mix(embed, hidden[:, :4]), head.mix(-embed, hidden[:, :4]))
        assert not torch.equal(head.mix(embed, hidden[:, :4]), head.mix(embed, hidden[:, 1:5]))


def test_saved_heads_come_back(trunk: Trunk, tmp_path: Path) -> None:
    """Fault: tensors that a save leaves out or a load skips without a word."""
    heads = random_heads(trunk, vocabulary=torch.arange(5, 90, 2))
    save_heads(heads, tmp_path / "heads")
    loaded = load_heads(tmp_path / "heads", trunk)
    assert loaded.config == heads.config
    assert loaded.rows() is not None
    assert not loaded.training
    for name, tensor in heads.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    row = documents()[0]
    for ours, expected in zip(states(trunk, loaded, row), states(trunk, heads, row), strict=True):
        assert torch.equal(ours, expected)
    assert sorted(path.name for path in (tmp_path / "heads").iterdir()) == [CONFIG, WEIGHTS]


def test_shared_heads_hold_one_block(llama: Trunk, tmp_path: Path) -> None:
    """Fault: one block for all depths that is saved K times, or used at depth 1 only."""
    heads = random_heads(llama, shared=True)
    assert (len(heads.layers), heads.depth, len(heads.chain())) == (1, 3, 3)
    save_heads(heads, tmp_path)
    assert load_heads(tmp_path, llama).depth == 3
    assert len(states(llama, heads, documents()[0])) == 4


def test_weights_are_written_last(llama: Trunk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a save that was interrupted passes for whole heads, since weights without config are there."""
    written: list[str] = []
    monkeypatch.setattr("os.replace", lambda source, target: written.append(Path(target).name))
    save_heads(random_heads(llama), tmp_path)
    assert written == [CONFIG, WEIGHTS]


def test_heads_that_cannot_be_loaded(llama: Trunk, tmp_path: Path) -> None:
    """Fault: a traceback, or half of the weights at random, where files are missing, cut off or another model's."""
    with pytest.raises(UserError, match="no readable heads"):
        load_heads(tmp_path / "nowhere", llama)
    save_heads(new_heads(llama, "identity", fingerprint="abc"), tmp_path)
    load_heads(tmp_path, llama, fingerprint="abc")
    with pytest.raises(UserError, match="another trunk"):
        load_heads(tmp_path, llama, fingerprint="def")

    config, weights = (tmp_path / CONFIG).read_text(), (tmp_path / WEIGHTS).read_bytes()
    for cut in (0, 4, 100, len(weights) - 1):
        (tmp_path / WEIGHTS).write_bytes(weights[:cut])
        with pytest.raises(UserError, match="no readable heads"):
            load_heads(tmp_path, llama)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(UserError, match="model.safetensors"):
        load_heads(tmp_path, llama)
    (tmp_path / WEIGHTS).write_bytes(weights)
    for broken in (config[:-20], "[]", config.replace('"depth"', '"depths"')):
        (tmp_path / CONFIG).write_text(broken)
        with pytest.raises(UserError, match="no readable heads"):
            load_heads(tmp_path, llama)
    changes = {
        "kind": ("circuits", "kind: circuits is not known; accepted: chain"),
        "depth": (2, "source_layers: 3 entries for 2 blocks"),
        "hidden_size": (64, "width 64"),
        "source_layers": ([0, 1, 9], "accepted: 0 to 2"),
        "vocabulary_size": (3, "vocabulary"),
    }
    for key, (value, message) in changes.items():
        edited = {**json.loads(config), key: value}
        del edited["sha256"]
        (tmp_path / CONFIG).write_text(json.dumps(edited))
        with pytest.raises(UserError, match=message):
            load_heads(tmp_path, llama)
