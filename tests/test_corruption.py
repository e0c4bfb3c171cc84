"""Files of a run that are cut off, flipped in a bit or gone: an error that names the file, or what was there before."""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtpd.data import store_index
from mtpd.data.answers import kept
from mtpd.decode.chances import CHANCES, Chances, read_chances
from mtpd.errors import MtpdError
from mtpd.evaluate.acceptance import Acceptance
from mtpd.heads import check_weights, read_config
from mtpd.recipe import load_recipe
from mtpd.run.directory import RunDirectory, warn_of_changes
from mtpd.run.distill import distill
from mtpd.run.finished import trained_prompts
from mtpd.run.loading import load
from mtpd.train import checkpoints

FLIPS = 60
"""Bits of each file, drawn by a seed."""


def flipped(content: bytes, place: int, bit: int = 0) -> bytes:
    return content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]


def outcome_of(act: Callable[[], Any]) -> tuple[Any, str | None]:
    """What a function gives, or the one line with which it refuses."""
    try:
        return act(), None
    except MtpdError as error:
        said = str(error)
    assert "\n" not in said
    return None, said


def weights(file: Path) -> str:
    config = read_config(file.parent)
    check_weights(file.parent, config)
    return config.weights


def prompts(file: Path) -> Any:
    found = trained_prompts(RunDirectory(file.parent))
    return sorted(found.fingerprints), found.signatures.tolist()


def answers(file: Path) -> Any:
    settings = json.loads((file.parent / "whole.jsonl").read_text().split("\n")[0])["settings"]
    whole = kept.read(file.parent / "whole.jsonl", settings)
    found = kept.read(file, settings)
    # What is damaged is answered again; what is left is as it was.
    assert found.items() <= whole.items()
    assert len(whole) - len(found) <= 2
    return "a part"


def index(file: Path) -> Any:
    found = store_index.read_index(file)
    if found is None:
        raise MtpdError(f"{file}: an index that cannot be read is refused by its name")
    return [found[key] for key in ("schema", "key", "rows", "row_length", "hidden_size", "dtype", "shards")]


def checkpoint(file: Path) -> Any:
    found = checkpoints.damage(file.parent)
    if found is not None:
        raise MtpdError(found)
    return "whole"


READERS: dict[str, Callable[[Path], Any]] = {
    "acceptance.json": Acceptance.load,
    "acceptance-decoded.json": Acceptance.load,
    "heads/config.json": weights,
    "heads/model.safetensors": weights,
    "heads/chances.json": lambda file: read_chances(file.parent),
    "provenance.json": prompts,
    "trained-prompts.safetensors": prompts,
    "responses.jsonl": answers,
    "held-out.jsonl": answers,
    "hidden-states/index.json": index,
    "checkpoint-8/complete.json": checkpoint,
    "checkpoint-8/optimizer.safetensors": checkpoint,
}


@pytest.mark.parametrize("name", READERS)
def test_any_flipped_bit_is_seen(name: str, finished_run: Path) -> None:
    """Fault: a number in a file changes by a bit, and is read as if it had always been that."""
    file = finished_run / name
    shutil.copy(file, file.parent / "whole.jsonl")
    content = file.read_bytes()
    expected = READERS[name](file)
    draw = random.Random(name)
    refused = 0
    for _ in range(FLIPS):
        file.write_bytes(flipped(content, draw.randrange(len(content)), draw.randrange(8)))
        found, said = outcome_of(lambda: READERS[name](file))
        refused += said is not None
        assert file.name in said if said is not None else found == expected
    assert name in ("responses.jsonl", "held-out.jsonl") or refused > FLIPS * 0.5


@pytest.mark.parametrize("name", ["recipe.yaml", "metrics.jsonl"])
def test_files_that_people_read_are_warned_of(name: str, finished_run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fault: a report shows curves or settings that are not those of the run, without a word."""
    run = RunDirectory(finished_run)
    warn_of_changes(run)
    assert not caplog.records
    file = finished_run / name
    file.write_bytes(flipped(file.read_bytes(), 40))
    warn_of_changes(run)
    assert str(file) in caplog.text
    caplog.clear()
    file.unlink()
    warn_of_changes(run)
    assert str(file) in caplog.text


def test_a_finished_run_with_a_damaged_file(finished_run_made: Path, tmp_path: Path) -> None:
    """Fault: the same command, or loading the heads, goes on from a damaged file, or ends with a traceback."""
    names = [path.relative_to(finished_run_made) for path in sorted(finished_run_made.rglob("*")) if path.is_file()]
    names = [name for name in names if name.suffix not in (".png", ".svg", ".html") and "checkpoint-" not in str(name)]
    assert len(names) >= 15
    recipe = load_recipe(finished_run_made / "recipe.yaml").model_copy(update={"output": tmp_path / "run"})
    whole = outcome(finished_run_made)
    damages: list[Callable[[Path], object]] = [
        lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
        lambda file: file.write_bytes(flipped(file.read_bytes(), file.stat().st_size // 2)),
        lambda file: file.unlink(),
    ]
    for number, name in enumerate(names):
        # Each file in one way, and those in `heads` and the recipe in all of them.
        every = name.parts[0] == "heads" or name.name == "recipe.yaml"
        for damage in damages if every else [damages[number % 3]]:
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            shutil.copytree(finished_run_made, tmp_path / "run")
            damage(tmp_path / "run" / name)
            logging.disable(logging.WARNING)
            _, said = outcome_of(lambda: distill(recipe, progress=False))
            logging.disable(logging.NOTSET)
            if said is None:
                assert outcome(tmp_path / "run") == whole, name
            else:
                assert name.name in said or f"output: {tmp_path / 'run'}" in said, name
            if name.parts[0] == "heads":
                damage_again(tmp_path / "run" / name, finished_run_made / name, damage)
                if name.name == CHANCES and not (tmp_path / "run" / name).is_file():
                    # Without counts the heads are believed.
                    assert load(tmp_path / "run").chances == Chances()
                    continue
                with pytest.raises(MtpdError, match=r"heads"):
                    load(tmp_path / "run")


def damage_again(file: Path, whole: Path, damage: Callable[[Path], object]) -> None:
    """The run may have made the file anew."""
    file.parent.mkdir(exist_ok=True)
    shutil.copy(whole, file)
    damage(file)


def outcome(run: Path) -> Any:
    """What a run is for: its heads, and what was measured."""
    found = [Acceptance.load(run / name).total() for name in ("acceptance-before.json", "acceptance.json")]
    numbers = [(each.accepted, each.drafted, each.prompts) for each in found]
    return (run / "heads" / "model.safetensors").read_bytes(), (run / "heads" / "config.json").read_bytes(), numbers
