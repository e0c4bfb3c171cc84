"""What follows a run, in the order of the README, on the smoke recipe: export, verify, eval, report, compare."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mtpd.cli import main

RECIPE = Path(__file__).parents[1] / "recipes" / "smoke.yaml"


def test_a_run_is_followed_by_all_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: a fresh run that a later command refuses, or whose measurements do not belong to each other."""
    monkeypatch.chdir(tmp_path)
    small = ["evaluation.decode_prompts=1", "data.limit=8"]
    assert main(["distill", str(RECIPE), "output=runs/smoke", *small]) == 0
    assert main(["export", "runs/smoke", "--to", "transformers", "-o", "out"]) == 0
    assert main(["verify", "out", "--engine", "transformers", "--limit", "2", "--max-new-tokens", "16"]) == 0
    limits = ["--suite", "demo", "--limit", "4", "--max-new-tokens", "16", "--responses", "responses"]
    assert main(["eval", "runs/smoke", *limits, "--write-baseline", "baselines/main.json"]) == 0
    assert main(["report", "runs/smoke"]) == 0
    page = (tmp_path / "runs" / "smoke" / "report.html").read_text(encoding="utf-8")
    for shown in ("What drafts</h3>", "Heads and look-up together, by suite</h3>", "What drafted which token</h2>"):
        assert shown in page
    capsys.readouterr()
    assert main(["compare", "runs/smoke/acceptance-before.json", "runs/smoke/acceptance.json"]) == 0
    assert "CAR_1" in capsys.readouterr().out
    rows = json.loads((tmp_path / "baselines" / "main.json").read_text())["suites"]["demo"]["rows"]
    assert len(rows) == 4
