"""Which heads a run keeps: those that training made, unless those that it started from are better."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_gate import acceptance, rows

from mtpd.cli import main
from mtpd.data.builtin_models import tiny
from mtpd.data.packing import Sample, pack
from mtpd.data.prompts import load_prompts, render
from mtpd.evaluate.acceptance import Acceptance
from mtpd.run.kept_heads import gain_of, trained_texts


def words(output: Path, *further: str) -> list[str]:
    return [
        *("distill", "model=tiny", f"output={output}", "device=cpu", "dtype=float32", "heads.depth=2"),
        *("data.limit=24", "data.row_length=1024", "data.max_new_tokens=32", "train.max_steps=2"),
        *("evaluation.prompts_limit=28", "evaluation.max_new_tokens=24", "evaluation.decode_prompts=0", *further),
    ]


@pytest.fixture(scope="module")
def bytes_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that has learned something about text: of one with random weights nothing is explained."""
    folder = tmp_path_factory.mktemp("models") / "bytes"
    model, tokenizer = tiny()
    texts = [render(tokenizer, prompt)[:96] for prompt in load_prompts("builtin")[:32]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(24):
        batch = texts[4 * step % 32 :][:4]
        ids = torch.tensor([text[: min(map(len, batch))] for text in batch])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def last_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What a run says at its end, before `done`."""
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("done: ")
    return lines[next(n for n, line in enumerate(lines) if line.startswith("CAR by depth")) + 1 : -1]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("rate", "outcome", "kept"), [(0.6, "better", "trained"), (0.4, "worse", "start")])
def test_the_interval_decides(rate: float, outcome: str, kept: str) -> None:
    """Fault: worse heads are kept because they are newer, or better ones are not."""
    start, trained = (acceptance({"one": rows(60, share, seed)}) for seed, share in enumerate((0.5, rate)))
    gain = gain_of(start, trained)
    assert (gain.outcome, gain.kept) == (outcome, kept)


def test_chance_does_not_decide() -> None:
    """Fault: heads that are as good as those before them are thrown away, or called better, by the noise of prompts."""
    outcomes = [
        gain_of(*(acceptance({"one": rows(40, 0.5, number)}) for number in (2 * seed, 2 * seed + 1))).outcome
        for seed in range(20)
    ]
    # An interval of 95% is wrong in one of twenty.
    assert outcomes.count("unclear") >= 17
    few = gain_of(acceptance({"one": rows(3, 0.6, 0)}), acceptance({"one": rows(3, 0.3, 1)}))
    assert (few.outcome, few.kept) == ("unclear", "trained")


def test_other_families_do_not_decide() -> None:
    """Fault: heads that are worse on what they were made for are kept for their gain elsewhere."""
    start = acceptance({"own": rows(60, 0.6, 0), "other": rows(60, 0.2, 0, start=100)})
    trained = acceptance({"own": rows(60, 0.4, 1), "other": rows(60, 0.8, 1, start=100)})
    assert gain_of(start, trained, frozenset({"other"})).kept == "start"


def test_ruined_heads_are_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: training made heads worse, and they are kept without a word; or its end cannot be told after a kill."""
    run = tmp_path / "run"
    ruin = words(run, "train.learning_rate=10", "train.save_steps=1", "evaluation.decode_prompts=1")
    assert main(ruin) == 0
    [said] = last_lines(capsys)
    assert said.startswith("TRAINING MADE THE HEADS WORSE: tau ")
    assert str(run / "heads-trained") in said
    assert weights(run / "heads") == weights(run / "heads-before") != weights(run / "heads-trained")
    before, kept, trained = (
        Acceptance.load(run / f"acceptance{name}.json").total().tau for name in ("-before", "", "-trained")
    )
    assert before == kept > trained
    offline, decoded = (Acceptance.load(run / f"acceptance{name}.json") for name in ("", "-decoded"))
    assert offline.heads == decoded.heads
    noted = json.loads((run / "provenance.json").read_text())["training"]
    assert noted["kept"] == "start"
    assert noted["change"]["high"] < 0

    # Killed after the training and before the choice, it chooses again and ends the same.
    shutil.rmtree(run / "heads")
    chosen = (run / "acceptance.json").read_bytes()
    (run / "acceptance.json").unlink()
    assert main(ruin) == 0
    assert weights(run / "heads") == weights(run / "heads-before")
    assert (run / "acceptance.json").read_bytes() == chosen

    # Trained again from a checkpoint, the heads of the training before are not taken for its result.
    shutil.rmtree(run / "heads")
    left = run / "heads-trained" / "left"
    left.touch()
    assert main([*ruin, "--resume", "checkpoint-1"]) == 0
    assert (run / "heads-trained").is_dir()
    assert not left.exists()


def test_a_good_run_keeps_its_training(bytes_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: heads that training made better are thrown away, or files of a choice are left that was not made."""
    run = tmp_path / "run"
    better = ("heads.init=random", "train.learning_rate=3e-3", "train.max_steps=24")
    assert main(words(run, f"model={bytes_model}", *better)) == 0
    [said] = last_lines(capsys)
    assert said.startswith("training gained: tau 1.0")
    assert weights(run / "heads") != weights(run / "heads-before")
    assert not (run / "heads-trained").exists()
    assert not (run / "acceptance-trained.json").exists()
    assert json.loads((run / "provenance.json").read_text())["training"]["kept"] == "trained"


@pytest.mark.parametrize(
    ("further", "first", "second"),
    [
        (("data.limit=8", "train.max_steps=60", "train.learning_rate=1e-2"), "", "this model wants more text"),
        (("train.learning_rate=10",), "TRAINING MADE THE HEADS WORSE", "More text alone does not help"),
        (("evaluation.prompts_limit=3",), "3 held-out prompts do not tell whether training gained anything", None),
    ],
    ids=["too little text", "a wrong rate", "too few prompts"],
)
def test_what_the_model_wants(
    further: tuple[str, ...],
    first: str,
    second: str | None,
    bytes_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Fault: a run that gained nothing ends without a word, or asks for text where the rate is wrong."""
    run = tmp_path / "run"
    assert main(words(run, f"model={bytes_model}", *further)) == 0
    said = last_lines(capsys)
    assert said[0].startswith(first)
    assert not said[0].startswith("training gained:")
    assert len(said) == (1 if second is None else 2)
    if second is not None:
        assert second in said[1]
        tokens = sum(
            len(json.loads(line)["response_ids"]) for line in (run / "responses.jsonl").read_text().splitlines()[1:]
        )
        assert f"{tokens:,} response tokens" in said[1]


def test_stages_choose_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a stage of an extension keeps what training ruined."""
    run = tmp_path / "run"
    assert main(words(run, "train.learning_rate=1e-5", "evaluation.prompts_limit=84")) == 0
    capsys.readouterr()
    assert main(["extend", str(run), "--to", "4", "--shared", "--steps", "2", "--learning-rate", "10"]) == 0
    stage = run / "extended" / "shared-4"
    assert "TRAINING MADE THE HEADS WORSE" in capsys.readouterr().out
    assert weights(stage / "heads") == weights(stage / "heads-before") != weights(stage / "heads-trained")
    assert json.loads((stage / "provenance.json").read_text())["training"]["kept"] == "start"


def test_texts_that_were_trained_on() -> None:
    """Fault: padding, a text without a prompt or one of several turns is measured as a prompt with its response."""
    good = [Sample.of(str(n), [n, n + 1], [n + 2, n + 3, n + 4]) for n in range(1, 60)]
    turns = Sample("turns", [1, 2, 3, 4, 5], [False, True, False, False, True])
    bare = Sample("bare", [7, 8, 9], [True, True, True])
    rows = pack([*good, turns, bare], row_length=64)
    found = trained_texts(rows, 28)
    assert len(found) == 28
    assert len({each.id for each in found}) == 28
    texts = {(tuple(sample.ids), tuple(sample.response_mask)) for sample in good}
    assert all((tuple(each.ids), tuple(each.response_mask)) in texts for each in found)
    assert len(trained_texts(rows, 1000)) == len(good)
