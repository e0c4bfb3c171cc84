"""Runs of `mtpd pretrain`: kinds of heads, tokenizers, checkpoints that are trained on, several ranks, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_fresh_ranks_each
from safetensors.torch import load_file
from transformers import AutoConfig, ByT5Tokenizer

from mtpd.cli import main
from mtpd.data.models import load_model, trunk_fingerprint
from mtpd.heads import load_heads
from mtpd.recipe import load_pretrain_recipe
from mtpd.recipe.shipped import shipped_folder
from mtpd.trunk import Trunk

MODEL = (
    "model={model_type: llama, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2}"
)
SMALL = [
    "dtype=float32",
    "data.row_length=32",
    "data.held_out_rows=2",
    "train.micro_batch_rows=2",
    "train.logging_steps=1",
    "train.max_steps=4",
    "evaluation.steps=2",
]


def texts(folder: Path, *, count: int = 40) -> list[str]:
    """A file of text, and the words that name it."""
    path = folder / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"line {i} of {i * i} words, " * 4}) for i in range(count)))
    return [f"data.texts={path}", f"data.held_out={path}"]


KINDS = {
    "chain": ["train.beta=1.5", "train.top_n=30"],
    "circuit": ["heads.circuit.components=2", "train.loss=kl"],
    "medusa": ["train.loss=jsd", "train.optimizer=muon"],
    "parallel": ["train.loss=lk", "heads.trunk_gradient=false"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_heads_and_a_checkpoint_after_it(kind: str, tmp_path: Path) -> None:
    """Fault: a kind or a loss that fails beside a model that is trained, or leaves what cannot be trained on."""
    common = ["pretrain", *SMALL, *texts(tmp_path), f"heads.kind={kind}", "heads.depth=2", *KINDS[kind]]
    if kind == "chain":
        common.append("dtype=bfloat16")
    assert main([*common, MODEL, "tokenizer=bpe:270", f"output={tmp_path / 'new'}"]) == 0
    steps = [json.loads(line) for line in (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()]
    assert [each["step"] for each in steps if "eval_ce_0" in each] == [2, 4]
    assert all(name in steps[0] for name in ("ce_0", "ce_1", "train_car_2"))
    model, tokenizer = load_model(str(tmp_path / "new" / "model"), dtype="float32")
    assert len(tokenizer) == 270
    if kind != "chain":
        load_heads(tmp_path / "new" / "heads", Trunk(model), fingerprint=trunk_fingerprint(model))
    again = [*common, f"model={tmp_path / 'new' / 'model'}", f"output={tmp_path / 'more'}"]
    if kind in ("chain", "parallel"):
        again.append(f"heads.source={tmp_path / 'new' / 'heads'}")
    assert main(again) == 0
    held_out = [json.loads((tmp_path / name / "held-out.json").read_text()) for name in ("new", "more")]
    assert held_out[1]["ce_0"] < held_out[0]["ce_0"]
    if len(again) > len(common) + 2:
        assert held_out[1]["ce_2"] < held_out[0]["ce_2"]


def test_a_model_alone(tmp_path: Path) -> None:
    """Fault: a model without heads that cannot be trained, or that is not saved with its checkpoints."""
    words = ["pretrain", *SMALL, *texts(tmp_path), MODEL, f"output={tmp_path / 'run'}"]
    assert main(words) == 0
    assert not (tmp_path / "run" / "heads").exists()
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    for path in (tmp_path / "run" / "checkpoint-4").iterdir():
        path.unlink()
    assert main(words) == 0
    again = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_a_loss_that_rises_ends_the_run_with_the_best_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a model that diverges is trained to the end, or what was good of it is lost."""
    words = [*SMALL, *texts(tmp_path), MODEL, f"output={tmp_path / 'run'}", "heads.depth=1", "heads.kind=parallel"]
    words += ["train.learning_rate=3.0", "train.scheduler=constant", "train.max_steps=40", "evaluation.max_rise=0.0"]
    assert main(["pretrain", *words]) == 1
    told = capsys.readouterr().err
    assert "held-out loss rose from" in told
    assert "evaluation.max_rise: 0.0 allows; lower train.learning_rate; the model of step" in told
    best = float(told.split("rose from ")[1].split()[0])
    assert json.loads((tmp_path / "run" / "held-out.json").read_text())["ce_0"] == pytest.approx(best, abs=1e-3)
    load_model(str(tmp_path / "run" / "model"))


def trained_in_ranks(words: list[str]) -> int:
    return main(["pretrain", *words])


def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    """Fault: ranks that see the same rows, gradients that are not joined, or a rank that trains its own tokenizer."""
    common = [*SMALL, *texts(tmp_path), MODEL, "tokenizer=bpe:270", "heads.depth=2", "seed=3"]
    runs: dict[str, tuple[int, list[str]]] = {
        "one": (1, ["train.micro_batch_rows=4"]),
        "ddp": (2, []),
        "zero2": (2, ["train.deepspeed=zero2"]),
        "one-muon": (1, ["train.micro_batch_rows=4", "train.optimizer=muon"]),
        "ddp-muon": (2, ["train.optimizer=muon"]),
    }
    calls = [(count, [[*common, *words, f"output={tmp_path / name}"]]) for name, (count, words) in runs.items()]
    for ended in in_fresh_ranks_each("test_pretrain_runs", "trained_in_ranks", calls):
        assert set(ended.codes) == {0}, ended.errors
        assert set(ended.values) == {0}, ended.errors
    for name, other in {"ddp": "one", "zero2": "one", "ddp-muon": "one-muon"}.items():
        for part in ("model", "heads"):
            found, wanted = (load_file(tmp_path / run / part / "model.safetensors") for run in (name, other))
            for key, tensor in wanted.items():
                torch.testing.assert_close(found[key], tensor, atol=2e-5, rtol=1e-3, msg=f"{name}: {key}")


WRONG: dict[str, tuple[list[str], str]] = {
    "heads deeper than a row": (
        ["heads.depth=16", "data.row_length=16"],
        "heads.depth: 16 heads are deeper than a row of 16 tokens; accepted: at most 14",
    ),
    "a vocabulary that the text cannot train": (
        ["tokenizer=bpe:5000"],
        "tokenizer: bpe:5000 is more than the text can train, which has merges for",
    ),
    "a size that is none": (["tokenizer=bpe:12"], "tokenizer: bpe:12 is not accepted; accepted: bpe:N, N at least 257"),
    "muon in pieces": (
        ["train.optimizer=muon", "train.deepspeed=zero1"],
        "train.optimizer: muon is not accepted with train.deepspeed: zero1",
    ),
    "a weight that nothing reads": (
        ["heads.depth=2", "train.loss=ce", "train.beta=0.5"],
        "train.beta: 0.5 does nothing with train.loss: ce; accepted: null, or loss: mtp_d",
    ),
    "heads of nothing": (
        ["heads.source=nowhere"],
        "heads.source: nowhere needs the checkpoint of these heads as model",
    ),
    "an old key": (["heads.block=linear"], "heads.block is no longer a key: the block of parallel heads is"),
    "no such checkpoint": (["model=./nowhere"], "./nowhere"),
    "a recipe of the other command": (["data.prompts=builtin"], "this is a recipe of mtpd distill"),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a mistake that shows as a traceback, or trains something else."""
    words, message = WRONG[name]
    given = [] if any(word.startswith("model=") for word in words) else [MODEL]
    assert main(["pretrain", *SMALL, *texts(tmp_path), *given, f"output={tmp_path / 'run'}", *words]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "run" / "model").exists()


def test_a_tokenizer_that_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: tokens that a checkpoint has no rows for, which are met in the middle of the training."""
    words = ["pretrain", *SMALL, *texts(tmp_path)]
    assert main([*words, MODEL, "train.max_steps=1", f"output={tmp_path / 'bytes'}"]) == 0
    assert main([*words, MODEL, "train.max_steps=1", "tokenizer=bpe:280", f"output={tmp_path / 'bpe'}"]) == 0
    given = [f"model={tmp_path / 'bytes' / 'model'}", f"tokenizer={tmp_path / 'bpe' / 'model'}"]
    capsys.readouterr()
    assert main([*words, *given, f"output={tmp_path / 'run'}"]) == 2
    assert "has 280 tokens, and" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(shipped_folder().glob("papers/*.yaml")), ids=lambda path: path.stem)
def test_papers(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Fault: a recipe of a paper with a key that was renamed, or heads that its model cannot have."""
    monkeypatch.chdir(tmp_path)
    text = path.read_text()
    if "data.texts" not in text:
        # It needs a model that was pretrained: here one of the same form without weights.
        name = "mtp-d" if path.stem.startswith("looped") else "parallel"
        of_model = load_pretrain_recipe(f"papers/{name}{'-gpu' * path.stem.endswith('gpu')}")
        assert isinstance(of_model.model, dict)
        AutoConfig.for_model(**of_model.model).save_pretrained(tmp_path / "model")
        ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "model")
        words = [f"papers/{path.stem}", f"model={tmp_path / 'model'}", "heads.source=null", "--dry-run"]
        assert main(["distill", *words]) == 0
        assert "trained" in capsys.readouterr().out
        return
    assert main(["pretrain", f"papers/{path.stem}", "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "parameters" in plan
    assert "operations" in plan
    assert not list(tmp_path.iterdir())


def counted(plan: str, title: str) -> Any:
    line = next(line for line in plan.splitlines() if line.startswith(title))
    return int(line.split(":")[-1].split()[0].replace(",", ""))


def test_the_plan_counts_what_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a plan of another model than the one that is trained."""
    words = ["pretrain", *SMALL, *texts(tmp_path), MODEL, f"output={tmp_path / 'run'}", "heads.depth=2"]
    assert main([*words, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert main(words) == 0
    for part in ("model", "heads"):
        tensors = load_file(tmp_path / "run" / part / "model.safetensors")
        assert counted(plan, part) == sum(tensor.numel() for name, tensor in tensors.items() if name != "vocabulary")
