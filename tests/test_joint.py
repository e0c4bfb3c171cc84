"""Training the trunk together with the heads: adapters, losses, limits, and the model that comes out."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import TOKENS, random_heads, random_tokens, tiny_model, tiny_trunk
from kinds import random_kind
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mtpd
from mtpd.alignment import IGNORED
from mtpd.cli import main
from mtpd.data.models import load_model
from mtpd.losses.settings import LossSettings
from mtpd.train.joint_trunk import AdaptedTrunk, FullTrunk
from mtpd.train.model import DistillModel
from mtpd.trunk import Trunk


def adapted(*, original: bool = True) -> AdaptedTrunk:
    """Adapters on a tiny trunk, none of them zero."""
    trunk = Trunk(tiny_model("llama"), tokens=TOKENS)
    joint = AdaptedTrunk(trunk, rank=4, original_teacher=original, seed=0)
    with torch.no_grad():
        for name, parameter in joint.parameters.items():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    return joint


def batch(length: int = 24) -> dict[str, Tensor]:
    ids = random_tokens(2, length)
    return {
        "input_ids": ids,
        "labels": torch.where(torch.arange(length) >= 4, ids, IGNORED),
        "position_ids": torch.arange(length).expand_as(ids),
    }


def test_adapters_can_be_switched_off_and_merged(tmp_path: Path) -> None:
    """Fault: a teacher that is not the original trunk, new adapters that change it, or a merge with a wrong scale."""
    row = batch()
    original = Trunk(tiny_model("llama"), tokens=TOKENS).hidden(row["input_ids"])
    fresh = AdaptedTrunk(Trunk(tiny_model("llama"), tokens=TOKENS), rank=4, original_teacher=True, seed=0)
    torch.testing.assert_close(fresh.trunk.hidden(row["input_ids"]), original, rtol=0, atol=0)
    joint = adapted()
    changed = joint.trunk.hidden(row["input_ids"])
    assert not torch.allclose(changed, original, atol=1e-3)
    with joint.original():
        torch.testing.assert_close(joint.trunk.hidden(row["input_ids"]), original, rtol=0, atol=0)
    torch.testing.assert_close(joint.trunk.hidden(row["input_ids"]), changed, rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in joint.parameters.values())
    joint.save(tmp_path)
    fresh.load(tmp_path)
    torch.testing.assert_close(fresh.trunk.hidden(row["input_ids"]), changed, rtol=0, atol=0)

    class Words:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("{}")

    joint.write(tmp_path / "trunk", Words())
    again = Trunk(type(joint.trunk.model).from_pretrained(tmp_path / "trunk"), tokens=TOKENS)
    torch.testing.assert_close(again.hidden(row["input_ids"]), changed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("original", [True, False])
def test_the_loss_of_both(original: bool) -> None:
    """Fault: a main head without loss, off by one or over prompts; a teacher with gradient, or the wrong one."""
    joint = adapted(original=original)
    trunk, row = joint.trunk, batch()
    heads = random_heads(tiny_trunk("llama"), depth=2).train()
    settings = LossSettings((0.0, 0.0), (0.5, 0.5))
    with joint.original():
        hidden = trunk.hidden(row["input_ids"]) if original else None
    loss = DistillModel(trunk, heads, settings, joint=joint)(**row, hidden=hidden, num_items_in_batch=1)["loss"]
    states = joint.states(row["input_ids"], row["position_ids"])
    logits = trunk.unembedding.select(None)(states)
    expected = torch.nn.functional.cross_entropy(
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


@pytest.mark.parametrize(
    ("name", "original", "small"), [("llama", True, True), ("qwen2", True, False), ("gemma2", False, False)]
)
def test_the_loss_of_all_parameters(name: str, original: bool, small: bool) -> None:
    """Fault: gradient of the main head or of the embedding that is lost; a teacher that is read with new weights."""
    trunk, row = Trunk(tiny_model(name), tokens=TOKENS), batch()
    before = Trunk(tiny_model(name), tokens=TOKENS)
    joint = FullTrunk(trunk, original_teacher=original)
    with torch.no_grad():
        for each in joint.parameters.values():
            each.add_(torch.randn(each.shape, generator=torch.Generator().manual_seed(each.numel())) * 0.05)
    rows = torch.arange(2, 110) if small else torch.arange(TOKENS)
    heads = random_heads(tiny_trunk(name), depth=2, vocabulary=rows if small else None).train()
    settings = LossSettings((0.3, 0.2), (0.5, 0.4))
    hidden = before.hidden(row["input_ids"]) if original else None
    model = DistillModel(trunk, heads, settings, joint=joint)
    loss = model(**row, hidden=hidden, num_items_in_batch=1)["loss"]

    states = joint.states(row["input_ids"], row["position_ids"])
    targets = row["input_ids"][:, 4:]
    main = trunk.unembedding.select(None)
    expected = torch.nn.functional.cross_entropy(
        main(states)[:, 3:-1].reshape(-1, TOKENS), targets.reshape(-1), reduction="sum"
    )
    teacher = (before.unembedding(hidden) if hidden is not None else trunk.unembedding(states)).detach()[..., rows]
    drafts = heads(trunk, states, row["input_ids"], position_ids_BT=row["position_ids"])
    columns = torch.full((TOKENS,), -1).scatter(0, rows, torch.arange(len(rows)))
    for depth, draft in enumerate(drafts, start=1):
        places = slice(3, 24 - depth - 1)
        p = main(draft[:, places])[..., rows].log_softmax(-1)
        q = teacher[:, places.start + depth : places.stop + depth].softmax(-1)
        wanted = columns[row["input_ids"][:, places.start + depth + 1 : places.stop + depth + 1]]
        ce = torch.nn.functional.nll_loss(p.flatten(0, 1), wanted.flatten(), ignore_index=-1, reduction="sum")
        kl = torch.nn.functional.kl_div(p, q, reduction="sum")
        expected = expected + settings.alpha[depth - 1] * ce + settings.beta[depth - 1] * kl
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    parameters = [*joint.parameters.values(), *heads.parameters()]
    ours = torch.autograd.grad(loss, parameters)
    for found, right in zip(ours, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-3, atol=2e-4 * max(1.0, right.abs().max().item()))
    if original:
        with joint.original() as teaching:
            torch.testing.assert_close(teaching.hidden(row["input_ids"]), hidden, rtol=0, atol=0)


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are alive at the same time and have so many columns."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.peak = columns, 0
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves(out) if isinstance(each, Tensor) and each.ndim > 1]
        self.seen += [weakref.ref(each) for each in tensors if each.shape[-1] == self.columns]
        self.seen = [ref for ref in self.seen if ref() is not None]
        storages = (ref().untyped_storage() for ref in self.seen)
        self.peak = max(self.peak, sum({each.data_ptr(): each.nbytes() for each in storages}.values()))
        return out


def test_memory_of_logits_does_not_grow_with_heads() -> None:
    """Fault: logits, or gradients of logits, of all heads or of all positions at the same time."""
    row = batch(200)
    trunk = Trunk(tiny_model("llama"), tokens=TOKENS)
    joint = FullTrunk(trunk, original_teacher=False)

    def peak(depth: int, *, plainly: bool = False) -> int:
        heads: Any = random_kind(tiny_trunk("llama"), "linear", depth=depth).train()
        model = DistillModel(trunk, heads, LossSettings((0.3,) * depth, (0.5,) * depth), joint=joint)
        with Live(TOKENS) as live:
            if plainly:
                states = joint.states(row["input_ids"], row["position_ids"])
                drafts = heads(trunk, states, row["input_ids"], position_ids_BT=row["position_ids"])
                logits = [trunk.unembedding.select(None)(each) for each in (states, *drafts)]
                sum(each.log_softmax(-1).square().sum() for each in logits).backward()
            else:
                model(**row)["loss"].backward()
        assert all(each.grad is not None for each in [*joint.parameters.values(), *heads.parameters()])
        trunk.model.zero_grad()
        return live.peak

    assert peak(4) == peak(1)
    assert peak(4) < 2 * 200 * TOKENS * 4 * 5
    # The count does see what the usual order keeps.
    assert peak(4, plainly=True) > 1.5 * peak(1, plainly=True)


def words(output: Path, *further: str) -> list[str]:
    return [
        *("distill", "model=tiny", f"output={output}", "heads.depth=2", "dtype=float32", "device=cpu"),
        *(
            "data.limit=12",
            "data.max_new_tokens=24",
            "train.max_steps=4",
            "train.micro_batch_rows=2",
            "train.save_steps=2",
        ),
        *("train.logging_steps=1", "train.learning_rate=1e-3", "train.top_n=50"),
        *("evaluation.prompts_limit=4", "evaluation.max_new_tokens=16"),
        *("trunk.train=lora", "trunk.max_rise=1.0"),
        *further,
    ]


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_run_that_trains_its_trunk(mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: heads that belong to another trunk than the one written, or a resume that loses what it trained."""
    run = tmp_path / "run"
    of_mode = ["trunk.rank=4"] if mode == "lora" else ["heads.kind=parallel", "trunk.learning_rate=1e-4"]
    of_mode.append(f"trunk.train={mode}")
    assert main(words(run, *of_mode)) == 0
    found = json.loads((run / "perplexity.json").read_text())
    assert found["step"] == 4
    assert found["before"] != found["after"]
    assert f"perplexity {found['before']:.4f} before, {found['after']:.4f} after" in capsys.readouterr().out
    model = mtpd.load(run)
    ids = model.tokenizer("Say three words.", return_tensors="pt")["input_ids"]
    trained, _ = load_model(str(run / "trunk"), dtype="float32")
    expected = trained.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), expected)
    start, _ = load_model("tiny", dtype="float32")
    changed = {name for name, each in start.named_parameters() if not torch.equal(each, trained.get_parameter(name))}
    assert changed == {name for name, _ in start.named_parameters() if mode == "full" or "_proj." in name}
    if mode == "lora":
        arguments = ["eval", str(run), "--suite", "demo", "--limit", "4", "--max-new-tokens", "16", "--check-trunk"]
        assert main([*arguments, "--responses", str(tmp_path / "responses")]) == 0
    files = [run / "heads" / "model.safetensors", run / "trunk" / "model.safetensors"]
    whole = [file.read_bytes() for file in files]
    for name in ("heads", "trunk", "checkpoint-4"):
        shutil.rmtree(run / name)
    (run / "acceptance.json").unlink()
    assert main(words(run, *of_mode)) == 0
    assert [file.read_bytes() for file in files] == whole


def test_a_rise_in_perplexity_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a trunk that is made worse without a word."""
    run = tmp_path / "run"
    further = ["trunk.max_rise=0.001", "train.learning_rate=0.1", "trunk.teacher=detached"]
    assert main(words(run, *further)) == 2
    assert "data.hidden_states: disk does nothing with trunk.teacher: detached" in capsys.readouterr().err
    assert main(words(run, *further, "data.hidden_states=recompute")) == 1
    said = capsys.readouterr().err.replace("\r", "\n").splitlines()[-1]
    assert said.startswith("mtpd: error: the main head's perplexity rose from ")
    assert not (run / "trunk").exists()
    assert not (run / "heads").exists()


def test_what_training_all_parameters_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a second model in memory that no plan names; keys that do nothing, or a loss without its gradient."""
    full = [*words(tmp_path / "run", "trunk.train=full", "dtype=bfloat16"), "--dry-run"]
    assert main(full) == 0
    planned = " ".join(capsys.readouterr().out.split())
    assert "trunk as it was, a second model (trunk.teacher: original)" in planned
    assert main([*full, "trunk.teacher=detached", "data.hidden_states=recompute"]) == 0
    assert "second model" not in capsys.readouterr().out
    assert main([*full, "trunk.rank=8"]) == 2
    assert "trunk.rank: 8 does nothing with trunk.train: full; accepted: 16" in capsys.readouterr().err
