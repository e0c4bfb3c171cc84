"""`mtpd distill` from two ranks under a launcher: the run of one process, and how it ends where something fails."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Ended, free_port, in_fresh_ranks
from safetensors.torch import load_file

from mtpd.cli import main
from mtpd.errors import UserError
from mtpd.evaluate.acceptance import Acceptance
from mtpd.parallel import launch

ROOT = Path(__file__).parents[1]
WORDS = [
    *("distill", "model=tiny", "dtype=float32", "device=cpu", "heads.depth=2", "data.limit=20", "data.row_length=384"),
    *("data.max_new_tokens=12", "train.max_steps=4", "train.logging_steps=1", "train.learning_rate=1e-3"),
    *("evaluation.prompts_limit=3", "evaluation.max_new_tokens=8", "evaluation.decode_prompts=1"),
]


SPLIT = "train.sequence_parallel=2"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """A run by one process, the same by two of which each takes half of every step's rows, and a mistake of a user."""
    folder = tmp_path_factory.mktemp("runs")
    assert main([*WORDS, f"output={folder / 'one'}", "train.micro_batch_rows=2"]) == 0
    (folder / "none").mkdir()
    (folder / "none" / "file").write_text("no run")
    half = [*WORDS, "train.micro_batch_rows=1"]
    lines = [
        [*half, f"output={folder / 'two'}"],
        ["extend", str(folder / "two"), "--to", "4", "--steps", "2"],
        [*half, f"output={folder / 'apart'}", "train.deepspeed=zero3", "evaluation.decode_prompts=0"],
        [*WORDS, f"output={folder / 'split'}", "train.micro_batch_rows=2", "train.deepspeed=zero2", SPLIT],
        ["extend", str(folder / "split"), "--to", "4", "--steps", "2"],
        [*half, f"output={folder / 'none'}"],
    ]
    return folder, in_fresh_ranks("processes", "run_commands", lines, [free_port() for _ in lines])[0]


@pytest.fixture
def both(pair: tuple[Path, Ended]) -> tuple[Path, Path]:
    """The run directories."""
    return pair[0] / "one", pair[0] / "two"


@pytest.mark.parametrize("name", ["two", "apart", "split"])
def test_two_ranks_make_the_run_of_one(pair: tuple[Path, Ended], name: str) -> None:
    """Fault: ranks that answer other prompts, store other states, train on other rows, or write over each other.

    Apart: the trunk's layers are shared out over the ranks, and neither ever has all of them. Split: both ranks have a
    part of each row, of its states too.
    """
    both = one, two = pair[0] / "one", pair[0] / name
    assert {path.name for path in one.iterdir() if name != "apart" or "decoded" not in path.name} == {
        path.name for path in two.iterdir() if path.name != "extended"
    }
    for name in ("responses.jsonl", "held-out.jsonl"):
        assert sorted((one / name).read_text().splitlines()) == sorted((two / name).read_text().splitlines())
    provenance = [json.loads((run / "provenance.json").read_text()) for run in both]
    assert provenance[0]["rows"] == provenance[1]["rows"]
    indices = [json.loads((run / "hidden-states" / "index.json").read_text()) for run in both]
    assert indices[0]["key"] == indices[1]["key"]
    rows = [row for shard in indices[1]["shards"].values() for row in shard["rows"]]
    assert sorted(rows) == list(range(indices[1]["rows"])), "each row is stored once"
    states = [
        {
            row: hidden
            for name, shard in index["shards"].items()
            for row, hidden in zip(shard["rows"], load_file(run / "hidden-states" / name)["hidden"], strict=True)
        }
        for run, index in zip(both, indices, strict=True)
    ]
    for row in states[0]:
        torch.testing.assert_close(states[0][row], states[1][row], atol=1e-4, rtol=1e-4)
    heads = [load_file(run / "heads" / "model.safetensors") for run in both]
    before = load_file(one / "heads-before" / "model.safetensors")
    for name, tensor in heads[0].items():
        torch.testing.assert_close(heads[1][name], tensor, atol=1e-4, rtol=1e-4)
    assert any(not torch.allclose(before[name], tensor, atol=1e-4) for name, tensor in heads[0].items())
    accepted = [Acceptance.load(run / "acceptance.json").total().accepted for run in both]
    assert accepted[0] == accepted[1]
    assert (two / "metrics.jsonl").read_text().count('"loss"') == 4


@pytest.mark.parametrize("name", ["two", "split"])
def test_two_ranks_extend_heads(pair: tuple[Path, Ended], name: str) -> None:
    """Fault: a stage that each rank begins anew, or new depths that are not trained."""
    stage = pair[0] / name / "extended" / "copies-4"
    before, after = (load_file(stage / name / "model.safetensors") for name in ("heads-before", "heads"))
    assert torch.equal(before["layers.0.project.weight"], after["layers.0.project.weight"])
    assert not torch.equal(before["layers.3.project.weight"], after["layers.3.project.weight"])
    assert len(Acceptance.load(stage / "acceptance.json").total().accepted) == 4
    assert (stage / "depths.json").is_file()


def test_the_run_of_two_is_finished_by_one(both: tuple[Path, Path], tmp_path: Path) -> None:
    """Fault: what ranks wrote is not found, or is refused, by a process alone."""
    run = tmp_path / "run"
    shutil.copytree(both[1], run)
    shutil.rmtree(run / "heads")
    (run / "acceptance.json").unlink()
    kept = {name: (run / name).stat().st_mtime_ns for name in ("responses.jsonl", "hidden-states/index.json")}
    assert main([*WORDS, f"output={run}", "train.micro_batch_rows=1"]) == 0
    assert {name: (run / name).stat().st_mtime_ns for name in kept} == kept
    assert (run / "acceptance.json").is_file()


def test_one_rank_speaks_and_mistakes_are_one_line(pair: tuple[Path, Ended]) -> None:
    """Fault: what each rank repeats, a mistake after which ranks wait for another, or one that loses its exit code."""
    ended = pair[1]
    assert ended.codes == [0, 0], ended.errors
    assert ended.values == [[0, 0, 0, 0, 0, 2], [0, 0, 0, 0, 0, 1]]
    assert [output.count("done: ") for output in ended.outputs] == [5, 0]
    assert ended.outputs[1] == ""
    said = [line for errors in ended.errors for line in errors.splitlines() if line.startswith("mtpd: error")]
    assert len(said) == 1
    assert "exists and is no run directory" in said[0]


def test_command_lines_of_launchers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a launcher is given words of mtpd's own, or ranks are not."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    words = ["distill", "r.yaml", "a=b"]
    assert launch.torchrun_arguments(words, processes=4) == [
        *("--standalone", "--nproc-per-node=4", "--shutdown-timeout=86400", "--module", "mtpd", *words)
    ]
    here = launch.deepspeed_here(words, processes=2, port=1234)
    assert here[1:4] == ["-u", "-m", "deepspeed.launcher.launch"]
    assert here[-4:] == ["mtpd", *words]
    assert json.loads(base64.urlsafe_b64decode(here[4].partition("=")[2])) == {"localhost": [0, 1]}
    nodes = launch.deepspeed_on_nodes(words, processes=None, nodes=Path("hosts"))
    assert nodes[2:] == [
        *("deepspeed.launcher.runner", "--hostfile=hosts", "--module", "--no_local_rank", "--log_level=error"),
        *("mtpd", *words),
    ]
    assert "--num_gpus=8" in launch.deepspeed_on_nodes(words, processes=8, nodes=Path("hosts"))


def test_ranks_are_given_the_words_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: an override or --fresh that the ranks do not get, or ranks that start launchers themselves."""
    given: list[Any] = []

    def note(*words: Any, **options: Any) -> int:
        given.extend([*words, options])
        return 7

    monkeypatch.setattr("mtpd.cli.distill.launch", note)
    words = ["distill", "model=tiny", "--launcher", "deepspeed", "heads.depth=2", "--fresh", "--nodes", "hosts"]
    assert main([*words, "--processes=4"]) == 7
    launcher, passed_on, options = given
    assert launcher == "deepspeed"
    assert options == {"processes": 4, "nodes": Path("hosts")}
    assert passed_on[:3] == ["distill", "model=tiny", "heads.depth=2"]
    assert "--fresh" in passed_on
    assert not [word for word in passed_on if "launcher" in word or "processes" in word or "nodes" in word]


def test_what_a_launcher_cannot_do_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: an option that nothing reads is taken, and the run is another one than was meant."""
    for words, message in (
        (["--processes", "2"], "--processes: 2 needs --launcher"),
        (["--nodes", "hosts"], "--nodes: hosts needs --launcher"),
        (["--launcher", "torchrun", "--nodes", "hosts"], "needs --launcher deepspeed"),
        (["--launcher", "deepspeed", "--nodes", str(tmp_path / "hosts")], "no such file"),
        (["--devices", "8"], "only for a plan"),
    ):
        assert main([*WORDS, f"output={tmp_path / 'run'}", *words]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="--processes: is missing"):
        launch.launch("torchrun", [], processes=None, nodes=None)


@pytest.mark.parametrize("end", [signal.SIGTERM, 3])
def test_a_launcher_passes_on_signals_and_codes(end: int, tmp_path: Path) -> None:
    """Fault: ranks that go on after their launcher was told to end, or an exit code that gets lost."""
    child = f"import sys, time; open({str(tmp_path / 'begun')!r}, 'w').close(); "
    child += f"sys.exit({end})" if end == 3 else "time.sleep(60)"
    driver = f"import sys; from mtpd.parallel import launch; sys.exit(launch._run([sys.executable, '-c', {child!r}]))"
    process = subprocess.Popen([sys.executable, "-c", driver], env=os.environ | {"PYTHONPATH": str(ROOT)})
    while not (tmp_path / "begun").exists():
        assert process.poll() in (None, end), "the launcher ended before its rank began"
        time.sleep(0.05)
    if end == signal.SIGTERM:
        process.send_signal(end)
    assert process.wait(20) == (128 + end if end == signal.SIGTERM else 3)


def test_torchrun_gives_the_code_of_the_rank_that_failed(tmp_path: Path) -> None:
    """Fault: ranks that are not told which they are, or all failures with the exit code of the launcher."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, pathlib, sys, time\n"
        "rank = os.environ['RANK']\n"
        f"pathlib.Path({str(tmp_path)!r}, rank).write_text(' '.join([os.environ['WORLD_SIZE'], *sys.argv[1:]]))\n"
        "if sys.argv[1] == 'fail':\n"
        "    time.sleep(60 if rank == '0' else 0)\n"
        "    sys.exit(5)\n"
    )
    common = ["--standalone", "--nproc-per-node=2", str(script)]
    assert launch._run_torchrun([*common, "a=b"]) == 0
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2 a=b", "2 a=b"]
    assert launch._run_torchrun([*common, "fail"]) == 5


RANK = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
rank = os.environ.get("RANK", sys.argv[2] if len(sys.argv) > 2 else "")

def told(number, frame):
    with open(folder / f"told-{rank}", "a") as file:
        file.write(f"{number} ")

for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, told)
(folder / f"begun-{rank}").touch()
while not (folder / f"told-{rank}").exists():
    time.sleep(0.02)
# As long as a step and a checkpoint take.
time.sleep(1.0)
(folder / f"saved-{rank}").touch()
sys.exit(128 + int((folder / f"told-{rank}").read_text().split()[0]))
"""
LAUNCHER = """
import pathlib, signal, subprocess, sys, time
folder = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: (folder / "launcher-told").touch())
ranks = [subprocess.Popen([sys.executable, folder / "rank.py", str(folder), str(rank)]) for rank in range(2)]
sys.exit(max(rank.wait() for rank in ranks))
"""


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_launcher_tells_all_ranks_and_waits_for_them(launcher: str, tmp_path: Path) -> None:
    """Fault: a rank that hears of a signal late, twice or never, or is killed while it saves; the code gets lost."""
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    if launcher == "torchrun":
        words = ["--standalone", "--nproc-per-node=2", str(tmp_path / "rank.py"), str(tmp_path)]
        call = f"launch._run_torchrun({words!r})"
    else:
        call = f"launch._run([sys.executable, {str(tmp_path / 'launcher.py')!r}, {str(tmp_path)!r}], tells_ranks=False)"
    driver = f"import sys; from mtpd.parallel import launch; sys.exit({call})"
    process = subprocess.Popen([sys.executable, "-c", driver], env=os.environ | {"PYTHONPATH": str(ROOT)})
    until = time.monotonic() + 60
    while not all((tmp_path / f"begun-{rank}").exists() for rank in "01"):
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert [(tmp_path / f"told-{rank}").read_text() for rank in "01"] == [f"{int(signal.SIGTERM)} "] * 2
    assert all((tmp_path / f"saved-{rank}").exists() for rank in "01")
    assert not (tmp_path / "launcher-told").exists()
