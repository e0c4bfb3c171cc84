"""How fast offline evaluation is beside decoding, and how often the gate is wrong.

    python benchmarks/evaluation.py speed RUN --prompts 8
    python benchmarks/evaluation.py gate first.json second.json

`speed` measures the same prompts of the demo suite with both modes, in turns. `gate` needs two acceptance files of
heads that are equally good (the same recipe trained twice, say). It draws prompts from their pairs with replacement
and exchanges the two measurements of a prompt at random: then there is no difference, and the variation between
prompts and between trainings is the real one. A true loss is made by rejecting accepted first drafts at random.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lab import machine, write_rows
from measure import clock

from mtpd.evaluate.acceptance import Acceptance, PromptCounts, SuiteCounts
from mtpd.evaluate.decoded import measure_decoded
from mtpd.evaluate.gate import compare, judge
from mtpd.evaluate.measure import Model, prompts_alone, respond
from mtpd.evaluate.offline import measure_offline
from mtpd.evaluate.suites import load_suite, questions
from mtpd.run.finished import reopen

Pair = tuple[PromptCounts, PromptCounts]


def speed(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Prompts per second offline and decoded; decoded with and without the plain `generate` that belongs to it."""
    run = reopen(arguments.run)
    model = Model(run.trunk, run.tokenizer, run.fingerprint, run.ends)
    heads = run.heads("heads")
    suite = load_suite("demo", limit=arguments.prompts, max_new_tokens=arguments.tokens)
    asked = questions("demo", suite)
    began = clock()
    samples = respond(model, "demo", suite, asked, arguments.responses, progress=False)
    responding = clock() - began
    prompts = prompts_alone(model, "demo", suite, asked)
    offline, decoding, both = [], [], []
    measure_offline(run.trunk, heads, samples[:2], end_tokens=run.ends, progress=False)
    for _ in range(arguments.runs):
        began = clock()
        ours = measure_offline(run.trunk, heads, samples, end_tokens=run.ends, progress=False)["demo"]
        offline.append(len(samples) / (clock() - began))
        began = clock()
        theirs = measure_decoded(
            run.trunk, heads, prompts, max_new_tokens=suite.max_new_tokens, end_tokens=run.ends, progress=False
        )["demo"]
        both.append(len(prompts) / (clock() - began))
        decoding.append(len(prompts) / theirs.seconds)
        print(f"offline {offline[-1]:.2f}, decoded {decoding[-1]:.3f} prompts/s; tau {ours.tau:.3f}, {theirs.tau:.3f}")
    fast = statistics.median(offline)
    once = len(samples) / (len(samples) / fast + responding)
    print(f"responses: {responding:.1f} s for {len(samples)} prompts of at most {suite.max_new_tokens} tokens")
    rows = []
    for name, ours_rate, others in (
        ("offline evaluation", fast, decoding),
        ("offline evaluation, against decoded with plain generate", fast, both),
        ("offline evaluation and its responses", once, decoding),
    ):
        other = statistics.median(others)
        rows.append(_row(name, ours_rate, other, "decoded evaluation", "prompts/s", arguments.runs))
        print(f"{name}: {ours_rate:.2f} prompts/s against {other:.3f}, {ours_rate / other:.1f} times")
    return rows


def gate(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """False alarms and power of the gate by number of prompts, limit and true loss."""
    first, second = (Acceptance.load(path) for path in (arguments.first, arguments.second))
    pairs = [
        pair
        for name, suite in first.suites.items()
        for pair in zip(suite.rows or [], second.suites[name].rows or [], strict=True)
    ]
    drafts = sum(pair[0].drafted[0] for pair in pairs)
    print(f"{len(pairs)} pairs of prompts, {drafts / len(pairs):.0f} drafts each on average")
    print("| prompts | true loss of CAR_1 | max-drop | failed | undecided | passed |")
    print("|---|---|---|---|---|---|")
    generator = np.random.default_rng(0)
    rows = []
    for prompts in arguments.prompts:
        for loss in arguments.losses:
            found: dict[float, list[str]] = {drop: [] for drop in arguments.drops}
            for number in range(arguments.simulations):
                files = _simulated(pairs, prompts, loss, generator)
                comparison = compare(*files, resamples=arguments.resamples, seed=number)
                for drop, outcomes in found.items():
                    outcomes.append(judge(comparison, max_drop=drop).outcome)
            for drop, outcomes in found.items():
                shares = [outcomes.count(name) / len(outcomes) for name in ("failed", "undecided", "passed")]
                cells = " | ".join(f"{100 * share:.1f}%" for share in shares)
                print(f"| {prompts} | {100 * loss:g} points | {drop:g} | {cells} |", flush=True)
                name = f"gate failed: {prompts} prompts, loss {loss:g}, max-drop {drop:g}"
                rows.append(_row(name, shares[0], 1.0, "all simulations", "share", len(outcomes)))
    return rows


def _simulated(pairs: list[Pair], prompts: int, loss: float, generator: np.random.Generator) -> list[Acceptance]:
    """A baseline and a candidate on drawn prompts, the candidate with so much less CAR_1."""
    chosen = generator.integers(len(pairs), size=prompts)
    swapped = generator.random(prompts) < 0.5
    drawn = [pairs[index][::-1] if swap else pairs[index] for index, swap in zip(chosen, swapped, strict=True)]
    rate = sum(new.accepted[0] for _, new in drawn) / sum(new.drafted[0] for _, new in drawn)
    sides: list[list[PromptCounts]] = [[], []]
    for number, (old, new) in enumerate(drawn):
        sides[0].append(_numbered(old, number, old.accepted))
        sides[1].append(_numbered(new, number, _lost(new.accepted, loss / rate, generator)))
    return [
        Acceptance(
            mode="offline", trunk="t", heads="h", suites={"all": SuiteCounts.of(rows, rows[0].depth)}, versions={}
        )
        for rows in sides
    ]


def _numbered(row: PromptCounts, number: int, accepted: list[int]) -> PromptCounts:
    update = {"id": str(number), "prompt": str(number), "text": "", "accepted": accepted}
    return row.model_copy(update={**update, "expected": None, "expected_rows": None, "trained": None})


def _lost(accepted: list[int], share: float, generator: np.random.Generator) -> list[int]:
    """Counts after this share of the rounds with an accepted first draft have lost it, and all later ones."""
    exactly = [a - b for a, b in zip(accepted, [*accepted[1:], 0], strict=True)]
    kept = [count - int(generator.binomial(count, share)) for count in exactly]
    return [sum(kept[k:]) for k in range(len(kept))]


def _row(name: str, ours: float, other: float, against: str, unit: str, runs: int) -> dict[str, Any]:
    values = {"name": name, "ours": ours, "other": other, "against": against, "unit": unit}
    return {**values, "ratio": ours / other if other else None, "runs": runs, "machine": machine()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parts = parser.add_subparsers(required=True)
    part = parts.add_parser("speed")
    part.add_argument("run", type=Path)
    part.add_argument("--prompts", type=int, default=8)
    part.add_argument("--tokens", type=int, default=96)
    part.add_argument("--runs", type=int, default=3)
    part.add_argument("--responses", type=Path, default=Path("runs/responses"))
    part.set_defaults(do=speed)
    part = parts.add_parser("gate")
    part.add_argument("first", type=Path)
    part.add_argument("second", type=Path)
    part.add_argument("--prompts", type=int, nargs="+", default=[100, 300])
    part.add_argument("--losses", type=float, nargs="+", default=[0.0, 0.01, 0.02])
    part.add_argument("--drops", type=float, nargs="+", default=[0.0, 0.005, 0.01])
    part.add_argument("--simulations", type=int, default=1000)
    part.add_argument("--resamples", type=int, default=2000)
    part.set_defaults(do=gate)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    write_rows(arguments.json, arguments.do(arguments))


if __name__ == "__main__":
    main()
