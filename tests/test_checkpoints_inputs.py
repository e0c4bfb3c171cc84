"""Paths and names of commands about checkpoints: what something is, and the way on, in one line or as an answer."""

from __future__ import annotations

import json
from pathlib import Path

import architectures
import pytest

from mtpd.cli import main
from mtpd.data import builtin_models
from mtpd.data.models import load_model
from mtpd.formats.layout import ENGINES, targets
from mtpd.formats.layouts import LAYOUTS


def test_runs_of_the_built_in_model_are_inspected_and_exported(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: the run that tests an installation refused, because its model is made by code and lies in no file."""
    assert main(["inspect", str(finished_run)]) == 0
    assert "export --to hf-mtp: fits" in capsys.readouterr().out
    assert main(["export", str(finished_run), "--to", "transformers", "-o", str(tmp_path / "out")]) == 0
    assert "every tensor of the heads" in capsys.readouterr().out
    words = ["--engine", "transformers", "--limit", "1", "--max-new-tokens", "12", "--no-perturb"]
    monkeypatch.setattr("mtpd.progress.DELAY", 0)
    main(["verify", str(tmp_path / "out"), *words])
    output = capsys.readouterr()
    assert "1 of 1 texts are the plain model's" in output.out
    assert "/2 [" in output.err, "a bar counts texts: plain, and by the engine"
    assert main(["generate", str(tmp_path / "out"), "--prompt", "Hello"]) == 2
    assert f"give the run that it was written from: {finished_run}" in capsys.readouterr().err


def test_the_built_in_model_is_written_as_it_is(tmp_path: Path) -> None:
    """Fault: an export of `tiny` beside other weights than those that the heads were trained with."""
    folder = builtin_models.tiny_directory(tmp_path)
    assert folder == builtin_models.tiny_directory(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    written, _ = load_model(str(folder), dtype="float32", device="cpu")
    made, _ = load_model("tiny", dtype="float32", device="cpu")
    found = written.state_dict()
    assert all(tensor.equal(found[name]) for name, tensor in made.state_dict().items())


def test_an_ordinary_model_is_an_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: an error for a model without heads, which most are, and no word of what to do with it."""
    architectures.tiny_trunk("llama").model.save_pretrained(tmp_path / "model")
    assert main(["inspect", str(tmp_path / "model")]) == 0
    said = capsys.readouterr().out
    assert "has no MTP heads" in said
    assert f"mtpd distill model={tmp_path / 'model'}" in said
    assert main(["import", str(tmp_path / "model"), "-o", str(tmp_path / "run")]) == 2


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("adapter_config.json", {"base_model_name_or_path": "org/base"}, "holds an adapter of org/base and no model"),
        ("tokenizer.json", {}, "holds a tokenizer and no model"),
    ],
)
def test_what_is_no_checkpoint_is_named(
    file: str, content: dict[str, str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: "no config.json" for a directory of another kind, from which nobody learns what to give instead."""
    (tmp_path / file).write_text(json.dumps(content))
    assert main(["inspect", str(tmp_path)]) == 2
    assert expected in capsys.readouterr().err


def test_targets_are_the_engines_and_layouts() -> None:
    """Fault: a new layout that the command line does not take."""
    assert sorted(targets()) == sorted({*ENGINES, *LAYOUTS})
