"""Runs by two processes over NCCL, plain and at every stage of ZeRO, where there are two GPUs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu.outcome import Options, Outcome
from benchmarks.gpu.smoke import FEW, RECIPE
from mtpd.evaluate.acceptance import Acceptance

WAYS = {
    "DDP": [],
    **{f"ZeRO {stage}": [f"train.deepspeed=zero{stage}"] for stage in (1, 2, 3)},
    "rows shared": ["train.deepspeed=zero2", "train.sequence_parallel=2"],
}


def work(options: Options) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    for way in WAYS:
        yield f"two processes, {way}", lambda way=way: run(way, options)


def run(way: str, options: Options) -> Outcome:
    name = f"two processes, {way}"
    if not options.device.startswith("cuda") or torch.cuda.device_count() < 2:
        return Outcome(name, None, "fewer than two GPUs")
    if options.left < 15:
        return Outcome(name, None, "no time is left")
    folder = options.out / "runs" / name.replace(" ", "-").replace(",", "")
    shutil.rmtree(folder, ignore_errors=True)
    words = ["distill", str(RECIPE), f"output={folder}", "device=cuda", *FEW, "evaluation.decode_prompts=0", *WAYS[way]]
    command = [sys.executable, "-m", "mtpd", *words, "--launcher", "torchrun", "--processes", "2", "--debug"]
    subprocess.run(command, check=True, timeout=options.left)
    suites = Acceptance.load(folder / "acceptance.json").suites.values()
    drafted, accepted = (sum(getattr(suite, key)[0] for suite in suites) for key in ("drafted", "accepted"))
    return Outcome(name, True, f"{accepted} of {drafted} first drafts accepted", {"accepted": accepted})
