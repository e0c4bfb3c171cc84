"""Training the trunk together with the heads: adapters, losses, limits, and the model that comes out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from architectures import TOKENS, random_heads, random_tokens, tiny_model, tiny_trunk
from torch import Tensor

import mtpd
from mtpd.alignment import IGNORED
from mtpd.cli import main
from mtpd.data.models import load_model
from mtpd.distill.joint import JointTrunk
from mtpd.distill.model import DistillModel
from mtpd.losses.settings import LossSettings
from mtpd.trunk import Trunk


def adapted(*, original: bool = True, weight: float = 2.0) -> JointTrunk:
    """Adapters on a tiny trunk, none of them zero."""
    trunk = Trunk(tiny_model("llama"), tokens=TOKENS)
    joint = JointTrunk(trunk, rank=4, loss_weight=weight, original_teacher=original, seed=0)
    with torch.no_grad():
        for name, parameter in joint.parameters.items():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    return joint


def batch() -> dict[str, Tensor]:
    ids = random_tokens(2, 24)
    return {
        "input_ids": ids,
        "labels": torch.where(torch.arange(24) >= 4, ids, IGNORED),
        "position_ids": torch.arange(24).expand_as(ids),
    }


def test_adapters_can_be_switched_off_and_merged(tmp_path: Path) -> None:
    """Fault: a teacher that is not the original trunk, new adapters that change it, or a merge with a wrong scale."""
    row = batch()
    original = Trunk(tiny_model("llama"), tokens=TOKENS).hidden(row["input_ids"])
    fresh = JointTrunk(
        Trunk(tiny_model("llama"), tokens=TOKENS), rank=4, loss_weight=1.0, original_teacher=True, seed=0
    )
    torch.testing.assert_close(fresh.trunk.hidden(row["input_ids"]), original, rtol=0, atol=0)
    joint = adapted()
    changed = joint.trunk.hidden(row["input_ids"])
    assert not torch.allclose(changed, original, atol=1e-3)
    with joint.disabled():
        torch.testing.assert_close(joint.trunk.hidden(row["input_ids"]), original, rtol=0, atol=0)
    torch.testing.assert_close(joint.trunk.hidden(row["input_ids"]), changed, rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in joint.parameters.values())
    joint.save(tmp_path)
    fresh.load(tmp_path)
    torch.testing.assert_close(fresh.trunk.hidden(row["input_ids"]), changed, rtol=0, atol=0)

    class Words:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("{}")

    joint.write_merged(tmp_path / "trunk", Words())
    again = Trunk(type(joint.trunk.model).from_pretrained(tmp_path / "trunk"), tokens=TOKENS)
    torch.testing.assert_close(again.hidden(row["input_ids"]), changed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("original", [True, False])
def test_the_loss_of_both(original: bool) -> None:
    """Fault: a main head without loss, off by one or over prompts; a teacher with gradient, or the wrong one."""
    joint = adapted(original=original)
    trunk, row = joint.trunk, batch()
    heads = random_heads(tiny_trunk("llama"), depth=2).train()
    settings = LossSettings((0.0, 0.0), (0.5, 0.5))
    with joint.disabled():
        hidden = trunk.hidden(row["input_ids"]) if original else None
    loss = DistillModel(trunk, heads, settings, joint=joint)(**row, hidden=hidden, num_items_in_batch=1)["loss"]
    states = joint.states(row["input_ids"], row["position_ids"])
    logits = trunk.unembedding.select(None)(states)
    expected = 2.0 * torch.nn.functional.cross_entropy(
        logits[:, 3:-1].reshape(-1, logits.shape[-1]), row["input_ids"][:, 4:].reshape(-1), reduction="sum"
    )
    teacher = trunk.unembedding.select(None)(hidden if hidden is not None else states).detach()
    drafts = heads(trunk, states, row["input_ids"], position_ids_BT=row["position_ids"])
    for depth, draft in enumerate(drafts, start=1):
        places = slice(3, 24 - depth - 1)
        p = trunk.unembedding.select(None)(draft[:, places]).log_softmax(-1)
        q = teacher[:, places.start + depth : places.stop + depth].softmax(-1)
        expected = expected + 0.5 * torch.nn.functional.kl_div(p, q, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    parameters = list(joint.parameters.values())
    ours = torch.autograd.grad(loss, parameters)
    for found, wanted in zip(ours, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * max(1.0, wanted.abs().max().item()))
    assert trunk.unembedding.weight.grad is None


def words(output: Path, *further: str) -> list[str]:
    return [
        *("distill", "model=tiny", f"output={output}", "heads.depth=2", "dtype=float32", "device=cpu"),
        *(
            "data.limit=12",
            "data.max_new_tokens=24",
            "train.max_steps=4",
            "train.rows_per_step=2",
            "train.save_steps=2",
        ),
        *("train.logging_steps=1", "train.learning_rate=1e-3", "train.top_n=50"),
        *("evaluation.prompts_limit=4", "evaluation.max_new_tokens=16"),
        *("trunk.train=lora", "trunk.rank=4", "trunk.max_rise=1.0", "trunk.check_steps=2"),
        *further,
    ]


def test_a_run_that_trains_its_trunk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: heads that belong to another trunk than the one written, or a resume that loses adapters."""
    run = tmp_path / "run"
    assert main(words(run)) == 0
    found = json.loads((run / "perplexity.json").read_text())
    assert found["step"] == 4
    assert found["before"] != found["after"]
    assert f"perplexity {found['before']:.4f} before, {found['after']:.4f} after" in capsys.readouterr().out
    model = mtpd.load(run)
    ids = model.tokenizer("Say three words.", return_tensors="pt")["input_ids"]
    trained, _ = load_model(str(run / "trunk"), dtype="float32")
    expected = trained.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), expected)
    arguments = ["eval", str(run), "--suite", "demo", "--limit", "4", "--max-new-tokens", "16", "--check-trunk"]
    assert main([*arguments, "--responses", str(tmp_path / "responses")]) == 0
    files = [run / "heads" / "model.safetensors", run / "trunk" / "model.safetensors"]
    whole = [file.read_bytes() for file in files]
    for name in ("heads", "trunk", "checkpoint-4"):
        shutil.rmtree(run / name)
    (run / "acceptance.json").unlink()
    assert main(words(run)) == 0
    assert [file.read_bytes() for file in files] == whole


def test_a_rise_in_perplexity_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a trunk that is made worse without a word."""
    run = tmp_path / "run"
    further = ["trunk.max_rise=0.001", "trunk.loss_weight=0.0", "train.learning_rate=0.1", "trunk.teacher=detached"]
    assert main(words(run, *further)) == 2
    assert "data.hidden_states: disk does nothing with trunk.teacher: detached" in capsys.readouterr().err
    assert main(words(run, *further, "data.hidden_states=recompute")) == 1
    said = capsys.readouterr().err.replace("\r", "\n").splitlines()[-1]
    assert said.startswith("mtpd: error: the main head's perplexity rose from ")
    assert not (run / "trunk").exists()
    assert not (run / "heads").exists()
