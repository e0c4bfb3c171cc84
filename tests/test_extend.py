"""`mtpd extend` on runs with a tiny random model: stages, resuming, what is written, and what is refused."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from seals import edited, with_its_weights

import mtpd
from mtpd.cli import main
from mtpd.evaluate.acceptance import Acceptance
from mtpd.evaluate.depths import Depth, Depths
from mtpd.heads import load_heads
from mtpd.recipe import load_recipe
from mtpd.run import extend as extending
from mtpd.run.finished import reopen


def words(output: Path, *further: str) -> list[str]:
    """The command of a run of a few seconds."""
    return [
        *("distill", "model=tiny", f"output={output}", "heads.depth=2", "dtype=float32", "device=cpu"),
        *("data.limit=12", "data.max_new_tokens=24", "train.max_steps=4", "train.micro_batch_rows=2"),
        *("train.logging_steps=1", "train.save_steps=2", "train.learning_rate=3e-3", "train.top_n=50"),
        *("evaluation.prompts_limit=4", "evaluation.max_new_tokens=16", "evaluation.decode_prompts=1"),
        *further,
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory, made once. No test may change it."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(words(folder)) == 0
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def refusal(run: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The one line of an error."""
    capsys.readouterr()
    assert main(["extend", str(run), *options]) == 2
    shown = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert "Traceback" not in "".join(shown)
    assert shown[-1].startswith("mtpd: error: ")
    return shown[-1]


def test_stages_in_a_row(run: Path) -> None:
    """Fault: a stage that starts from the wrong heads, changes the old ones, or is no run that can be used."""
    assert main(["extend", str(run), "--to", "8", "--adapters", "4", "--learning-rate", "1e-2"]) == 0
    folders = [run / "heads", *(run / "extended" / f"adapters-{depth}" / "heads" for depth in (4, 8))]
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    for older, newer in itertools.pairwise(weights):
        assert all(torch.equal(tensor, newer[name]) for name, tensor in older.items())
    stage = run / "extended" / "adapters-8"
    before = load_file(stage / "heads-before" / "model.safetensors")
    moved = {name for name, tensor in weights[2].items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[1] for name in moved} == {"5", "6", "7", "8"}
    steps = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    assert {"ce_5", "ce_8", "kl_5", "kl_8"} <= steps[0].keys()
    assert not {"ce_1", "ce_4", "train_car_5"} & steps[0].keys()
    assert max(step.get("learning_rate", 0.0) for step in steps) == pytest.approx(1e-2)
    assert Acceptance.load(stage / "acceptance.json").total().depth == 8
    depths = Depths.load(stage / "depths.json")
    assert [each.depth for each in depths.depths] == list(range(9))
    assert depths.depths[8].car == Acceptance.load(stage / "acceptance.json").total().car[7]
    assert reopen(stage).heads("heads-before").depth == 8
    assert main(["report", str(stage)]) == 0
    page = (stage / "report.html").read_text()
    assert "chain" in page
    shown = [float(value) for value in re.findall(r'data-ratio="marginal_tau" data-value="([^"]*)"', page)]
    assert shown == [each.car for each in depths.depths[1:]]
    assert mtpd.load(stage).heads.depth == 8
    assert mtpd.load(run).heads.depth == 2


def test_an_interrupted_stage_goes_on_to_the_same_heads(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a resume that starts over, unfreezes old heads, or loses optimizer, scheduler or kept states."""
    arguments = ["extend", str(run), "--to", "4"]
    assert main(arguments) == 0
    stage = run / "extended" / "copies-4"
    whole = (stage / "heads" / "model.safetensors").read_bytes()
    own = (run / "heads" / "model.safetensors").read_bytes()
    files = {path: path.stat().st_mtime_ns for path in stage.rglob("*") if path.is_file()}
    assert main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in files} == files | {
        path: path.stat().st_mtime_ns for path in files if path.name in ("car.svg", "provenance.json")
    }
    shutil.rmtree(stage / "heads")
    shutil.rmtree(stage / "checkpoint-4")
    assert (run / "checkpoint-4" / "model.safetensors").read_bytes() == own
    (stage / "acceptance.json").unlink()
    trained: list[int] = []
    inside = extending.train_heads

    def count(session: Any, heads: Any, rows: Any, store: Any, samples: Any, below: Any) -> None:
        assert sum(row in below.store for row in range(len(rows))) == len(rows)
        inside(session, heads, rows, store, samples, below)
        trained.append(sum(parameter.requires_grad for parameter in heads.layers[:2].parameters()))

    monkeypatch.setattr(extending, "train_heads", count)
    assert main(arguments) == 0
    assert trained == [0]
    assert (stage / "heads" / "model.safetensors").read_bytes() == whole


def test_without_training(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: --steps 0 that trains, or measures something other than the heads looped as they are."""
    assert main(["extend", str(run), "--to", "3", "--steps", "0"]) == 0
    stage = run / "extended" / "copies-3-untrained"
    assert f"done: {stage}" in capsys.readouterr().out
    weights, old = (load_file(folder / "heads" / "model.safetensors") for folder in (stage, run))
    for name, tensor in weights.items():
        assert torch.equal(tensor, old[name.replace("layers.2.", "layers.1.")])
    before, after = (Acceptance.load(stage / name).total() for name in ("acceptance-before.json", "acceptance.json"))
    assert before.accepted == after.accepted
    assert not (stage / "metrics.jsonl").exists()


def test_shared_blocks_serve_all_depths(run: Path) -> None:
    """Fault: shared blocks that are copied, or trained for the new depths alone."""
    assert main(["extend", str(run), "--to", "4", "--shared", "--steps", "2"]) == 0
    stage = run / "extended" / "shared-4"
    weights, old = (load_file(folder / "heads" / "model.safetensors") for folder in (stage, run))
    assert weights.keys() == old.keys()
    steps = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps if "loss" in step] == [1, 2]
    assert {"ce_1", "ce_4"} <= steps[0].keys()
    assert json.loads((stage / "heads" / "config.json").read_text())["blocks"] == [0, 1, 0, 1]


@pytest.mark.parametrize(("fastest", "last"), [((1, 4), "run"), ((2, 3), "copies-4"), ((2, 4, 5), "copies-8")])
def test_auto_stops_where_a_stage_does_not_pay(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fastest: tuple[int, ...], last: str
) -> None:
    """Fault: --auto that goes on past the fastest number of drafts, or stops before it."""
    speeds = iter(fastest)

    def measured(trunk: Any, heads: Any, prompts: Any, **_: Any) -> Depths:
        best = next(speeds)
        rates = [10.0 - abs(depth - best) for depth in range(heads.depth + 1)]
        rows = [Depth(depth=d, tokens_per_second=rate, round_ms=1, draft_ms=1) for d, rate in enumerate(rates)]
        return Depths(prompts=1, max_new_tokens=1, dtype="float32", plain_tokens_per_second=5.0, depths=rows)

    monkeypatch.setattr(extending, "measure_depths", measured)
    assert main(["extend", str(run), "--auto", "--steps", "1"]) == 0
    output = capsys.readouterr().out
    assert output.splitlines()[-1].endswith(last)
    assert "a further stage does not pay" in output


def test_a_recipe_extends_after_training(tmp_path: Path) -> None:
    """Fault: an `extend` section that distill ignores, or a run that refuses to be extended later."""
    run = tmp_path / "run"
    short = ["train.max_steps=1", "evaluation.decode_prompts=0", "extend.steps=1"]
    assert main(words(run, *short, "extend.to=3")) == 0
    assert load_heads(run / "extended" / "copies-3" / "heads", mtpd.load(run).trunk).depth == 3
    assert main(words(run, *short, "extend.to=4", "extend.form=shared")) == 0
    assert load_recipe(run / "recipe.yaml").extend.to == 4
    assert (run / "extended" / "shared-4" / "heads").is_dir()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], r"--to: is missing; accepted: a number of heads above 2, or --auto"),
        (["--to", "2"], "extend.to: 2 is not more than the 2 heads there are; accepted: 3 to 64"),
        (["--to", "65"], "extend.to: 65 is not accepted; accepted: an integer from 2 to 64"),
        (["--to", "4", "--shared", "--adapters", "4"], "--shared: is not accepted with --adapters"),
        (["--to", "4", "--adapters", "0"], "extend.rank: 0 is not accepted; accepted: an integer from 1 to 1000000000"),
        (["--to", "4", "--steps", "0", "--learning-rate", "1e-3"], "extend.learning_rate: 0.001 does nothing"),
    ],
)
def test_mistakes(made: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    """Fault: a traceback, or heads trained to what was not asked for."""
    assert message in refusal(made, capsys, *options)
    assert not (made / "extended").exists()


def test_other_stages_and_trunks_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a stage that goes on with other settings, a stage of a stage, or heads put onto a changed trunk."""
    assert "holds no run" in refusal(tmp_path, capsys, "--to", "4")
    assert main(["extend", str(run), "--to", "3", "--steps", "1"]) == 0
    stage = run / "extended" / "copies-3"
    assert "holds a stage with other steps; start over with --fresh" in refusal(
        run, capsys, "--to", "3", "--steps", "2"
    )
    assert "is a stage of an extension" in refusal(stage, capsys, "--to", "4")
    assert main(["distill", str(stage / "recipe.yaml")]) == 2
    assert main(["extend", str(run), "--to", "3", "--steps", "2", "--fresh"]) == 0
    assert json.loads((stage / "stage.json").read_text())["steps"] == 2
    # What heads say about their trunk is all that is known of it.
    config = run / "heads" / "config.json"
    right = json.loads(config.read_text())["trunk"]
    edited(config, trunk="f" * 64)
    assert "these heads belong to another trunk (ffffffffffff, not" in refusal(run, capsys, "--to", "4")
    tensors = load_file(run / "heads" / "model.safetensors")
    save_file(dict(list(tensors.items())[:-1]), run / "heads" / "model.safetensors")
    edited(config, trunk=right)
    with_its_weights(run / "heads")
    assert "tensors missing" in refusal(run, capsys, "--to", "4")


def test_a_plan_says_what_heads_are_extended_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a plan that is silent about stages, or one that names others than the run makes."""
    further = ["extend.to=6", "extend.form=adapters", "extend.rank=8", "--dry-run"]
    assert main(words(tmp_path / "run", *further)) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "extended to 4, 6 heads; new depths: adapters of rank 8" in shown
