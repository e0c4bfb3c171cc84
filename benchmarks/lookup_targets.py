"""Need heads learn what look-up knows already? Equal text; which positions have a loss x seeds.

    python benchmarks/lookup_targets.py --json lookup-targets.json

A token counts as known if look-up gives it: the text so far, in which the last two tokens or more stood before, went on
with it. Three ways: all positions have a loss; those whose target is known have none; two of three of them, drawn at
random, have none, which in expectation is a third of their weight. Measured on held-out prompts of the trained
families and on other families: tau of the heads' chain, and of heads and look-up together in one tree. What is known of
the drafts (`chances.json`) is counted on other prompts than tau is measured on.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from lab import Lab, machine, recipe, spread, write_rows
from torch import Tensor

from mtpd import alignment
from mtpd.data.packing import PackedRows
from mtpd.decode.lookup import LookupIndex
from mtpd.evaluate.acceptance import DrafterCounts
from mtpd.evaluate.chances import count_chances
from mtpd.evaluate.drafters import DRAFTERS, measure_drafters
from mtpd.heads import build_heads

KNOWN = -101
"""Label of a response token that look-up gives; it counts as response, and no head has a loss on it."""
LEAST = 2
"""Tokens of a match."""
WAYS = {"all positions": 0.0, "known ones left out": 1.0, "known ones at a third": 2 / 3}
"""By name, the share of known tokens without a loss."""


def counted(labels_BT: Tensor, position_ids_BT: Tensor, depth: int) -> Tensor:
    """As `mtpd.alignment.counted`, without known targets."""
    return PLAIN(labels_BT, position_ids_BT, depth) & (alignment.shift(labels_BT, depth + 1, fill=0) != KNOWN)


PLAIN = alignment.counted


def known(rows: PackedRows) -> Tensor:
    """Which tokens look-up gives. [N, T]"""
    found = torch.zeros(rows.input_ids.shape, dtype=torch.bool)
    for row, (ids, positions) in enumerate(zip(rows.input_ids.tolist(), rows.position_ids.tolist(), strict=True)):
        index = LookupIndex()
        for place, (token, position) in enumerate(zip(ids, positions, strict=True)):
            if position == 0:
                index = LookupIndex()
            match = next(iter(index.matches(1)), None) if index.tokens else None
            found[row, place] = match is not None and match.length >= LEAST and match.tokens[0] == token
            index.extend([token])
    return found & (rows.labels != alignment.IGNORED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--work", type=Path, default=Path("runs/lab"), help="keeps responses between calls")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokens", type=int, default=60_000, help="response tokens trained on, the same for all")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    lab = Lab.open(options.model, options.work)
    samples = lab.respond("builtin", "greedy-160", temperature=0.0, tokens=160, limit=None)
    same = lab.respond("builtin-held-out", "held-out-128", temperature=0.0, tokens=128, limit=84)
    domains = {
        "same families": same[1::2],
        "other families": lab.respond("builtin-other", "other-128", temperature=0.0, tokens=128, limit=24),
    }
    table: list[dict[str, Any]] = []
    alignment.counted = counted
    for seed in range(options.seeds):
        rows = lab.rows(samples, tokens=options.tokens, seed=seed)
        labels, of_lookup = rows.labels.clone(), known(rows)
        draw = torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed))
        store = lab.store(rows, "current")
        heads_settings = {"depth": options.depth, "vocabulary": 8192, "init": "regression"}
        start = lab.heads(recipe(seed=seed, heads=heads_settings), rows, store)
        first = {name: tensor.clone() for name, tensor in start.state_dict().items()}
        order = list(WAYS.items())
        random.Random(seed).shuffle(order)
        for name, share in order:
            rows.labels = torch.where(of_lookup & (draw < share), KNOWN, labels)
            start.load_state_dict(first)
            training = {"learning_rate": 4e-4, "epochs": 1.0, "loss": "kl", "top_n": 0}
            seconds = lab.train(recipe(seed=seed, heads=heads_settings, train=training), start, rows, store)
            rows.labels = labels
            copy = build_heads(lab.trunk, start.config)
            copy.load_state_dict(start.state_dict())
            copy.to(lab.trunk.dtype).eval()
            chances = count_chances(lab.trunk, copy, same[::2], progress=False)
            for domain, measured in domains.items():
                found = measure_drafters(lab.trunk, copy, measured, chances, end_tokens=lab.ends, progress=False)
                taus = {each: DrafterCounts.of([row[each] for row in found.values()]).tau for each in DRAFTERS}
                row = {"way": name, "seed": seed, "domain": domain, "known": float(of_lookup.sum() / options.tokens)}
                table.append({**row, "seconds": seconds, "chain": lab.measure(start, measured).tau, **taus})
                print({key: round(v, 3) if isinstance(v, float) else v for key, v in table[-1].items()}, flush=True)
            write_rows(options.json, [{"machine": machine(), **row} for row in table])
    report(table)


def report(table: list[dict[str, Any]]) -> None:
    """Means over seeds, and the paired difference to all positions."""
    print("\n| domain | loss | tau, chain of heads | tau, together | together, against all positions |")
    print("|---|---|---|---|---|")
    for domain in dict.fromkeys(row["domain"] for row in table):
        of = {way: [row for row in table if (row["way"], row["domain"]) == (way, domain)] for way in WAYS}
        plain = {row["seed"]: row["together"] for row in of["all positions"]}
        for way, rows in of.items():
            gaps = spread([row["together"] - plain[row["seed"]] for row in rows if row["seed"] in plain])
            taus = [spread([row[name] for row in rows]) for name in ("chain", "together")]
            print(f"| {domain} | {way} | {taus[0]} | {taus[1]} | {gaps} |")


if __name__ == "__main__":
    main()
