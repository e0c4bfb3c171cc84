"""Runs that are killed, and disks that fail: what is lost is done again, and the heads are those of a run in peace."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from zygote import Zygote

from mtpd.evaluate.acceptance import Acceptance
from mtpd.train.checkpoints import COMPLETE, damage

KILLS = 30


def words(folder: Path, output: Path, *further: str) -> list[str]:
    """A run that writes something most of the time: answers, shards, a checkpoint after every other step."""
    return [
        "distill",
        "model=tiny",
        f"output={output}",
        f"data.prompts={folder / 'prompts.jsonl'}",
        *("device=cpu", "dtype=float32", "heads.depth=2", "seed=1"),
        *("data.held_out_count=4", "data.max_new_tokens=12", "data.generation_batch=4", "data.row_length=64"),
        "data.temperature=1.0",
        *("train.micro_batch_rows=2", "train.max_steps=6", "train.logging_steps=1", "train.learning_rate=3e-3"),
        *("evaluation.prompts_limit=4", "evaluation.max_new_tokens=8", "evaluation.decode_prompts=0"),
        "evaluation.steps=2",
        *further,
    ]


class Peace(NamedTuple):
    """A run that nothing happened to."""

    zygote: Zygote
    folder: Path
    run: Path
    seconds: float
    """Of processor time."""


@pytest.fixture(scope="session")
def peace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peace]:
    folder = tmp_path_factory.mktemp("crash")
    lines = [json.dumps({"prompt": f"Say {number} words."}) for number in range(14)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    zygote = Zygote(folder)
    try:
        done = zygote.run(words(folder, folder / "peace"))
        assert done["code"] == 0, done["said"]
        yield Peace(zygote, folder, folder / "peace", done["seconds"])
    finally:
        zygote.close()


def same(run: Path, other: Path) -> None:
    """Asserts that two runs have the same heads, responses, measurements and steps."""
    for name in ("heads-before/model.safetensors", "heads/model.safetensors"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    for name in ("responses.jsonl", "held-out.jsonl"):
        # Which response ends first depends on the others that are written at the same time.
        lines = [sorted((each / name).read_text().splitlines()) for each in (run, other)]
        assert lines[0] == lines[1], name
    assert steps(run) == steps(other)
    for name in ("acceptance-before.json", "acceptance.json"):
        found = [Acceptance.load(each / name).total() for each in (run, other)]
        assert (found[0].accepted, found[0].drafted) == (found[1].accepted, found[1].drafted), name


def steps(run: Path) -> list[tuple[Any, ...]]:
    """What was logged of each step and each measurement."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("loss"), line.get("eval_tau")) for line in found if "train_runtime" not in line]


def test_thirty_kills_change_nothing(peace: Peace) -> None:
    """Fault: a SIGKILL amid a step, a save, an answer or a shard loses or doubles something, or blocks the resume."""
    draw = random.Random(7)
    kills = runs = 0
    output = peace.folder / "killed-0"
    while True:
        moment = draw.uniform(0.0, peace.seconds) if kills < KILLS else None
        done = peace.zygote.run(words(peace.folder, output), kill=moment)
        if done["code"] == 0:
            same(output, peace.run)
            runs += 1
            output = peace.folder / f"killed-{runs}"
            if kills == KILLS:
                break
        else:
            assert done["code"] == -signal.SIGKILL, done["said"]
            kills += 1
    assert runs > 1


@pytest.mark.parametrize(
    ("operation", "error", "stride"),
    [
        ("fsync", "ENOSPC", 17),
        ("fsync", "EIO", 23),
        ("replace", "EIO", 4),
        ("replace", "SIGKILL", 5),
        ("write", "ENOSPC", 4),
        ("torch", "ENOSPC", 2),
        ("torch", "SIGKILL", 3),
    ],
)
def test_a_failing_disk_ends_in_one_line(operation: str, error: str, stride: int, peace: Peace) -> None:
    """Fault: a write that fails shows a traceback, leaves half a file that is read later, or costs a checkpoint."""
    output = peace.folder / f"{operation}-{error}"
    failures = 0
    whole: set[Path] = set()
    while True:
        # Each call comes further than the one before, and goes on where that one ended.
        done = peace.zygote.run(words(peace.folder, output), fail=[operation, 1 + failures * stride, error])
        now = {mark.parent for mark in output.glob(f"checkpoint-*/{COMPLETE}")}
        assert not whole or any(damage(folder) is None for folder in now), "the last whole checkpoint is gone"
        whole = now
        if done["code"] == 0:
            break
        failures += 1
        if error == "SIGKILL":
            assert done["code"] == -signal.SIGKILL, done["said"]
            continue
        assert done["code"] == 1, done["said"]
        last = done["said"].splitlines()[-1]
        assert last.startswith("mtpd: error: "), done["said"]
        assert str(output) in last
        assert "Traceback" not in done["said"]
    assert failures >= 2
    same(output, peace.run)
