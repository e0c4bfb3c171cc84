"""When does distillation beat labels? Equal tokens; losses x training text x seeds.

    python benchmarks/distillation.py --json distillation.json

Training text: `given` (the words of the built-in prompts: their labels are not the teacher's), `greedy`
and `sampled` (responses of the trunk at temperature 0 and 1). Measured on greedy text of the trunk:
tau (greedy drafts) and expected acceptance Σ min(p, q) of depth 1 and 2, on held-out prompts of the
trained families and on prompts of other families.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from lab import Lab, machine, recipe, spread, write_rows

LOSSES: dict[str, dict[str, Any]] = {
    "CE": {"loss": "ce"},
    "KL": {"loss": "kl", "top_n": 0},
    "KL top-n": {"loss": "kl", "top_n": -1},
    "KL, teacher T 0.5": {"loss": "kl", "top_n": 0, "teacher_temperature": 0.5},
    "CE + KL": {"loss": "mtp_d", "top_n": 0},
    "CE + KL top-n": {"loss": "mtp_d", "top_n": -1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--work", type=Path, default=Path("runs/lab"), help="keeps responses between calls")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokens", type=int, default=16_000, help="response tokens trained on, the same for all")
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=12_288)
    parser.add_argument("--top-n", type=int, default=1024, help="8%% of the vocabulary, as in the paper")
    parser.add_argument("--prompts", type=int, default=287)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    lab = Lab.open(options.model, options.work)
    texts = {
        "given": lab.given("builtin", None),
        "greedy": lab.respond("builtin", "greedy", temperature=0.0, tokens=160, limit=options.prompts),
        "sampled": lab.respond("builtin", "sampled", temperature=1.0, tokens=160, limit=options.prompts),
    }
    held_out = {
        "same families": lab.respond("builtin-held-out", "held-out", temperature=0.0, tokens=96, limit=42),
        "other families": lab.respond("builtin-other", "other", temperature=0.0, tokens=96, limit=24),
    }
    table: list[dict[str, Any]] = []
    for text, samples in texts.items():
        for seed in range(options.seeds):
            rows = lab.rows(samples, tokens=options.tokens, seed=seed)
            store = lab.store(rows, "current")
            heads_settings = {"depth": options.depth, "vocabulary": options.vocabulary, "init": "regression"}
            start = lab.heads(recipe(seed=seed, heads=heads_settings), rows, store)
            first = {name: tensor.clone() for name, tensor in start.state_dict().items()}
            for loss, settings in {"untrained": {}, **LOSSES}.items():
                settings = dict(settings)
                if settings.get("top_n") == -1:
                    settings["top_n"] = options.top_n
                start.load_state_dict(first)
                if loss != "untrained":
                    training = {"learning_rate": 3e-4, "micro_batch_rows": 1, "epochs": 1.0, **settings}
                    lab.train(recipe(seed=seed, heads=heads_settings, train=training), start, rows, store)
                for domain, measured in held_out.items():
                    counts = lab.measure(start, measured)
                    row = {"text": text, "loss": loss, "seed": seed, "domain": domain, "tau": counts.tau}
                    table.append({**row, "car": counts.car, "expected": counts.expected_acceptance})
                print(text, seed, loss, [round(entry["tau"], 3) for entry in table[-2:]], flush=True)
                write_rows(options.json, [{"machine": machine(), **row} for row in table])
    report(table)


def report(table: list[dict[str, Any]]) -> None:
    """Means over seeds, and the paired difference to CE."""
    print(
        "\n| text | loss | domain | tau | tau - tau of CE | Σ min(p,q), depth 1 | depth 2 |\n"
        "|---|---|---|---|---|---|---|"
    )
    keys = dict.fromkeys((row["text"], row["loss"], row["domain"]) for row in table)
    for text, loss, domain in sorted(keys, key=lambda key: (key[2], key[0])):
        rows = [r for r in table if (r["text"], r["loss"], r["domain"]) == (text, loss, domain)]
        labels = [r for r in table if (r["text"], r["loss"], r["domain"]) == (text, "CE", domain)]
        gaps = [row["tau"] - other["tau"] for row, other in zip(rows, labels, strict=False)]
        gap = spread(gaps) if gaps and loss != "CE" else ""
        expected = [statistics.mean(row["expected"][k] for row in rows) for k in range(2)]
        taus = spread([row["tau"] for row in rows])
        print(f"| {text} | {loss} | {domain} | {taus} | {gap} | {expected[0]:.3f} | {expected[1]:.3f} |")


if __name__ == "__main__":
    main()
