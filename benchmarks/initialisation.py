"""Which start of the heads is best after equal training? Starts x learning rates x seeds, on greedy responses.

    python benchmarks/initialisation.py --json initialisation.json

Every run sees the same tokens in the same order. Measured: tau on held-out prompts of the same families,
offline on greedy text of the trunk, before and after training.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from lab import Lab, machine, recipe, spread, write_rows

STARTS = ("regression", "identity", "copy_last", "copy_last_k", "random")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--work", type=Path, default=Path("runs/lab"), help="keeps responses between calls")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokens", type=int, default=16_000, help="response tokens trained on, the same for all")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 4e-4])
    parser.add_argument("--prompts", type=int, default=287)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    lab = Lab.open(options.model, options.work)
    samples = lab.respond("builtin", "greedy", temperature=0.0, tokens=160, limit=options.prompts)
    measured = lab.respond("builtin-held-out", "held-out", temperature=0.0, tokens=96, limit=42)
    table: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        rows = lab.rows(samples, tokens=options.tokens, seed=seed)
        store = lab.store(rows, "initialisation")
        for start in STARTS:
            settings = {"depth": options.depth, "vocabulary": options.vocabulary, "init": start}
            heads = lab.heads(recipe(seed=seed, heads=settings), rows, store)
            first = {name: tensor.clone() for name, tensor in heads.state_dict().items()}
            before = lab.measure(heads, measured)
            for rate in options.rates:
                heads.load_state_dict(first)
                training = {"learning_rate": rate, "micro_batch_rows": 1, "epochs": 1.0, "top_n": 0}
                lab.train(recipe(seed=seed, heads=settings, train=training), heads, rows, store)
                after = lab.measure(heads, measured)
                row = {"start": start, "rate": rate, "seed": seed, "before": before.tau, "after": after.tau}
                table.append({**row, "car": after.car})
                print(row, flush=True)
                write_rows(options.json, [{"machine": machine(), **row} for row in table])
    print("\n| start | learning rate | tau before | tau after | CAR after |\n|---|---|---|---|---|")
    for start, rate in dict.fromkeys((row["start"], row["rate"]) for row in table):
        rows = [row for row in table if (row["start"], row["rate"]) == (start, rate)]
        car = "/".join(f"{statistics.mean(r['car'][k] for r in rows):.3f}" for k in range(options.depth))
        before = spread([row["before"] for row in rows])
        print(f"| {start} | {rate:g} | {before} | {spread([row['after'] for row in rows])} | {car} |")


if __name__ == "__main__":
    main()
