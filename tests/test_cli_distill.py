"""`mtpd distill` itself, on tiny random models of every architecture: files, resuming, and what it refuses."""

from __future__ import annotations

import copy
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config

from mtpd.cli import main
from mtpd.data.builtin_models import tiny_tokenizer
from mtpd.evaluate.acceptance import Acceptance
from mtpd.recipe import load_recipe
from mtpd.train import trainer

ROOT = Path(__file__).parents[1]
PADDING = 5
"""Rows of the vocabulary that are no tokens."""


def save_checkpoint(folder: Path, name: str = "llama", **changes: Any) -> Path:
    """A random model with the tokenizer of bytes, whose vocabulary is padded."""
    tokenizer = tiny_tokenizer()
    config = copy.deepcopy(ARCHITECTURES[name]) if name in ARCHITECTURES else GPT2Config(n_layer=2, n_embd=8, n_head=2)
    settings = {
        "vocab_size": len(tokenizer) + PADDING,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.2,
    }
    for key, value in {**settings, **changes}.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama, where the architecture does not matter."""
    return save_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen short prompts."""
    return write_prompts(tmp_path_factory.mktemp("data") / "prompts.jsonl", [f"Say {n} words." for n in range(16)])


def write_prompts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


def words(model: Path, prompts: Path, output: Path, *further: str) -> list[str]:
    """The command of a run of a second."""
    return [
        "distill",
        f"model={model}",
        f"output={output}",
        f"data.prompts={prompts}",
        *("device=cpu", "dtype=float32", "heads.depth=2"),
        *("data.held_out_count=3", "data.max_new_tokens=12", "data.generation_batch=4", "data.row_length=64"),
        *("train.micro_batch_rows=2", "train.max_steps=2", "train.logging_steps=1", "train.save_steps=1"),
        *("evaluation.prompts_limit=3", "evaluation.max_new_tokens=12", "evaluation.decode_prompts=2"),
        *further,
    ]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and the error, which must be the one line that is not a bar."""
    code = main(arguments)
    shown = capsys.readouterr().err.replace("\r", "\n").splitlines()
    said = [line for line in shown if line.startswith("mtpd: ")]
    assert "Traceback" not in "".join(shown)
    assert said, shown
    assert shown[-1] == said[-1], shown
    return code, said[-1]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_run_of_every_architecture(
    name: str, tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: some architecture needs code of its own, trains nothing, or decodes another text than `generate`."""
    output = tmp_path / "run"
    arguments = words(save_checkpoint(tmp_path / "model", name), prompts, output, "dtype=bfloat16")
    assert main(arguments) == 0, capsys.readouterr().err
    assert {path.name for path in output.iterdir() if not path.name.startswith("hidden-states")} == {
        *(
            "recipe.yaml",
            "provenance.json",
            "responses.jsonl",
            "held-out.jsonl",
            "metrics.jsonl",
            "car.svg",
            "samples.json",
        ),
        "trained-prompts.safetensors",
        *("heads", "heads-before", "checkpoint-1", "checkpoint-2"),
        *("acceptance-before.json", "acceptance.json"),
        "acceptance-decoded.json",
    }

    before, after = (load_file(output / folder / "model.safetensors") for folder in ("heads-before", "heads"))
    trained = {key: value for key, value in after.items() if value.dtype == torch.float32}
    assert trained.keys() == before.keys() - {"vocabulary"}
    assert all(torch.isfinite(value).all() for value in trained.values())
    for depth in range(2):
        assert not torch.equal(before[f"layers.{depth}.project.weight"], after[f"layers.{depth}.project.weight"])
    saved = load_file(output / "checkpoint-2" / "model.safetensors")
    assert saved.keys() == after.keys(), "a checkpoint holds the heads and not the trunk"

    decoded = Acceptance.load(output / "acceptance-decoded.json")
    assert (decoded.mode, decoded.total().prompts, decoded.total().identical) == ("decoded", 2, 2)
    assert Acceptance.load(output / "acceptance.json").total().prompts == 3

    steps = [line for line in lines(output / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2]
    measured = {f"{key}_{k}" for key in ("ce", "kl", "train_car") for k in (1, 2)}
    assert measured | {"loss", "learning_rate", "grad_norm", "tokens_per_second", "epoch"} <= steps[0].keys()

    provenance = json.loads((output / "provenance.json").read_text())
    assert {"schema", "command", "versions", "trunk", "rows", "prompts", "started", "git_commit"} <= provenance.keys()
    assert len(provenance["prompts"]) == 13
    assert load_recipe(output / "recipe.yaml") == load_recipe(None, arguments[1:])


def test_an_interrupted_run_exits_with_130_and_continues(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: the trainer swallows Ctrl-C, or a directory is left that cannot be continued."""
    arguments = words(model, prompts, tmp_path / "run")
    on_log = trainer.Metrics.on_log

    def interrupt(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_log(self, args, state, control, **kwargs)
        signal.raise_signal(signal.SIGINT)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(trainer.Metrics, "on_log", interrupt)
            code, said = refusal(arguments, capsys)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert (code, said) == (130, "mtpd: interrupted; the same command resumes where this one stopped")
    assert main(arguments) == 0


def test_a_finished_run_is_not_repeated(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: the same command trains again, another recipe mixes into the run, or --fresh keeps something old."""
    output = tmp_path / "run"
    arguments = words(model, prompts, output)
    assert main(arguments) == 0
    files = {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    heads = (output / "heads" / "model.safetensors").read_bytes()
    metrics = (output / "metrics.jsonl").read_text()
    with monkeypatch.context() as patch:
        patch.setattr("mtpd.run.distill.train_heads", None)
        assert main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")} == files
    assert (output / "metrics.jsonl").read_text() == metrics

    code, said = refusal([*arguments, "train.learning_rate=5e-3"], capsys)
    assert code == 2
    assert f"{output} holds a run of another recipe (differs in train.learning_rate)" in said
    assert "--fresh" in said
    assert (output / "heads" / "model.safetensors").read_bytes() == heads

    assert main([*arguments, "train.learning_rate=5e-3", "--fresh"]) == 0
    assert (output / "heads" / "model.safetensors").read_bytes() != heads
    assert len(lines(output / "metrics.jsonl")) == len(metrics.splitlines())


def test_a_directory_with_other_files_is_left_alone(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: --fresh deletes a folder that never was a run."""
    (tmp_path / "thesis.txt").write_text("years of work")
    code, said = refusal([*words(model, prompts, tmp_path), "--fresh"], capsys)
    assert (code, "is no run directory" in said) == (2, True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("heads.dept=2", "heads.dept: unknown recipe key; did you mean heads.depth?"),
        ("heads.depth=two", "heads.depth: two is not accepted"),
        ("data.prompts=nowhere.jsonl", "data.prompts: nowhere.jsonl: no such file"),
        ("model=./nowhere", "model ./nowhere: no such directory"),
        ("data.row_length=512", "data.row_length: 512 is longer than the context"),
        ("data.held_out_count=99", "data.held_out_count: 99 of 16 distinct prompts leave none to train on"),
        ("train.arguments={optim: nonsense}", "train.arguments: "),
    ],
)
def test_mistakes_in_the_recipe(
    override: str, message: str, model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: a wrong key or value ends in a traceback, a failure's exit code, or after minutes of work."""
    code, said = refusal(words(model, prompts, tmp_path / "run", override), capsys)
    assert (code, said[: len("mtpd: error: ")]) == (2, "mtpd: error: ")
    assert message in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "holds no prompts"),
        (["word " * 80] * 16 + ["letter " * 60] * 5, "1 longer than the context (first: "),
    ],
)
def test_prompts_that_cannot_be_used(
    texts: list[str], message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: a run without a single usable prompt crashes later, or trains on nothing."""
    prompts = write_prompts(tmp_path / "prompts.jsonl", texts)
    code, said = refusal(words(model, prompts, tmp_path / "run", "data.held_out_count=1"), capsys)
    assert (code, message in said) == (2, True), said


def test_models_that_cannot_be_used(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a model that lacks something is trained on all the same, or refused without the reason."""
    small = save_checkpoint(tmp_path / "small", vocab_size=100, eos_token_id=None, pad_token_id=None)
    absolute = save_checkpoint(tmp_path / "absolute", "gpt2")
    bare = save_checkpoint(tmp_path / "bare", "qwen2")
    for path in bare.glob("*tokenizer*"):
        path.unlink()
    halved = save_checkpoint(tmp_path / "halved")
    weights = halved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    for model, message in [
        (small, "text has token 256 ('<|im_start|>'), which its tokenizer knows and the model does not"),
        (absolute, "GPT2LMHeadModel: cannot build heads for it"),
        (bare, "its tokenizer cannot be loaded"),
        (halved, f"model {halved}: cannot be loaded"),
    ]:
        code, said = refusal(words(model, prompts, tmp_path / "run"), capsys)
        assert (code, message in said) == (2, True), said


def test_code_of_a_model_is_not_run(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: Python files that come with a model are executed although the recipe does not say so."""
    model = save_checkpoint(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "other", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "evil.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\n")
    for option in ([], ["--dry-run"]):
        code, said = refusal([*words(model, prompts, tmp_path / "run"), *option], capsys)
        assert (code, "set trust_remote_code=true if you trust it" in said) == (2, True), said
    assert not (tmp_path / "was-run").exists()


def test_a_file_that_cannot_be_written(model: Path, prompts: Path, tmp_path: Path) -> None:
    """Fault: the optimizer's state, the largest file, fails without a word about the cause, or half of it stays."""
    arguments = words(model, prompts, tmp_path / "run", "data.hidden_states=recompute")

    def limit() -> None:
        # Room for the heads, and not for the optimizer, which is twice as large.
        resource.setrlimit(resource.RLIMIT_FSIZE, (110_000, 110_000))

    done = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        preexec_fn=limit,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    state = tmp_path / "run" / "checkpoint-1" / "optimizer.safetensors"
    assert last == f"mtpd: error: {state}: cannot write: File too large", done.stderr
    assert not state.exists()
    for noise in ("WARNING", "Loading weights", "Warning:"):
        assert noise not in done.stdout + done.stderr
    assert (tmp_path / "run" / "checkpoint-1" / "model.safetensors").is_file()
    assert main(arguments) == 0
