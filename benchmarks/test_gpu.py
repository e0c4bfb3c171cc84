"""The checks of `make gpu`, on a processor at tiny shapes: that each runs, and that what fails is seen and kept."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.__main__ import CHECKS, main, outcomes_of
from benchmarks.gpu.outcome import Options, Outcome, attempts


def options(folder: Path, seconds: float = 600.0) -> Options:
    return Options("cpu", True, folder, time.monotonic() + seconds)


def found(name: str, folder: Path, seconds: float = 600.0) -> dict[str, Outcome]:
    outcomes = {outcome.name: outcome for outcome in outcomes_of(name, options(folder, seconds))}
    assert not [str(outcome) for outcome in outcomes.values() if outcome.ok is False]
    return outcomes


def test_a_machine_without_a_gpu_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: ten minutes of tracebacks, or a success, where nothing was checked."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().out.startswith("no NVIDIA GPU that PyTorch can use is here")
    assert not (tmp_path / "out").exists()


def test_what_fails_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Fault: a check that fails ends the others, is counted as done, or leaves no traceback."""

    def fails() -> Outcome:
        raise ValueError("odd\nsecond line")

    both = list(attempts([("first", fails), ("second", lambda: Outcome("second", True, "fine"))]))
    assert [(each.ok, each.said) for each in both] == [(False, "ValueError: odd"), (True, "fine")]
    assert "Traceback" in capfd.readouterr().err
    # Without `dd` there is nothing to compare with.
    monkeypatch.setenv("PATH", "")
    assert main(["--device", "cpu", "--tiny", "--out", str(tmp_path), "--only", "machine", "disk"]) == 1
    said = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["ok", "left", "ok", "FAILED", "4"]
    assert "see " in said[3]
    assert "Traceback" in (tmp_path / "disk.txt").read_text()
    kept: Any = json.loads((tmp_path / "gpu.json").read_text())
    assert [each["ok"] for each in kept["machine"]["outcomes"]] == [True, None, True]
    assert kept["disk"]["outcomes"][0]["said"].startswith("FileNotFoundError")


def test_kernels_beside_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a loss that is not compared, or a gradient that is wrong and passes."""
    outcomes = found("kernels", tmp_path)
    assert len(outcomes) == 48
    assert all(0 <= each.figures["of the gradient"] < 0.05 for each in outcomes.values())
    from benchmarks.gpu import kernels

    inside = kernels.multi_depth_loss

    def scaled(*args: Any, **given: Any) -> Any:
        loss, sums = inside(*args, **given)
        return loss * 1.1, sums

    monkeypatch.setattr(kernels, "multi_depth_loss", scaled)
    assert all(outcome.ok is False for outcome in outcomes_of("kernels", options(tmp_path)))


@pytest.mark.parametrize("name", [name for name in CHECKS if name not in ("machine", "kernels", "smoke")])
def test_each_check_runs(name: str, tmp_path: Path) -> None:
    """Fault: a check that breaks on its first GPU for a reason that has nothing to do with one."""
    # What has to be compiled is left out: there is no time for it.
    outcomes = found(name, tmp_path, 25.0 if name in ("losses", "decoding") else 600.0)
    done = {each.name: each.figures for each in outcomes.values() if each.ok}
    assert (
        set(done)
        >= {
            "steps": {"step, heads of tiny"},
            "losses": {"loss by sweeps", "loss by eager"},
            "decoding": {"graphs beside none, a tree", "1 at a time, plain generate", "2 at a time, heads, no graphs"},
            "disk": {"store of hidden states"},
            "processes": set(),
        }[name]
    )
    for figures in done.values():
        assert all(value is None or value >= 0 for value in figures.values())


def test_runs_beside_the_processors_own(tmp_path: Path) -> None:
    """Fault: runs that are not compared, or with themselves."""
    outcomes = found("smoke", tmp_path)
    assert list(outcomes) == ["smoke run, chain, float32", "smoke run, chain, bfloat16"]
    exact = outcomes["smoke run, chain, float32"].figures
    assert exact["there"] == exact["on the processor"]
    assert exact["there"]["drafted"] > 0
