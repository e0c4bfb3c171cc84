"""`mtpd distill --dry-run`: every shipped recipe from a configuration alone, and the plan against a real run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mtpd.cli import main
from mtpd.data.prompts import load_prompts
from mtpd.heads.norms import gain
from mtpd.plan.plan import Plan, plan
from mtpd.recipe import Recipe, load_recipe
from mtpd.run.distill import distill

ROOT = Path(__file__).parents[1]
# Those of bytes are for a model that has to be pretrained first; tests/test_pretrain.py has them.
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.yaml") if not path.stem.startswith("bytes-code"))
CONFIGS = {
    "llama-3.1-8b": "llama-3.1-8b",
    "llama-3.1-70b": "llama-3.1-70b",
    "mistral-7b": "mistral-7b-v0.3",
    "qwen3-8b": "qwen3-8b",
    "qwen3-30b-a3b": "qwen3-30b-a3b",
}
"""Recipes of models that a test cannot load, and the folder of the model's configuration in tests/configs."""

PUBLISHED = {
    "llama-3.1-8b": 8.03e9,
    "llama-3.1-70b": 70.6e9,
    "mistral-7b": 7.25e9,
    "qwen3-8b": 8.19e9,
    "qwen3-30b-a3b": 30.5e9,
}


def layer(config: dict[str, Any]) -> int:
    """Parameters of a decoder layer, by hand."""
    wide, heads = config["hidden_size"], config["num_attention_heads"]
    width = config.get("head_dim") or wide // heads
    attention = 2 * wide * heads * width + 2 * wide * config["num_key_value_heads"] * width
    norms = 2 * wide
    if config["model_type"].startswith("qwen3"):
        norms += 2 * width  # of queries and keys
    if "num_experts" in config:
        experts = config["num_experts"] * 3 * wide * config["moe_intermediate_size"]
        return attention + norms + experts + config["num_experts"] * wide  # and the router
    return attention + norms + 3 * wide * config["intermediate_size"]


def overrides(path: Path) -> list[str]:
    return [f"model={ROOT / 'tests' / 'configs' / CONFIGS[path.stem]}"] if path.stem in CONFIGS else []


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_every_recipe_can_be_planned_from_a_configuration(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: a shipped recipe is refused, needs weights to be planned, or its plan leaves files behind."""
    monkeypatch.chdir(tmp_path)
    assert main(["distill", str(path), *overrides(path), "--dry-run"]) == 0, capsys.readouterr().err
    output = capsys.readouterr()
    assert list(tmp_path.iterdir()) == []
    assert output.err == ""
    for line in ("model", "vocabulary", "frozen", "trained", "prompts", "tokens", "steps", "trunk passes", "disk"):
        assert re.search(rf"^{line}  +\S", output.out, flags=re.MULTILINE), line
    assert re.search(r"^memory, training +[\d.,]+ [kMG]B: ", output.out, flags=re.MULTILINE)
    assert max(map(len, output.out.splitlines())) <= 100
    assert "unknown" not in output.out


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem in CONFIGS], ids=lambda path: path.stem)
def test_parameters_are_counted_as_by_hand(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: the plan counts shared or tied weights twice, or builds heads of another shape than a run would."""
    config = json.loads((ROOT / "tests" / "configs" / CONFIGS[path.stem] / "config.json").read_text())
    recipe = load_recipe(path)
    wide, rows = config["hidden_size"], config["vocab_size"]
    frozen = 2 * rows * wide + config["num_hidden_layers"] * layer(config) + wide
    assert frozen == pytest.approx(PUBLISHED[path.stem], rel=2e-3)
    # A block with its final norm, two norms of what it reads, and the projection of both.
    trained = (layer(config) + wide + 2 * wide + 2 * wide * wide) * (1 if recipe.heads.shared else recipe.heads.depth)

    assert main(["distill", str(path), *overrides(path), "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert f"{frozen:,} parameters" in output
    assert f"{trained:,} parameters" in output
    assert f"vocabulary          {rows:,} tokens; " in output
    # float32 weights, as many gradients, and two states of Adam.
    for part, bytes_each in (("heads, float32", 4), ("gradients", 4), ("optimizer", 8)):
        assert f"{part} ({bytes_each * trained / 1e9:.1f} GB)" in " ".join(output.split())


def planned(*words: str) -> Plan:
    return plan(load_recipe(None, ["model=tiny", *words]))


def test_prompts_longer_than_the_context_are_named(tmp_path: Path) -> None:
    """Fault: the plan counts prompts that the run leaves out, without a word."""
    path = tmp_path / "asked.jsonl"
    rows = [{"prompt": f"Question {number}?"} for number in range(19)] + [{"prompt": "long " * 20_000}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = planned(f"data.prompts={path}", "data.held_out=builtin")
    [note] = [note for note in found.text.notes if "cannot be used" in note]
    assert "1 longer than the context (first: prompt asked-19" in note


def test_the_plan_of_a_run_that_is_then_made(tmp_path: Path) -> None:
    """Fault: the plan promises less than the run then takes."""
    recipe = load_recipe(
        None,
        [
            *("model=tiny", f"output={tmp_path / 'run'}", "heads.depth=2", "heads.vocabulary=100"),
            *("data.limit=60", "data.max_new_tokens=16", "train.epochs=2", "train.micro_batch_rows=4"),
            *("train.gradient_accumulation=2", "evaluation.prompts_limit=1", "evaluation.max_new_tokens=4"),
            "evaluation.decode_prompts=0",
        ],
    )
    before = plan(recipe)
    run = distill(recipe, progress=False)
    assert len(json.loads((run / "provenance.json").read_text())["prompts"]) == before.text.prompts == 60
    index = json.loads((run / "hidden-states" / "index.json").read_text())
    assert before.text.rows is not None
    # Byte tokens: some prompts are longer than a row, are planned to fill it, and are left out.
    assert 0.6 * before.text.rows <= index["rows"] <= before.text.rows
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert before.text.steps is not None
    assert 0.6 * before.text.steps <= last["step"] <= before.text.steps
    trained = sum(t.numel() for t in load_file(run / "heads" / "model.safetensors").values() if t.is_floating_point())
    assert trained == before.trained

    def found(*patterns: str) -> int:
        return sum(path.stat().st_size for pattern in patterns for path in run.glob(pattern))

    disk = {name.split(",")[0]: part or 0 for name, part in before.disk.items()}
    assert found("hidden-states/*") <= 1.02 * disk["hidden states"]
    assert found("responses.jsonl") <= disk["responses"] + 10_000
    assert found("heads*/*") == pytest.approx(disk["heads before and after"], rel=0.05)
    assert found("checkpoint-*/*") == pytest.approx(disk["checkpoints"], rel=0.15)
    assert before.peak_memory == max(sum(parts.values()) for parts in before.memory.values())


def test_prompts_are_counted_where_they_lie(tmp_path: Path) -> None:
    """Fault: repeated or held-out prompts are planned as training prompts, or a file is not read."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Count to {n % 20}."}) + "\n" for n in range(30)))
    text = planned(f"data.prompts={path}", "data.held_out_count=5").text
    assert (text.prompts, text.held_out) == (15, 5)
    assert planned().text.prompts == len(load_prompts("builtin"))


def test_data_sets_of_the_hub_are_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a plan downloads gigabytes, or invents numbers where none are known."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded a data set")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    known = planned("data.prompts=org/prompts", "data.limit=1000", "data.held_out_count=100")
    assert (known.text.prompts, known.text.held_out) == (900, 100)
    assert "not loaded" in known.table()
    unknown = planned("data.prompts=org/prompts")
    assert (unknown.text.prompts, unknown.text.rows, unknown.text.steps) == (None, None, None)
    assert "set data.limit" in unknown.table()
    assert planned("data.prompts=org/prompts", "train.max_steps=7").text.steps == 7


@pytest.mark.parametrize(
    ("more", "less"),
    [
        (["heads.depth=4"], ["heads.depth=2"]),
        (["train.micro_batch_rows=8"], ["train.micro_batch_rows=2"]),
        (["data.hidden_states=disk"], ["data.hidden_states=recompute"]),
        (["data.hidden_states=memory"], ["data.hidden_states=recompute"]),
        (["heads.vocabulary=100", "train.loss=tv"], ["heads.vocabulary=100", "train.loss=kl"]),
        (["train.arguments.save_total_limit=5", "train.save_steps=1"], ["train.save_steps=1"]),
        (["heads.shared=false"], ["heads.shared=true"]),
    ],
)
def test_what_takes_more_is_planned_to_take_more(more: list[str], less: list[str]) -> None:
    """Fault: a key that costs memory or disk does not show in the plan."""
    large, small = planned(*more), planned(*less)
    assert sum(large.memory["training"].values()) + sum(filter(None, large.disk.values())) > sum(
        small.memory["training"].values()
    ) + sum(filter(None, small.disk.values()))


def test_a_row_longer_than_the_context_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a plan is printed for a run that would be refused."""
    assert main(["distill", "model=tiny", "data.row_length=4096", "--dry-run"]) == 2
    assert "longer than the context of tiny; accepted: at most 1024" in capsys.readouterr().err


def test_norms_without_values_have_their_kind() -> None:
    """Fault: heads of a planned Gemma fail, since a norm on the meta device cannot say how it stores its gain."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    with torch.device("meta"):
        for kind in (Gemma2RMSNorm, LlamaRMSNorm):
            assert gain(kind(4)).shape == (4,)


def test_the_recipe_is_the_plans_own() -> None:
    """Fault: the plan is made from another recipe than it says."""
    recipe: Recipe = load_recipe(None, ["model=tiny", "heads.depth=3"])
    assert plan(recipe).recipe == recipe
