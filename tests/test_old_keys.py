"""Keys that recipes had before: named in one line where a user writes them, and read in the recipe of a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from architectures import tiny_trunk
from kinds import random_kind
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from seals import edited

import mtpd
from mtpd.cli import main
from mtpd.errors import UserError
from mtpd.heads import load_heads, save_heads
from mtpd.recipe import dump, load_pretrain_recipe, load_recipe, recipe_schema
from mtpd.recipe.old_keys import DROPPED, RENAMED
from mtpd.recipe.text import keys_of
from mtpd.train.optimizer_state import OPTIMIZER, read_step_rows, save_state

SAID: dict[str, Any] = {
    "data.store": "states",
    "train.max_grad_norm": 0.5,
    "train.rows_per_step": 2,
    "train.save_total_limit": 9,
    "train.weight_decay": 0.1,
}
"""Renamed keys with values that are not their defaults."""


def put(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[name] = value


def age(file: Path, **said: Any) -> None:
    """Writes the recipe of a run as it was before: with all old keys, at their defaults where `said` has none."""
    values = yaml.safe_load(file.read_text())
    said = {"train.rows_per_step": values["train"].pop("micro_batch_rows"), **said}
    for key, (default, _) in {**RENAMED, **DROPPED}.items():
        put(values, key, said.get(key, default))
    file.write_text(yaml.safe_dump(values))


@pytest.mark.parametrize("key", [*RENAMED, *DROPPED])
def test_an_old_key_is_named_in_one_line(key: str, tmp_path: Path) -> None:
    """Fault: a recipe of last month ends in a list of what is accepted, or its key is taken and ignored."""
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: tiny\n{key}: 2\n")
    with pytest.raises(UserError) as error:
        load_recipe(file)
    expected = f"is now {RENAMED[key][1]}" if key in RENAMED else "is no longer a key: "
    assert str(error.value).startswith(f"{key} {expected}")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=f"{key} is n"):
        load_recipe("smoke", [f"{key}=2"])


def test_old_keys_are_none_of_todays() -> None:
    """Fault: a key that is there is refused as an old one, or an old one is renamed to what is not there."""
    known = set(keys_of(recipe_schema()))
    assert not known & {*RENAMED, *DROPPED}
    assert {new for _, new in RENAMED.values() if ".arguments." not in new} <= known


def test_the_recipe_of_a_run_keeps_its_meaning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fault: a value under an old key is lost, or what no key says any more is dropped without a word."""
    file = tmp_path / "recipe.yaml"
    today = load_recipe("smoke", [f"output={tmp_path}"])
    (tmp_path / "provenance.json").touch()
    file.write_text(dump(today))
    age(file)
    assert load_recipe(file) == today
    file.write_text(dump(today))
    age(file, **SAID)
    recipe = load_recipe(file)
    assert recipe.data.hidden_states == "./states"
    assert recipe.train.micro_batch_rows == 2
    assert recipe.train.arguments == {"max_grad_norm": 0.5, "save_total_limit": 9, "weight_decay": 0.1}
    file.write_text(dump(today))
    age(file, **{"train.jsd_mix": 0.3})
    with pytest.raises(UserError, match=r"^train\.jsd_mix is no longer a key: [^;]*; leave it out \("):
        load_recipe(file)
    (tmp_path / "heads").mkdir()
    (tmp_path / "heads" / "model.safetensors").touch()
    assert load_recipe(file) == today
    assert "train.jsd_mix: 0.3 is left out, it is no longer a key: jsd mixes" in caplog.text
    # Elsewhere the same file is a recipe that somebody wrote.
    shutil.rmtree(tmp_path / "heads")
    (tmp_path / "provenance.json").unlink()
    with pytest.raises(UserError, match=r"train\.rows_per_step is now train\.micro_batch_rows"):
        load_recipe(file)


def test_pretraining_has_keys_that_distilling_had(tmp_path: Path) -> None:
    """Fault: the weight decay of a pretraining is taken for an old key, or its rows of a step for an unknown one."""
    recipe = load_pretrain_recipe("bytes-code", ["train.weight_decay=0.3", "train.micro_batch_rows=3"])
    assert recipe.train.weight_decay == 0.3
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "recipe.yaml").write_text(dump(recipe).replace("micro_batch_rows", "rows_per_step"))
    assert load_pretrain_recipe(tmp_path / "recipe.yaml") == recipe


def test_a_finished_run_of_before_is_opened(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: heads that took days cannot be loaded, measured, exported, extended or trained on after an upgrade."""
    recipe = load_recipe(finished_run / "recipe.yaml")
    words = ["smoke", f"output={finished_run}", *_overrides(recipe)]
    age(finished_run / "recipe.yaml")
    assert load_recipe(finished_run / "recipe.yaml") == recipe
    assert mtpd.load(finished_run).heads is not None
    assert main(["eval", str(finished_run), "--suite", "demo", "--limit", "2", "--max-new-tokens", "8"]) == 0
    assert main(["export", str(finished_run), "--to", "transformers", "--no-perturb", "-o", str(tmp_path / "out")]) == 0
    assert main(["extend", str(finished_run), "--to", "3", "--adapters", "2", "--steps", "1"]) == 0
    assert json.loads((finished_run / "extended" / "adapters-3" / "heads" / "config.json").read_text())["adapters"]
    # Trained again from its checkpoint, by a recipe of today.
    kept = load_file(finished_run / "heads" / "model.safetensors")
    for name in ("heads", "heads-trained"):
        shutil.rmtree(finished_run / name, ignore_errors=True)
    assert main(["distill", *words]) == 0, capsys.readouterr().err
    again = load_file(finished_run / "heads" / "model.safetensors")
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def _overrides(recipe: mtpd.Recipe) -> list[str]:
    """What to say on the command line for this recipe."""
    found = []
    for key, value in recipe.model_dump(mode="json").items():
        leaves = {f"{key}.{name}": leaf for name, leaf in value.items()} if isinstance(value, dict) else {key: value}
        found += [f"{name}={json.dumps(leaf)}" for name, leaf in leaves.items() if key != "output"]
    return found


def test_rows_of_a_step_in_earlier_checkpoints(tmp_path: Path) -> None:
    """Fault: a run that goes on with another number of processes forgets how many rows its steps had."""
    file = tmp_path / OPTIMIZER
    save_state({"w": {"exp_avg": torch.ones(2)}}, file, step_rows=6)
    assert read_step_rows(tmp_path) == 6
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    metadata["rows_per_step"] = metadata.pop("step_rows")
    save_file(load_file(file), file, metadata=metadata)
    assert read_step_rows(tmp_path) == 6


@pytest.mark.parametrize("greedy", ["max_product", "conditionals"])
def test_circuits_saved_with_their_way_of_drafting(greedy: str, tmp_path: Path) -> None:
    """Fault: saved circuits are unreadable for a key that says nothing about their weights."""
    trunk = tiny_trunk("llama")
    heads = random_kind(trunk, "btree")
    save_heads(heads, tmp_path)
    circuit = json.loads((tmp_path / "config.json").read_text())["circuit"]
    edited(tmp_path / "config.json", circuit={**circuit, "greedy": greedy})
    assert load_heads(tmp_path, trunk).config == heads.config.model_copy()
