"""Two ranks that are told to end, or killed, amid training: both end, and the run goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Ended, in_fresh_ranks_each
from safetensors.torch import load_file

LIMIT = 170.0
"""Seconds in which all ranks have to end."""
STEPS = 6
SHARDINGS = ("null", "zero2", "zero3")
ENDS: dict[str, list[tuple[int, int, list[int]]]] = {
    # Signal, step in which it comes, and the ranks that it reaches: one after the other in the same run.
    "null": [(signal.SIGTERM, 2, [1]), (signal.SIGKILL, 5, [1])],
    "zero2": [(signal.SIGTERM, 2, [0, 1]), (signal.SIGKILL, 5, [0])],
    "zero3": [(signal.SIGINT, 3, [1])],
}


def words(folder: Path, output: Path, sharding: str) -> list[str]:
    """A run that has little else to do than to train."""
    return [
        *("distill", "model=tiny", f"output={output}", f"data.prompts={folder / 'prompts.jsonl'}"),
        *("device=cpu", "dtype=float32", "heads.depth=2", "heads.init=identity", f"train.deepspeed={sharding}"),
        *("data.responses=given", "data.held_out_count=1", "data.row_length=64", "train.micro_batch_rows=1"),
        *(f"train.max_steps={STEPS}", "train.save_steps=4", "train.logging_steps=1", "train.learning_rate=3e-3"),
        # Under zero2 the states are kept in memory, which ranks do not share.
        f"data.hidden_states={'memory' if sharding == 'zero2' else 'disk'}",
        *("evaluation.prompts_limit=1", "evaluation.max_new_tokens=2", "evaluation.decode_prompts=0"),
    ]


def run(words: Sequence[str], number: int, step: int, hit: Sequence[int]) -> None:
    """One rank of a run, to which a signal may come amid the work of a step."""
    from mtpd.cli import main
    from mtpd.train.trainer import HeadTrainer

    # As in a terminal, whatever the tests run under.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    training_step = HeadTrainer.training_step

    def told(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step + 1 == step and self.args.process_index in hit:
            os.kill(os.getpid(), number)
        return training_step(self, *args, **kwargs)

    HeadTrainer.training_step = told  # type: ignore[method-assign]
    try:
        sys.exit(main(words))
    finally:
        output = next(word for word in words if word.startswith("output=")).removeprefix("output=")
        print(json.dumps([mark.parent.name for mark in Path(output).glob("checkpoint-*/complete.json")]), flush=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Ended]]]:
    """For each sharding, a run in peace, and one that is ended again and again until it comes to its end."""
    folder = tmp_path_factory.mktemp("signals")
    lines = [{"prompt": f"Say {number}.", "completion": f"{number} " * (number % 5 + 2)} for number in range(14)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    calls: list[tuple[int, Sequence[Any]]] = []
    for sharding in SHARDINGS:
        calls.append((2, (words(folder, folder / f"peace-{sharding}", sharding), 0, 0, [])))
        for end in [*ENDS[sharding], (0, 0, [])]:
            calls.append((2, (words(folder, folder / sharding, sharding), *end)))
    ended = iter(in_fresh_ranks_each("test_ranks_signals", "run", calls, seconds=LIMIT))
    return folder, {sharding: [next(ended) for _ in range(len(ENDS[sharding]) + 2)] for sharding in SHARDINGS}


def steps(run: Path) -> list[int]:
    """The steps of which a loss was logged."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_ranks_that_are_ended_lose_nothing(runs: tuple[Path, dict[str, list[Ended]]], sharding: str) -> None:
    """Fault: ranks that stop after different steps or hang, another code, no checkpoint, a resume that differs."""
    folder, ended = runs[0], runs[1][sharding]
    assert ended[0].codes == [0, 0], ended[0].errors
    said = ended[0].errors[0]
    assert ("memory: 2 processes keep no states in training" in said) == (sharding == "zero2")
    assert "mtpd data store" not in said
    for (number, step, hit), found in zip(ENDS[sharding], ended[1:], strict=False):
        said = "".join(found.errors)
        if number == signal.SIGKILL:
            left = 1 - hit[0]
            assert found.codes[hit[0]] == -signal.SIGKILL, said
            assert found.codes[left] == 1, said
            assert f"rank {hit[0]} was ended, or has failed without a word; all ranks end" in found.errors[left]
        else:
            assert found.codes == [128 + number] * 2, said
            assert said.count("the same command resumes where this one stopped") == 1, "the main rank says so"
            assert f"checkpoint-{step}" in found.outputs[0], "whole when the main rank ends"
    assert ended[-1].codes == [0, 0], ended[-1].errors
    found, expected = (
        load_file(folder / name / "heads" / "model.safetensors") for name in (sharding, f"peace-{sharding}")
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert steps(folder / sharding) == list(range(1, STEPS + 1))
    before = load_file(folder / sharding / "heads-before" / "model.safetensors")
    assert any(not torch.equal(before[name], found[name]) for name in before)
