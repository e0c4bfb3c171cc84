"""The examples for CI systems, run as they are: once with heads as trained, once with damaged ones."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from seals import with_its_weights

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "ci"
RECIPE = """\
model: tiny
heads.depth: 2
data.limit: 16
data.max_new_tokens: 24
train.max_steps: 6
train.micro_batch_rows: 2
train.learning_rate: 1e-3
evaluation.prompts_limit: 2
evaluation.max_new_tokens: 12
evaluation.decode_prompts: 0
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a recipe, a trained run and its baseline, and a command `mtpd`."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "recipe.yaml").write_text(RECIPE)
    command = folder / "bin" / "mtpd"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT / "cli.py"}" "$@"\n')
    command.chmod(0o755)
    done = gate(folder, "runs/first")
    assert done.returncode == 0, done.stderr
    assert "no baseline yet" in done.stdout
    assert (folder / "baselines" / "main.json").is_file()
    return folder


def environment(folder: Path, **changes: str) -> dict[str, str]:
    return os.environ | {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(folder / "home"),
        "PYTHONPATH": str(ROOT),
        **changes,
    }


def run(words: list[str], folder: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, capture_output=True, text=True, check=False, timeout=300, cwd=folder, env=environment(folder, **changes)
    )


def gate(folder: Path, output: str) -> subprocess.CompletedProcess[str]:
    words = ["sh", str(EXAMPLES / "gate.sh"), "recipe.yaml", output, "baselines/main.json"]
    return run([*words, "--suite", "demo", "--max-new-tokens", "32"], folder)


def damage(folder: Path) -> None:
    """Makes the heads draft from noise."""
    path = folder / "heads" / "model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith("project.weight"):
            tensors[name] = torch.randn(tensor.shape, generator=generator)
    save_file(tensors, path, metadata={"format": "pt"})
    with_its_weights(path.parent)


def workflow_steps() -> list[dict[str, Any]]:
    workflow = yaml.safe_load((EXAMPLES / "github-actions.yml").read_text())
    steps: list[dict[str, Any]] = workflow["jobs"]["gate"]["steps"]
    return steps


VARIABLES = {
    "RECIPE": "recipe.yaml",
    "BASELINE": "baselines/main.json",
    "MAX_DROP": "0.01",
    "MAX_DROP_WORST": "0.1",
    "BY": "family",
    "HISTORY": "baselines/history",
}


NOT_HERE = ("Install", "Serve", "Gate, as served")
"""Steps that need a network or a server; tests/test_cli_served.py has the last one."""


def gitlab_job() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((EXAMPLES / "gitlab-ci.yml").read_text())["acceptance"]
    return found


def run_workflow(folder: Path, output: str) -> dict[str, subprocess.CompletedProcess[str]]:
    """Runs the steps of the workflow that are commands, as the runner does: a failed one skips all without `if`."""
    done: dict[str, subprocess.CompletedProcess[str]] = {}
    failed = False
    for step in workflow_steps():
        if "run" not in step or step["name"] in NOT_HERE or (failed and "if" not in step):
            continue
        script = folder / "step.sh"
        script.write_text(step["run"])
        variables = VARIABLES | {"RUN": output}
        done[step["name"]] = run(
            ["bash", "-eo", "pipefail", str(script)],
            folder,
            GITHUB_STEP_SUMMARY=str(folder / f"summary-{Path(output).name}.md"),
            **variables,
        )
        failed |= done[step["name"]].returncode != 0
    return done


def test_the_shell_example_passes_with_the_same_heads(work: Path) -> None:
    """Fault: the gate fails on heads that are as good as the baseline's."""
    done = gate(work, "runs/second")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gate passed" in done.stdout
    assert "acceptance is not worse than baselines/main.json" in done.stdout


def test_the_shell_example_fails_with_damaged_heads(work: Path) -> None:
    """Fault: a pipeline that stays green while acceptance falls."""
    shutil.copytree(work / "runs" / "first", work / "runs" / "damaged")
    damage(work / "runs" / "damaged")
    done = gate(work, "runs/damaged")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "gate failed: CAR_1 0." in done.stdout
    assert "acceptance is worse than baselines/main.json" in done.stdout
    found = ET.parse(work / "runs" / "damaged" / "acceptance.xml").getroot()
    assert (found.get("failures"), found.get("errors")) == ("1", "0")
    assert "❌ **gate failed" in (work / "runs" / "damaged" / "acceptance.md").read_text()


def test_the_workflow(work: Path) -> None:
    """Fault: the workflow has an option that mtpd does not, or it swallows the exit code of the gate."""
    good = run_workflow(work, "runs/workflow")
    assert [step.returncode for step in good.values()] == [0, 0, 0, 0], [step.stderr for step in good.values()]
    assert list(good) == ["Train", "Gate", "Keep", "Report"]
    assert "gate on 7 slices passed" in good["Gate"].stdout
    assert "✅ **gate passed" in (work / "summary-workflow.md").read_text()
    assert (work / "runs" / "workflow" / "report.html").is_file()

    shutil.copytree(work / "runs" / "first", work / "runs" / "broken")
    damage(work / "runs" / "broken")
    [kept] = (work / "baselines" / "history").glob("*.json")
    assert kept.read_bytes() == (work / "runs" / "workflow" / "evaluation.json").read_bytes()
    assert "tau over the last results" not in (work / "summary-workflow.md").read_text()
    bad = run_workflow(work, "runs/broken")
    assert list(bad) == ["Train", "Gate", "Report"]
    assert "tau over the last results" in (work / "summary-broken.md").read_text()
    assert [step.returncode for step in bad.values()] == [0, 3, 0], [step.stderr for step in bad.values()]
    assert "❌ **gate failed" in (work / "summary-broken.md").read_text()


def test_the_workflow_installs_mtpd_before_it_calls_it() -> None:
    """Fault: a step that calls mtpd comes before the one that installs it."""
    commands = [step.get("run", "") for step in workflow_steps()]
    first = next(number for number, command in enumerate(commands) if command.startswith("mtpd"))
    assert any("pip install" in command for command in commands[:first])


def test_the_gitlab_job(work: Path) -> None:
    """Fault: the job has an option that mtpd does not, or it swallows the exit code of the gate."""
    job = gitlab_job()
    assert job["variables"].keys() == VARIABLES.keys() | {"RUN"}
    assert any("pip install" in command for command in job["before_script"])
    shutil.copytree(work / "runs" / "first", work / "runs" / "worse")
    damage(work / "runs" / "worse")
    for output, code in (("runs/gitlab", 0), ("runs/worse", 3)):
        script = work / "job.sh"
        script.write_text("\n".join(job["script"]))
        done = run(
            ["bash", "-eo", "pipefail", str(script)], work, **(VARIABLES | {"RUN": output, "HISTORY": f"{output}-past"})
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert (work / f"{output}-past" / "history.html").is_file() == (code == 0)
        assert (work / "acceptance.xml").is_file()
        after = work / "after.sh"
        after.write_text("\n".join(job["after_script"]))
        assert run(["bash", "-e", str(after)], work, **(VARIABLES | {"RUN": output})).returncode == 0
