"""Which heads a run keeps: those that training made, unless those that it started from are better."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_gate import acceptance, rows

from mtpd.cli import main
from mtpd.evaluate.acceptance import Acceptance
from mtpd.run.kept_heads import gain_of


def words(output: Path, *further: str) -> list[str]:
    return [
        *("distill", "model=tiny", f"output={output}", "device=cpu", "dtype=float32", "heads.depth=2"),
        *("data.limit=24", "data.max_new_tokens=32", "train.logging_steps=1", "train.max_steps=2"),
        *("evaluation.prompts_limit=84", "evaluation.max_new_tokens=24", "evaluation.decode_prompts=1", *further),
    ]


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
    for seed in range(1, 11):
        start, trained = (acceptance({"one": rows(40, 0.5, number)}) for number in (0, seed))
        gain = gain_of(start, trained)
        assert gain.outcome == "unclear" or abs(gain.tau.after / gain.tau.before - 1) > 0.01
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
    assert main(words(run, "train.learning_rate=10")) == 0
    assert "TRAINING MADE THE HEADS WORSE" in capsys.readouterr().out
    assert weights(run / "heads") == weights(run / "heads-before") != weights(run / "heads-trained")
    before, kept, trained = (
        Acceptance.load(run / f"acceptance{name}.json").total().tau for name in ("-before", "", "-trained")
    )
    assert before == kept > trained
    decoded = [Acceptance.load(run / f"acceptance-decoded{name}.json").total() for name in ("-before", "")]
    assert decoded[0].accepted == decoded[1].accepted
    noted = json.loads((run / "provenance.json").read_text())["training"]
    assert noted["kept"] == "start"
    assert noted["change"]["high"] < 0

    # Killed after the training and before the choice, it chooses again and ends the same.
    shutil.rmtree(run / "heads")
    chosen = (run / "acceptance.json").read_bytes()
    (run / "acceptance.json").unlink()
    assert main(words(run, "train.learning_rate=10")) == 0
    assert weights(run / "heads") == weights(run / "heads-before")
    assert (run / "acceptance.json").read_bytes() == chosen
