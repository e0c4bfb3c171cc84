"""`mtpd data`: what it makes is what training reads, and training does the same with it as without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mtpd.cli import main
from mtpd.trunk import Trunk


@pytest.fixture
def recipe(tmp_path: Path) -> list[str]:
    """A run of two epochs on eight prompts."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {n} plus {n + 1}?"}) + "\n" for n in range(10)))
    return [
        "model=tiny",
        f"output={tmp_path / 'run'}",
        f"data.prompts={prompts}",
        "data.held_out_count=2",
        "data.max_new_tokens=24",
        "data.row_length=64",
        "heads.depth=2",
        "train.epochs=2",
        "train.micro_batch_rows=2",
        "evaluation.prompts_limit=2",
        "evaluation.max_new_tokens=8",
        "evaluation.decode_prompts=0",
    ]


def heads(run: Path) -> bytes:
    return (run / "heads" / "model.safetensors").read_bytes()


def test_training_reads_what_data_store_made(
    recipe: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: a store that training does not find, computes again, or learns something else from."""
    assert main(["distill", *recipe]) == 0
    states = tmp_path / "states"
    arguments = [*recipe, f"output={tmp_path / 'second'}", f"data.hidden_states={states}"]
    assert main(["data", "store", *arguments]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"done: {states}"
    shards = {path.name: path.stat().st_mtime_ns for path in states.iterdir()}
    assert shards.keys() == {"index.json", "hidden-00000.safetensors"}

    rows = 0
    hidden = Trunk.hidden

    def counted(self: Trunk, input_ids, *, position_ids=None, **kwargs):  # type: ignore[no-untyped-def]
        nonlocal rows
        # Measurement has no packed rows.
        rows += len(input_ids) if position_ids is not None and input_ids.shape[1] == 64 else 0
        return hidden(self, input_ids, position_ids=position_ids, **kwargs)

    monkeypatch.setattr(Trunk, "hidden", counted)
    assert main(["distill", *arguments]) == 0
    assert rows == 0, "the trunk ran over rows that were stored"
    assert {path.name: path.stat().st_mtime_ns for path in states.iterdir()} == shards
    assert heads(tmp_path / "second") == heads(tmp_path / "run")
    # Without a store made before, each row is computed once, in the first of the two epochs.
    count = len(load_file(states / "hidden-00000.safetensors")["hidden"])
    for where in ("disk", "memory"):
        rows = 0
        third = [*recipe, f"output={tmp_path / where}", f"data.hidden_states={where}"]
        assert main(["distill", *third]) == 0
        assert rows == count
        assert heads(tmp_path / where) == heads(tmp_path / "run")

    assert main(["data", "store", *arguments, "data.row_length=96", f"output={tmp_path / 'fourth'}"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"mtpd: error: {states}: these hidden states are of another run: other packed rows")


def test_data_store_needs_a_disk(recipe: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a command that computes for hours and keeps nothing."""
    assert main(["data", "store", *recipe, "data.hidden_states=memory"]) == 2
    assert "memory stores nothing on the disk; accepted: disk" in capsys.readouterr().err


def test_heads_are_trained_over_a_counted_vocabulary(
    recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: a vocabulary of other tokens than the most frequent, or one that training does not use."""
    out = tmp_path / "vocabulary.json"
    assert main(["data", "vocab", *recipe, "heads.vocabulary=40", "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    content = json.loads(out.read_text())
    assert said.startswith(f"done: {out}, 40 tokens that are {content['coverage']:.2%} of those")
    assert content["tokens"] == sorted(set(content["tokens"]))
    assert len(content["tokens"]) == 40

    answers = [json.loads(line) for line in (tmp_path / "run" / "responses.jsonl").read_text().splitlines()]
    counts: dict[int, int] = {}
    for answer in answers:
        for token in answer.get("response_ids", answer.get("ids", [])):
            counts[token] = counts.get(token, 0) + 1
    assert counts
    inside = sum(count for token, count in counts.items() if token in content["tokens"])
    assert inside / sum(counts.values()) == pytest.approx(content["coverage"], abs=0.02)

    # The same run directory: its responses are those of the recipe, whatever heads learn from them.
    answered = (tmp_path / "run" / "responses.jsonl").stat().st_mtime_ns
    assert main(["distill", *recipe, f"heads.vocabulary={out}"]) == 0
    assert (tmp_path / "run" / "responses.jsonl").stat().st_mtime_ns == answered
    trained = load_file(tmp_path / "run" / "heads" / "model.safetensors")["vocabulary"]
    assert trained.tolist() == content["tokens"]
    assert main(["distill", *recipe, "heads.vocabulary=50"]) == 2, "heads of another vocabulary are there"
    capsys.readouterr()
    assert main(["distill", *recipe, f"heads.vocabulary={out}", "--dry-run"]) == 0
    assert "40 can be drafted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0", "heads.vocabulary: 0 leaves nothing to count; accepted: how many tokens are kept"),
        ("1", "heads.vocabulary: 1 has no room for the special tokens; accepted: 0, or at least "),
        ("999999", "heads.vocabulary: 999999 leaves nothing out; accepted: less than "),
    ],
)
def test_sizes_that_mean_no_vocabulary_are_refused(
    recipe: list[str], value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: a draft vocabulary that is the whole one, or one in which no text can end."""
    assert main(["data", "vocab", *recipe, f"heads.vocabulary={value}"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; accepted: a number of tokens"),
        ("{}", "is no draft vocabulary"),
        ('{"schema": 1, "tokens": [1, 1]}', "is no draft vocabulary"),
        ('{"schema": 1, "tokens": [1, 9999999]}', "token 9999999 is none of this model"),
    ],
)
def test_files_that_are_no_vocabulary_are_refused(
    recipe: list[str], tmp_path: Path, content: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: heads over tokens of another model."""
    path = tmp_path / "given.json"
    if content is not None:
        path.write_text(content)
    assert main(["distill", *recipe, f"heads.vocabulary={path}"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"heads.vocabulary: {path}: " in said
    assert message in said
