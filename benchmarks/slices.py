"""How often the gate on slices is wrong, with Holm's rule and with a maximum statistic; and what slices cost.

    python benchmarks/slices.py gate first.json second.json
    python benchmarks/slices.py cost RUN

`gate` needs two acceptance files of heads that are equally good (the same recipe trained twice, say), with counts by
position. It draws prompts from their pairs with replacement and exchanges the two measurements of a prompt at random:
then there is no difference in any slice, and the variation between prompts and trainings is the real one. Slices are
positions, contexts, families (prompts that are alike), and parts of random prompts, all of unequal sizes. A true loss
in one slice is made by rejecting accepted first drafts of it at random.

Two rules are compared on the same simulations, both so that any slice fails wrongly with a chance of 0.5%:

    Holm      Student's t with jackknife errors, and the step-down rule: what the gate does
    maximum   errors and critical value by the bootstrap: the lowest of all slices' studentised changes in each resample
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lab import machine, write_rows

from mtpd.data.packing import Sample
from mtpd.decode.counts import FIRST, Counts
from mtpd.evaluate.acceptance import Acceptance
from mtpd.evaluate.intervals import Array, draws
from mtpd.evaluate.offline import measure_offline
from mtpd.evaluate.slices import AXES, jackknife, slices, tau
from mtpd.evaluate.worst import ERRORS, SliceChange, judge_worst
from mtpd.run.finished import reopen

PLACES = {5: (0, 0), 20: (4, 3), 60: (5, 3)}
"""Of so many slices, those that are positions in the text and in the context; the others are groups of prompts."""


@dataclass
class Material:
    """Pairs of measurements: counts [N, sides, buckets, C] of both kinds of place, and the family of each prompt."""

    text: Array
    context: Array
    family: list[str]


def material(first: Path, second: Path) -> Material:
    """Reads two acceptance files."""
    sides = [Acceptance.load(path) for path in (first, second)]
    rows = [[row for suite in side.suites.values() for row in suite.rows or []] for side in sides]
    family = [row.family or name for name, suite in sides[0].suites.items() for row in suite.rows or []]
    both = list(zip(*rows, strict=True))
    found = {}
    for kind in FIRST:
        buckets = sorted({lower for side in rows for row in side for lower in (row.places or {})[kind]})
        nothing = [0] * (rows[0][0].depth + 1)
        pairs = [[[row.places[kind].get(lower, nothing) for lower in buckets] for row in pair] for pair in both]
        found[kind] = np.array(pairs, dtype=np.float64)
    kept = found["text"][:, 0, :, 0].sum(axis=1) > 0
    return Material(found["text"][kept], found["context"][kept], [f for f, k in zip(family, kept, strict=True) if k])


def _groups(order: np.ndarray, count: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Prompts in an order cut into groups of unequal sizes: the largest has about eight times the smallest."""
    sizes = np.exp(generator.uniform(0.0, np.log(8.0), count))
    cuts = np.round(np.cumsum(sizes) / sizes.sum() * len(order)).astype(int)[:-1]
    return np.split(order, cuts)


def _buckets(places: Array, wanted: int) -> list[Array]:
    """Counts [N, sides, C] of so many ranges of positions; late buckets are joined."""
    found = [places[:, :, bucket] for bucket in range(places.shape[2])]
    return [*found[: wanted - 1], np.sum(found[wanted - 1 :], axis=0)] if wanted else []


def _simulated(
    given: Material, prompts: int, count: int, loss: float, generator: np.random.Generator
) -> tuple[list[Array], int | None]:
    """Counts [N, sides, C] of each slice, all of the same drawn prompts; and which one has lost."""
    drawn = generator.integers(len(given.family), size=prompts)
    swap = generator.random(prompts) < 0.5
    text, context = given.text[drawn], given.context[drawn]
    text[swap], context[swap] = text[swap][:, ::-1], context[swap][:, ::-1]
    positions, contexts = PLACES[count]
    whole = text.sum(axis=2)
    found = [*_buckets(text, positions), *_buckets(context, contexts)]
    groups = count - len(found)
    # Half of the groups hold prompts of one family, the other half any prompts.
    alike = np.array(sorted(range(prompts), key=lambda index: given.family[drawn[index]]))
    axes = [groups - groups // 2, groups // 2] if groups > 6 else [groups]
    for order, size in zip((alike, generator.permutation(prompts)), axes, strict=False):
        for members in _groups(order, size, generator):
            part = np.zeros_like(whole)
            part[members] = whole[members]
            found.append(part)
    if not loss:
        return found, None
    worse = int(generator.integers(positions + contexts, count))
    counts = found[worse][:, 1]
    level = float(tau(counts.sum(axis=0)))
    found[worse][:, 1] = _lost(counts, min(1.0, loss * level / (level - 1.0)), generator)
    return found, worse


def _lost(counts: Array, share: float, generator: np.random.Generator) -> Array:
    """Counts after this share of the rounds with an accepted first draft has lost it, and all later ones."""
    exactly = counts[:, 1:] - np.concatenate([counts[:, 2:], np.zeros((len(counts), 1))], axis=1)
    kept = exactly - generator.binomial(exactly.astype(int), share)
    return np.concatenate([counts[:, :1], kept[:, ::-1].cumsum(axis=1)[:, ::-1]], axis=1)


def _changes(found: list[Array]) -> list[SliceChange]:
    changes = []
    for number, counts in enumerate(found):
        counts = counts[(counts[:, :, 0] > 0).any(axis=1)]
        ratio = jackknife(lambda a, b: tau(b) / tau(a) - 1.0, counts[:, 0], counts[:, 1])
        sides = (float(tau(counts[:, side].sum(axis=0))) for side in (0, 1))
        changes.append(SliceChange("slice", str(number), len(counts), *sides, ratio))
    return changes


def _maximum(found: list[Array], times: Array) -> Array:
    """How many critical values the loss of each slice is away from none, by the maximum statistic.

    Args:
        times: how often each prompt is in each resample, [R, N].
    """
    table = np.stack(found, axis=1)
    sums = (times @ table.reshape(len(table), -1)).reshape(len(times), *table.shape[1:])
    point = table.sum(axis=0)
    change = tau(point[:, 1]) / tau(point[:, 0]) - 1.0
    drawn = tau(sums[:, :, 1]) / tau(sums[:, :, 0]) - 1.0
    errors = drawn.std(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        critical = np.quantile(np.nanmin((drawn - change) / errors, axis=1), ERRORS)
        # A slice fails where change + drop < critical * error.
        return change - critical * errors


def gate(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """False alarms and power of both rules, by number of slices, limit and true loss in one slice."""
    given = material(arguments.first, arguments.second)
    print(f"{len(given.family)} pairs of prompts, {given.text[:, 0, :, 0].sum() / len(given.family):.0f} rounds each")
    columns = ["slices", "prompts", "loss in one", "max-drop-worst", "Holm: wrong", "right", "undecided", "passed"]
    print("| " + " | ".join([*columns, "maximum: wrong", "right"]) + " |")
    print("|---" * (len(columns) + 2) + "|")
    rows = []
    # The prompts are drawn anew in each simulation; the resamples need not be.
    times = draws("", arguments.prompts, arguments.resamples, 0)
    for count in arguments.slices:
        for loss in arguments.losses:
            generator = np.random.default_rng([count, round(1000 * loss)])
            outcomes: dict[float, list[tuple[bool, bool, str, bool, bool]]] = {drop: [] for drop in arguments.drops}
            for _ in range(arguments.simulations):
                found, worse = _simulated(given, arguments.prompts, count, loss, generator)
                changes = _changes(found)
                highest = _maximum(found, times) if arguments.resamples else np.full(count, np.inf)
                for drop, each in outcomes.items():
                    verdict = judge_worst(changes, max_drop=drop)
                    named = [reason.split()[1] for reason in verdict.reasons if reason.startswith("slice ")]
                    holm = set(map(int, named)) if verdict.outcome == "failed" else set()
                    by_maximum = {int(index) for index in np.flatnonzero(highest < -drop)}
                    each.append(
                        (
                            bool(holm - {worse}),
                            worse in holm,
                            verdict.outcome,
                            bool(by_maximum - {worse}),
                            worse in by_maximum,
                        )
                    )
            for drop, each in outcomes.items():
                share = [sum(map(bool, column)) / len(each) for column in zip(*each, strict=True)]
                ended = [sum(one[2] == name for one in each) / len(each) for name in ("undecided", "passed")]
                cells = [f"{100 * value:.1f}%" for value in (share[0], share[1], *ended, share[3], share[4])]
                head = f"| {count} | {arguments.prompts} | {100 * loss:g}% | {drop:g} | "
                print(head + " | ".join(cells) + " |", flush=True)
                for rule, wrong, right in (("Holm", share[0], share[1]), ("maximum", share[3], share[4])):
                    name = f"{rule}, {count} slices, {arguments.prompts} prompts, loss {loss:g}, max-drop {drop:g}"
                    rows.append(_row(f"{name}: wrong", wrong, len(each)))
                    rows.append(_row(f"{name}: right", right, len(each)))
    return rows


def cost(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds that places and slices take, beside those of measuring a run's held-out texts offline."""
    run = reopen(arguments.run)
    lines = (arguments.run / "held-out.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    texts = [json.loads(line) for line in lines][: arguments.prompts]
    samples = [Sample.of(text["id"], text["prompt_ids"], text["response_ids"], "one") for text in texts]
    heads = run.heads("heads")
    measure_offline(run.trunk, heads, samples[:2], end_tokens=run.ends, progress=False)
    began = time.process_time()
    measured = measure_offline(run.trunk, heads, samples, end_tokens=run.ends, progress=False)
    measuring = time.process_time() - began
    rounds = sum(row.drafted[0] for row in measured["one"].rows or [])
    # The control is walked too, so that each round is counted twice.
    counts = Counts(heads.depth)
    began = time.process_time()
    for _ in range(2 * rounds):
        counts._count_place(1)
    counting = time.process_time() - began
    acceptance = Acceptance(mode="offline", trunk="t", heads="h", suites=measured)
    began = time.process_time()
    for each in slices(acceptance, AXES):
        each.ratios()
    showing = time.process_time() - began
    share = (counting + showing) / measuring
    print(
        f"{len(samples)} texts, {rounds} rounds: {measuring:.2f} s of the processor, of which places {counting:.4f} s"
    )
    print(f"slices along {len(AXES)} axes: {showing:.3f} s; together {100 * share:.2f}%")
    values = {"ours": counting + showing, "other": measuring, "against": "measuring offline", "unit": "s"}
    return [{"name": "slices", **values, "ratio": share, "runs": 1, "machine": machine()}]


def _row(name: str, share: float, runs: int) -> dict[str, Any]:
    values = {"name": name, "ours": share, "other": 1.0, "against": "all simulations", "unit": "share"}
    return {**values, "ratio": share, "runs": runs, "machine": machine()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parts = parser.add_subparsers(required=True)
    part = parts.add_parser("gate")
    part.add_argument("first", type=Path)
    part.add_argument("second", type=Path)
    part.add_argument("--slices", type=int, nargs="+", default=list(PLACES), choices=list(PLACES))
    part.add_argument("--prompts", type=int, default=600)
    part.add_argument("--losses", type=float, nargs="+", default=[0.0, 0.05, 0.1])
    part.add_argument("--drops", type=float, nargs="+", default=[0.0, 0.05])
    part.add_argument("--simulations", type=int, default=1000)
    part.add_argument("--resamples", type=int, default=2000, help="of the maximum statistic; 0 leaves it out")
    part.set_defaults(do=gate)
    part = parts.add_parser("cost")
    part.add_argument("run", type=Path)
    part.add_argument("--prompts", type=int, default=84)
    part.set_defaults(do=cost)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    write_rows(arguments.json, arguments.do(arguments))


if __name__ == "__main__":
    main()
