"""One command that says what works on this machine's NVIDIA GPU, and how fast: `make gpu`.

    python -m benchmarks.gpu --out build/gpu

Checks run in order of risk, each in a process of its own, none needs a network, and together they take less than ten
minutes. Each thing that is checked is one line; OUT/gpu.json has the lines with their figures, and OUT/CHECK.txt what a
check wrote, with the traceback of what failed. docs/gpu.md says what to expect.

It ends with 0 if nothing failed, 1 if something did, and 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.outcome import Options, Outcome, attempts

CHECKS = {
    "machine": 30.0,
    "smoke": 170.0,
    "kernels": 90.0,
    "steps": 120.0,
    "losses": 80.0,
    "decoding": 120.0,
    "disk": 40.0,
    "processes": 90.0,
}
"""Modules of this package, in order of risk, and the seconds that each may take."""
ALTOGETHER = 590.0
"""Seconds of all checks."""
GRACE = 20.0
"""Seconds that a check which should have ended by itself may go on."""


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes for a processor, to test the checks themselves")
    parser.add_argument("--only", nargs="*", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--alone", choices=CHECKS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=ALTOGETHER, help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        print("no NVIDIA GPU that PyTorch can use is here: nothing was checked (see docs/gpu.md)")
        return 2
    given.out = given.out.absolute()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.alone:
        alone(given.alone, Options(given.device, given.tiny, given.out, time.monotonic() + given.seconds))
        return 0
    until = time.monotonic() + given.seconds
    found: dict[str, Any] = {}
    for name in given.only:
        began = time.monotonic()
        limit = max(1.0, min(CHECKS[name], until - began))
        outcomes = apart(name, given, limit)
        found[name] = {"seconds": round(time.monotonic() - began, 1), "outcomes": outcomes}
        (given.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    every = [outcome for check in found.values() for outcome in check["outcomes"]]
    failed = sum(outcome["ok"] is False for outcome in every)
    print(f"{len(every)} checked, {failed} failed: {given.out / 'gpu.json'}")
    return int(bool(failed))


def apart(name: str, given: Any, limit: float) -> list[dict[str, Any]]:
    """Outcomes of one check, in a process of its own: what breaks the GPU for it breaks it for nobody else."""
    began = time.monotonic()
    log, kept = given.out / f"{name}.txt", given.out / f"{name}.jsonl"
    kept.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu", "--alone", name, "--out", given.out, "--device", given.device]
    command += ["--seconds", str(limit), *(["--tiny"] if given.tiny else [])]
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=file, text=True, cwd=Path(__file__).parents[2]
        )
        watch = threading.Timer(limit + GRACE, process.kill)
        watch.start()
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
        code = process.wait()
        watch.cancel()
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.is_file() else []
    kept.unlink(missing_ok=True)
    outcomes = [json.loads(line) for line in lines]
    if code:
        late = time.monotonic() - began > limit + GRACE
        how = f"took longer than {limit + GRACE:.0f} s" if late else f"ended with {code}"
        ended = Outcome(name, False, f"{how}: {log}")
        print(ended, flush=True)
        outcomes.append(asdict(ended))
    return outcomes


def alone(name: str, options: Options) -> None:
    """Runs one check here. Whatever it calls writes to stderr; stdout has the outcomes alone."""
    with open(os.dup(1), "w", encoding="utf-8") as told:
        os.dup2(2, 1)
        for outcome in outcomes_of(name, options):
            with open(options.out / f"{name}.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
            see = f"; see {options.out / name}.txt" if outcome.ok is False else ""
            print(f"{outcome}{see}", file=told, flush=True)


def outcomes_of(name: str, options: Options) -> Any:
    """What a check finds, one thing after the other."""
    check = importlib.import_module(f"benchmarks.gpu.{name}")
    return attempts(check.work(options))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
