"""Ranks for tests: forked processes that a gloo group joins, as a launcher would start them.

Autograd works in no process that is forked from one where it has been used: `in_fresh_ranks` forks from a new one,
which `python tests/processes.py` is.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Ended(NamedTuple):
    """How the ranks ended."""

    codes: list[int | None]
    """Exit codes; None for one that had to be killed."""
    values: list[Any]
    """What each gave back, as JSON takes it; None where it gave nothing."""
    errors: list[str]
    """What each wrote to stderr."""
    outputs: list[str]
    """And to stdout."""


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def in_ranks(work: Callable[..., Any], *arguments: Any, count: int = 2, seconds: float = 60.0) -> Ended:
    """Runs `work(*arguments)` in so many processes at once."""
    context = multiprocessing.get_context("fork")
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = [
            context.Process(target=_rank, args=(rank, count, port, folder, work, arguments)) for rank in range(count)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(seconds)
        codes = [process.exitcode for process in ranks]
        for process in ranks:
            process.kill()
            process.join()
        values = [
            json.loads(path.read_text()) if (path := folder / f"value-{rank}").is_file() else None
            for rank in range(count)
        ]
        errors = [(folder / f"stderr-{rank}").read_text() for rank in range(count)]
        outputs = [(folder / f"stdout-{rank}").read_text() for rank in range(count)]
    return Ended(codes, values, errors, outputs)


def run_commands(lines: list[list[str]], ports: list[int]) -> list[int]:
    """Exit codes of commands that are called one after the other.

    Args:
        ports: one for each, where the ranks meet. What DeepSpeed leaves keeps the store behind a port alive.
    """
    from mtpd.cli import main

    codes = []
    for words, port in zip(lines, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        codes.append(main(words))
    return codes


def in_fresh_ranks(
    module: str, function: str, *arguments: Any, counts: Sequence[int] = (2,), seconds: float = 170.0
) -> list[Ended]:
    """Runs a function of a test file, where autograd may be used; arguments are what JSON can hold.

    Args:
        counts: numbers of ranks; it is run in so many, one time after the other.
    """
    return in_fresh_ranks_each(module, function, [(count, arguments) for count in counts], seconds=seconds)


def in_fresh_ranks_each(
    module: str, function: str, calls: Sequence[tuple[int, Sequence[Any]]], *, seconds: float = 170.0
) -> list[Ended]:
    """`in_fresh_ranks` with other arguments each time.

    Args:
        calls: numbers of ranks, and what the function is called with in each of them.
        seconds: that each call may take.
    """
    done = subprocess.run(
        [sys.executable, __file__, json.dumps([module, function, calls, seconds])],
        capture_output=True,
        text=True,
        check=False,
        timeout=len(calls) * seconds + 60,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return [Ended(*each) for each in json.loads(done.stdout.splitlines()[-1])]


def _rank(rank: int, count: int, port: int, folder: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    code = 1
    with open(folder / f"stderr-{rank}", "w") as errors, open(folder / f"stdout-{rank}", "w") as output:
        os.dup2(errors.fileno(), 2)
        os.dup2(output.fileno(), 1)
        sys.stderr, sys.stdout = errors, output
        try:
            torch.set_num_threads(1)
            (folder / f"value-{rank}").write_text(json.dumps(work(*arguments)))
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        errors.flush()
        output.flush()
        # Not the end of the interpreter: what pytest has registered for it is not for this process.
        os._exit(code)


if __name__ == "__main__":
    # What takes long to import is imported once.
    import deepspeed  # noqa: F401

    import mtpd.run.distill  # noqa: F401

    module, function, calls, seconds = json.loads(sys.argv[1])
    work = getattr(importlib.import_module(module), function)
    print(json.dumps([in_ranks(work, *arguments, count=count, seconds=seconds) for count, arguments in calls]))
