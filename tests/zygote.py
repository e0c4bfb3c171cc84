"""Runs of `mtpd` in processes of their own, made by fork from one that has imported everything and built nothing.

Importing takes ten seconds, a fork nothing. The process must not have run a backward pass before: autograd refuses
to work in a fork then. Started as a program it reads orders as JSON lines and answers each in one.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class Zygote:
    """The process, as tests see it."""

    def __init__(self, folder: Path) -> None:
        self._said = folder / "said.txt"
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self._said)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )

    def run(self, words: list[str], **order: Any) -> dict[str, Any]:
        """Runs one command to its end.

        Args:
            words: after `mtpd`.
            order: `kill` (seconds of processor time after which SIGKILL comes), `fail` ([operation, number of the
                call that fails, name of the error, or SIGKILL to end there]).

        Returns:
            `code` (negative for a signal), `seconds` of processor time, `calls` by operation, `said` (stderr).
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"words": words, **order}) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return {**answer, "said": self._said.read_text()}

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


def serve(said: str) -> None:
    """Answers orders until there are none."""
    # Libraries talk on the way.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # What a run imports when it comes to it, too.
    import datasketch  # noqa: F401
    import deepspeed  # noqa: F401
    import torch
    from trl import apply_chat_template  # noqa: F401

    import mtpd.cli
    import mtpd.data.disk_store
    import mtpd.data.responses
    import mtpd.run.distill
    import mtpd.run.extend
    import mtpd.run.joint_training

    torch.set_num_threads(1)
    # Many small writes, so that something is being written most of the time.
    mtpd.data.responses.FLUSH_SECONDS = 0.0
    mtpd.data.disk_store.SHARD_BYTES = 64 * 2**10
    for line in sys.stdin:
        order = json.loads(line)
        counted = Path(f"{said}.calls")
        counted.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            _child(order, said, counted)
        code, seconds = _wait(child, order.get("kill"))
        calls = json.loads(counted.read_text()) if counted.is_file() else {}
        answers.write(json.dumps({"code": code, "seconds": seconds, "calls": calls}) + "\n")
        answers.flush()


def _child(order: dict[str, Any], said: str, counted: Path) -> None:
    code = 99
    try:
        handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        from mtpd.cli import main

        calls = _with_faults(*order["fail"]) if "fail" in order else {}
        code = main(order["words"])
        if calls:
            counted.write_text(json.dumps(calls))
    finally:
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int, kill: float | None) -> tuple[int, float]:
    """Exit code and processor time; SIGKILL comes once the child has had so much of it."""
    while kill is not None:
        found, status, usage = os.wait4(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        try:
            used = int(Path(f"/proc/{child}/schedstat").read_text().split()[0]) / 1e9
        except (OSError, IndexError):
            used = 0.0
        if used >= kill:
            os.kill(child, signal.SIGKILL)
            kill = None
        time.sleep(0.001)
    _, status, usage = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


def _with_faults(operation: str, number: int, name: str) -> dict[str, int]:
    """Makes the n-th call of an operation fail: `fsync`, `replace`, `write` (half of it is written), `torch`.

    Number 0 fails at none. Gives the table in which calls are counted.
    """
    import torch

    code = getattr(errno, name, 0)
    calls = dict.fromkeys(("fsync", "replace", "write", "torch"), 0)

    def due(what: str) -> bool:
        calls[what] += 1
        if what == operation and calls[what] == number and name == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        return what == operation and calls[what] == number

    def failure() -> OSError:
        return OSError(code, os.strerror(code))

    fsync, replace, write, save = os.fsync, os.replace, Path.write_bytes, torch.save

    def failing_fsync(handle: int) -> None:
        if due("fsync"):
            raise failure()
        fsync(handle)

    def failing_replace(source: Any, target: Any) -> None:
        if due("replace"):
            raise failure()
        replace(source, target)

    def failing_write(path: Path, data: bytes) -> int:
        """A write that stops half-way."""
        if due("write"):
            write(path, data[: len(data) // 2])
            raise failure()
        return int(write(path, data))

    def failing_save(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if due("torch"):
            Path(path).write_bytes(b"PK half")
            raise RuntimeError(
                "[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/1"
            )
        save(value, path, *args, **kwargs)

    os.fsync, os.replace, torch.save = failing_fsync, failing_replace, failing_save  # type: ignore[assignment]
    Path.write_bytes = failing_write  # type: ignore[method-assign,assignment]
    return calls


if __name__ == "__main__":
    serve(sys.argv[1])
