"""Starts a command of mtpd as several processes on this machine, or on those of a host file, and waits for their end.

On one machine torchrun's agent runs in this process, and deepspeed's launcher in a process of its own. Both end all
ranks where one fails. On several machines deepspeed's runner reaches the others through pdsh and ssh; torchrun has no
such thing, it is called on each machine.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Literal

import psutil  # type: ignore[import-untyped]

from mtpd.errors import UserError

Launcher = Literal["deepspeed", "torchrun"]

MODULE = "mtpd"
"""What each rank runs, as `python -m mtpd`: an installed package has no cli.py beside it."""

PATIENCE = 24 * 3600
"""Seconds that torchrun gives ranks to end after a signal, before it kills them: they finish a step and save. Who sent
the signal decides how long that may take, and a rank that waits for one that is gone ends by itself (`ranks.py`)."""


def launch(launcher: Launcher, words: Sequence[str], *, processes: int | None, nodes: Path | None) -> int:
    """Runs `mtpd WORDS` in several processes; gives the exit code of the one that failed first, or 0.

    Args:
        processes: on each machine; None is one for each accelerator.
        nodes: a host file of deepspeed's form, a line `NAME slots=COUNT` for each machine.

    Raises:
        UserError: torchrun with a host file, a host file that cannot be read, or no number of processes.
    """
    if nodes is not None and launcher != "deepspeed":
        raise UserError(f"--nodes: {nodes} needs --launcher deepspeed; torchrun is called on each machine by itself")
    if nodes is not None and not nodes.is_file():
        raise UserError(f"--nodes: {nodes}: no such file; accepted: lines such as `worker-1 slots=8`")
    if launcher == "torchrun":
        return _run_torchrun(torchrun_arguments(words, processes=_count(processes)))
    if nodes is not None:
        return _run(deepspeed_on_nodes(words, processes=processes, nodes=nodes))
    count = _count(processes)
    _set_threads(count)
    return _run(deepspeed_here(words, processes=count, port=free_port()), tells_ranks=False)


def torchrun_arguments(words: Sequence[str], *, processes: int) -> list[str]:
    """Gives the arguments of `torchrun`."""
    return [
        *("--standalone", f"--nproc-per-node={processes}", f"--shutdown-timeout={PATIENCE}"),
        *("--module", MODULE, *words),
    ]


def deepspeed_here(words: Sequence[str], *, processes: int, port: int) -> list[str]:
    """Deepspeed's launcher for the ranks of one machine, which `deepspeed` itself calls too."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    devices = visible[:processes] if len(visible) >= processes else list(range(processes))
    world = base64.urlsafe_b64encode(json.dumps({"localhost": devices}).encode()).decode()
    return [
        *(sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}"),
        *("--master_addr=127.0.0.1", f"--master_port={port}", "--module", "--no_local_rank", "--log_level=error"),
        *(MODULE, *words),
    ]


def deepspeed_on_nodes(words: Sequence[str], *, processes: int | None, nodes: Path) -> list[str]:
    """The runner of deepspeed, which reaches the machines of a host file."""
    count = [] if processes is None else [f"--num_gpus={processes}"]
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={nodes}", *count),
        *("--module", "--no_local_rank", "--log_level=error", MODULE, *words),
    ]


def _count(processes: int | None) -> int:
    if processes is not None:
        return processes
    import torch

    found = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if not found:
        raise UserError("--processes: is missing, and there is no accelerator here to count; accepted: a number")
    return found


def _set_threads(processes: int) -> None:
    """Shares the cores among the ranks, unless the user has said how: each would take all of them, or one."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))


def _run_torchrun(arguments: list[str]) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # What the ranks say themselves is enough.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    parsed = parse_args(arguments)
    _set_threads(int(parsed.nproc_per_node))
    try:
        run(parsed)
    except ChildFailedError as error:
        return _exit_code(error.get_first_failure()[1].exitcode)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _run(command: list[str], *, tells_ranks: bool = True) -> int:
    """Runs a launcher, and passes signals on.

    Args:
        tells_ranks: whether the launcher is to tell its ranks. Deepspeed's for one machine would tell one after the
            other, and kill each after half a minute, which a step and a checkpoint may well take: its ranks are told
            here, and it ends as they do.
    """
    asked = 0
    process = subprocess.Popen(command, start_new_session=True)

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = number
        known = signal.SIGTERM if number == signal.SIGHUP else signal.Signals(number)
        children = [] if tells_ranks else psutil.Process(process.pid).children()
        for each in children or [process]:
            with suppress(psutil.NoSuchProcess):
                each.send_signal(known)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + asked if asked and code else _exit_code(code)


def _exit_code(code: int) -> int:
    """Gives the exit code of a process; one that a signal ended has 128 and the signal's number, as in a shell."""
    return 128 - code if code < 0 else code


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
