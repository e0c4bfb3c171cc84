"""Paths and names of commands about checkpoints: what something is, and the way on, in one line or as an answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import architectures
import pytest
from test_checkpoints_export import finished_run as run_with

from mtpd.cli import main
from mtpd.data import builtin_models
from mtpd.data.models import load_model
from mtpd.errors import UserError
from mtpd.formats.export import export
from mtpd.formats.layout import ENGINES, targets
from mtpd.formats.layouts import LAYOUTS
from mtpd.heads import load_heads


def test_runs_of_the_built_in_model_are_inspected_and_exported(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: the run that tests an installation refused, because its model is made by code and lies in no file."""
    assert main(["inspect", str(finished_run)]) == 0
    assert "export --to hf-mtp: fits" in capsys.readouterr().out
    assert main(["export", str(finished_run), "--to", "transformers", "-o", str(tmp_path / "out")]) == 0
    assert "every tensor of the heads" in capsys.readouterr().out
    words = ["--engine", "transformers", "--limit", "1", "--max-new-tokens", "12", "--no-perturb"]
    main(["verify", str(tmp_path / "out"), *words])
    output = capsys.readouterr()
    assert "1 of 1 texts are the plain model's" in output.out
    assert "/3 [" in output.err, "a bar counts texts: plain, by mtpd and by the engine"
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


SLIPS = {
    "misspelt engine": (["export", "{run}", "--to", "transfomers", "-o", "{out}"], "'transfomers' is not one of"),
    "output in a file": (["export", "{run}", "--to", "hf-mtp", "-o", "{run}/recipe.yaml/out"], "recipe.yaml is a file"),
    "output exists": (["import", "{run}", "-o", "{run}"], "exists; choose another output"),
    "no run": (["export", "{out}", "--to", "hf-mtp", "-o", "{out}"], "no such directory"),
    "a run": (["verify", "{run}", "--engine", "transformers"], "is a run; export it first: mtpd export"),
    "misspelt family": (["inspect", "{run}", "--family", "glm"], "glm is not known; accepted: deepseek-v3"),
}


def test_slips_are_answered_without_torch(finished_run: Path, tmp_path: Path) -> None:
    """Fault: seconds of importing before a misspelt word is named, or another error in its place."""
    cases = [
        ([word.format(run=finished_run, out=tmp_path / "out") for word in words], expected)
        for words, expected in SLIPS.values()
    ]
    script = (
        "import io, json, sys; from contextlib import redirect_stderr; from mtpd.cli import main; said = []\n"
        "for words in json.load(sys.stdin):\n"
        "    with redirect_stderr(io.StringIO()) as lines: code = main(words)\n"
        "    said.append([code, lines.getvalue(), 'torch' in sys.modules])\n"
        "print(json.dumps(said))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps([words for words, _ in cases]),
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ),
    )
    for (_, expected), (code, line, heavy) in zip(cases, json.loads(done.stdout), strict=True):
        assert (code, heavy, line.count("\n")) == (2, False, 1), line
        assert expected in line


def test_heads_of_another_model_name_both(tmp_path: Path) -> None:
    """Fault: two fingerprints that tell nobody which model is which."""
    trunk = architectures.tiny_trunk("llama")
    run = run_with(tmp_path, trunk, architectures.new_heads(trunk, "identity", depth=1, fingerprint="f" * 64))
    with pytest.raises(UserError, match=rf"trained with model {tmp_path / 'base'}, and this is LlamaForCausalLM"):
        load_heads(run / "heads", trunk, fingerprint="e" * 64)


def test_an_unknown_target_comes_first(tmp_path: Path) -> None:
    """Fault: from Python, an error about the run before the one about the word."""
    with pytest.raises(UserError, match="--to tensorrt: is not known; accepted: transformers, vllm"):
        export(tmp_path / "none", tmp_path / "out", to="tensorrt")
