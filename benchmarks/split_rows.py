"""What it saves and costs that processes share rows (`train.sequence_parallel`): memory of a process, time of a row.

    python benchmarks/split_rows.py

Two processes, each with a core and one thread, train two chain heads for a Llama with random weights, in float32 and
under ZeRO-2. Either each has rows of its own, or both share each row. The memory is that of the tensors that live at a
time, at most, beside trunk and heads, counted in a run of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from lab import machine
from measure import peak_bytes
from step_times import MODEL, WARM, WORDS, Clock
from transformers import LlamaConfig, LlamaForCausalLM

from mtpd.data.packing import PackedRows
from mtpd.heads import build_heads, configure_heads, start_heads
from mtpd.parallel import ranks
from mtpd.recipe import load_recipe
from mtpd.run.directory import RunDirectory
from mtpd.run.session import Session
from mtpd.run.training import train_heads
from mtpd.trunk import Trunk

PROCESSES = 2


def work(folder: Path, tokens: int, parts: int, steps: int) -> None:
    """What one process does, with 0 steps for the memory; the first one writes what was found."""
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["RANK"]) % len(cores)]})
    torch.manual_seed(0)
    shape = {key: value for key, value in MODEL.items() if key != "model_type"}
    trunk = Trunk(LlamaForCausalLM(LlamaConfig(**{**shape, "max_position_embeddings": tokens})).eval())
    given = [f"data.row_length={tokens}", "train.deepspeed=zero2", f"train.sequence_parallel={parts}"]
    given += [
        "model=none",
        f"output={folder / 'run'}",
        f"train.max_steps={WARM + steps if steps else 1}",
        "train.save_steps=1000000",
    ]
    recipe = load_recipe(None, [*WORDS, *given, "data.hidden_states=recompute"])
    with ranks.joined(torch.device("cpu")):
        heads = build_heads(trunk, configure_heads(recipe.heads.model_dump(), trunk, vocabulary=0, fingerprint=""))
        start_heads(heads, trunk, "identity", lambda: [], seed=0)
        ids = torch.randint(MODEL["vocab_size"], (4, tokens), generator=torch.Generator().manual_seed(0))
        rows = PackedRows(ids, ids, torch.arange(tokens).expand(4, tokens), documents=4, cut=0, dropped=0)
        clock = Clock()
        session = Session(recipe, RunDirectory(recipe.output), trunk, None, "", [2], False)
        if steps:
            train_heads(session, heads, rows, None, [], callbacks=[clock])
            found = statistics.median(clock.seconds[WARM:]) * parts / PROCESSES
        else:
            found = peak_bytes(lambda: train_heads(session, heads, rows, None, []))
        if ranks.is_main():
            (folder / "found.json").write_text(json.dumps(found))


def measured(tokens: int, parts: int, steps: int) -> float:
    """Seconds of a row; with 0 steps the bytes of a process."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--nproc-per-node", str(PROCESSES), __file__, "--work", folder, "--steps", str(steps)]
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *words,
            "--tokens",
            str(tokens),
            "--parts",
            str(parts),
        ]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
        return float(json.loads((Path(folder) / "found.json").read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1024, 2048, 4096])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--runs", type=int, default=3, help="of each case, for the time")
    parser.add_argument("--parts", type=int, default=PROCESSES, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        work(options.work, options.tokens[0], options.parts, options.steps)
        return
    print(machine())
    print("| tokens of a row | memory, own rows | shared | ratio | seconds a row, own rows | shared | ratio |")
    print("|---|---|---|---|---|---|---|")
    for tokens in options.tokens:
        memory = [measured(tokens, parts, 0) / 1e9 for parts in (1, PROCESSES)]
        # In turns, since the machine is not the same from one minute to the next.
        runs = [[measured(tokens, parts, options.steps) for parts in (1, PROCESSES)] for _ in range(options.runs)]
        own, shared = (statistics.median(each) for each in zip(*runs, strict=True))
        ratio = statistics.median(second / first for first, second in runs)
        cells = [f"{memory[0]:.2f} GB", f"{memory[1]:.2f} GB", f"{memory[1] / memory[0]:.2f}x"]
        print("|", " | ".join([f"{tokens:,}", *cells, f"{own:.2f}", f"{shared:.2f}", f"{ratio:.2f}x"]), "|", flush=True)


if __name__ == "__main__":
    main()
