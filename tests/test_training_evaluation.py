"""Held-out acceptance while training: what is logged, which heads are kept, when training stops, and resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mtpd.cli import main
from mtpd.evaluate.acceptance import Acceptance, SuiteCounts
from mtpd.train import measuring_trainer, trainer


def words(output: Path, *further: str) -> list[str]:
    return [
        *("distill", "model=tiny", f"output={output}", "device=cpu", "dtype=float32", "heads.depth=2"),
        *("data.limit=12", "data.max_new_tokens=24", "train.micro_batch_rows=1", "train.logging_steps=1"),
        *("train.learning_rate=1e-2", "train.max_steps=8", "evaluation.prompts_limit=14"),
        *("evaluation.max_new_tokens=16", "evaluation.decode_prompts=0"),
        "evaluation.steps=2",
        *further,
    ]


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def measured(run: Path) -> dict[int, float]:
    """Held-out tau by step."""
    return {line["step"]: line["eval_tau"] for line in lines(run) if "eval_tau" in line}


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_the_best_heads_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: the last heads are kept instead of the best, or names that do not fit load nothing without a word."""
    taus = iter([1.2, 1.5, 1.1, 1.3])
    real = measuring_trainer.MeasuringTrainer._measure

    def set_tau(self: Any) -> Any:
        found = real(self)
        tau = next(taus)
        return found.model_copy(update={"drafted": [100, 100], "accepted": [round(100 * (tau - 1)), 0]})

    monkeypatch.setattr(measuring_trainer.MeasuringTrainer, "_measure", set_tau)
    run = tmp_path / "run"
    assert main(words(run)) == 0
    assert measured(run) == pytest.approx({2: 1.2, 4: 1.5, 6: 1.1, 8: 1.3})
    kept, best, last = (
        load_file(run / name / "model.safetensors") for name in ("heads", "checkpoint-4", "checkpoint-8")
    )
    assert all((kept[name] == best[name]).all() for name in kept)
    assert any((kept[name] != last[name]).any() for name in kept)
    assert {f"eval_car_{k}" for k in (1, 2)} | {"eval_expected_1", "eval_expected_2"} <= {
        key for line in lines(run) for key in line
    }
    families = {key: value for line in lines(run) for key, value in line.items() if key.startswith("eval_tau_")}
    assert len(families) == 7
    assert all(value >= 1 for value in families.values())
    # The finished heads are measured on prompts that did not choose them.
    assert Acceptance.load(run / "acceptance.json").total().prompts == 7


def test_what_is_measured_is_the_offline_acceptance(tmp_path: Path) -> None:
    """Fault: the number in the log is not the one that a later evaluation of the same heads gives."""
    run = tmp_path / "run"
    assert main(words(run, "train.max_steps=2", "evaluation.prompts_limit=8")) == 0
    held_out = [json.loads(line) for line in (run / "held-out.jsonl").read_text().splitlines()[1:]]
    chosen = {row.id for suite in Acceptance.load(run / "acceptance.json").suites.values() for row in suite.rows or []}
    rows = [row for row in held_out if row["id"] not in chosen]
    assert len(rows) == 4
    from mtpd.data.models import load_model
    from mtpd.data.packing import Sample
    from mtpd.data.responses import end_tokens
    from mtpd.evaluate.offline import measure_offline
    from mtpd.heads import load_heads
    from mtpd.trunk import Trunk

    model, tokenizer = load_model("tiny", dtype="float32", device="cpu")
    trunk = Trunk(model, tokens=len(tokenizer))
    samples = [Sample.of(row["id"], row["prompt_ids"], row["response_ids"]) for row in rows]
    found = measure_offline(
        trunk, load_heads(run / "checkpoint-2", trunk), samples, end_tokens=end_tokens(model, tokenizer), progress=False
    )["prompts"]
    line = next(line for line in lines(run) if "eval_tau" in line)
    assert line["eval_tau"] == pytest.approx(found.tau)
    by_family: dict[str, list[Any]] = {}
    for row in found.rows or []:
        by_family.setdefault(row.id.split("-")[1], []).append(row)
    assert {key: value for key, value in line.items() if key.startswith("eval_tau_")} == pytest.approx(
        {f"eval_tau_{name}": SuiteCounts.of(rows, 2).tau for name, rows in by_family.items()}
    )
    assert found.expected_acceptance is not None
    assert line["eval_expected_2"] == pytest.approx(found.expected_acceptance[1], rel=1e-5)


def test_training_stops_early_and_a_resumed_run_stops_at_the_same_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: patience is not looked at, or an interrupted run forgets the best tau or how long ago it was."""
    by_step = {2: 1.5, 4: 1.2, 6: 1.3, 8: 1.4}
    real = measuring_trainer.MeasuringTrainer._measure

    def set_tau(self: Any) -> Any:
        share = by_step[self.state.global_step] - 1
        return real(self).model_copy(update={"drafted": [100, 100], "accepted": [round(100 * share), 0]})

    monkeypatch.setattr(measuring_trainer.MeasuringTrainer, "_measure", set_tau)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    further = ["evaluation.patience=2", "train.arguments.save_total_limit=3"]
    assert main(words(whole, *further)) == 0
    assert list(measured(whole)) == [2, 4, 6], "two measurements without a higher tau"

    on_log = trainer.Metrics.on_log

    def interrupt(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_log(self, args, state, control, **kwargs)
        if state.global_step == 5:
            raise RuntimeError("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Metrics, "on_log", interrupt)
        assert main(words(broken, *further)) == 1
    assert (broken / "checkpoint-4" / "complete.json").is_file()
    assert main(words(broken, *further)) == 0
    assert list(measured(broken)) == [2, 4, 6]
    state = json.loads((broken / "checkpoint-6" / "trainer_state.json").read_text())
    assert (state["best_metric"], state["best_global_step"]) == (pytest.approx(1.5), 2)
    assert weights(broken / "heads") == weights(whole / "heads") == weights(whole / "checkpoint-2")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.prompts_limit=1", "evaluation.steps: 2 is not accepted with 1 measured prompts, of which half"),
        ("train.save_steps=3", "train.save_steps: 3 is not accepted with evaluation.steps"),
        ("evaluation.steps=-1", "evaluation.steps: -1 is not accepted"),
    ],
)
def test_mistakes(override: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: settings that contradict each other end in a traceback, or heads are chosen by what measures them."""
    assert main(words(tmp_path / "run", override)) == 2
    assert message in capsys.readouterr().err


def test_patience_needs_measurements(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: early stopping is asked for and never happens."""
    assert main(["distill", "model=tiny", f"output={tmp_path / 'run'}", "evaluation.patience=2"]) == 2
    assert "evaluation.patience: 2 does nothing while evaluation.steps is 0" in capsys.readouterr().err


def test_trackers_see_the_measurements(tmp_path: Path) -> None:
    """Fault: what is measured reaches metrics.jsonl and no tracker."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    run = tmp_path / "run"
    assert main(words(run, "train.report_to=[tensorboard]", "train.max_steps=2")) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {path.parent for path in run.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    assert any(tag.endswith("eval/tau") or tag.endswith("eval_tau") for tag in events.Tags()["scalars"])
    shutil.rmtree(folder)
