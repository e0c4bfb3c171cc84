"""The gate on the worst slice, and the floor that tau must reach.

With many slices the worst one looks bad by chance. So a slice fails only if it does so among all of them: p-values of
"no more than max_drop_worst is lost" are compared by the step-down rule of Holm (1979), which bounds the chance that
any of them fails wrongly by `ERRORS`, however slices overlap. p-values are those of Student's t with the jackknife
errors of `mtpd.evaluate.slices`. benchmarks/slices.py has the simulation by which this was chosen.

    failed      a slice has lost more than max_drop_worst
    passed      the 95% intervals of all slices lie at or above -max_drop_worst, each on `FEW` prompts or more
    undecided   everything else; slices that are too small to tell are named
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mtpd.errors import UserError
from mtpd.evaluate.acceptance import Acceptance, PromptCounts
from mtpd.evaluate.gate import (
    MINIMUM_PROMPTS,
    MOST_PROMPTS,
    PASSING_ERRORS,
    Outcome,
    Verdict,
    check_max_drop,
    pairs_compared,
    percent,
)
from mtpd.evaluate.intervals import CONFIDENCE, Array
from mtpd.evaluate.run_tables import TOTAL
from mtpd.evaluate.slices import AXES, FEW, KINDS, Ratio, along, has_places, jackknife, tau

ERRORS = 0.005
"""Chance that any slice fails although none has lost more than it may."""


@dataclass(frozen=True)
class SliceChange:
    """The change of tau in one slice, on the same prompts."""

    axis: str
    name: str
    prompts: int
    before: float
    after: float
    change: Ratio
    """Relative to the tau before."""

    @property
    def label(self) -> str:
        """What messages call it: family code."""
        return f"{self.axis} {self.name}"

    def shown(self) -> str:
        """tau 1.50 → 1.41, -6.12% [-8.05, -4.19]"""
        interval = percent(" ", self.change.estimate())
        return f"tau {self.before:.3f} → {self.after:.3f}, {100 * self.change.value:+.2f}%{interval}"


def slice_changes(
    baseline: Acceptance,
    candidate: Acceptance,
    axes: Sequence[str],
    *,
    names: Sequence[str] = ("baseline", "candidate"),
) -> tuple[list[SliceChange], list[str]]:
    """The change of each slice that both files have, and what has to be said about those that they do not have.

    Args:
        axes: all of them if there are none.
        names: what messages call the two.
    """
    before, after, _ = pairs_compared(baseline, candidate)
    sides = [[(name, row) for name, rows in each.items() for row in rows] for each in (before, after)]
    notes, wanted = [], list(axes or AXES)
    without = [name for name, each in zip(names, (baseline, candidate), strict=True) if not has_places(each)]
    if without and (lost := [axis for axis in wanted if axis in KINDS]):
        wanted = [axis for axis in wanted if axis not in KINDS]
        notes.append(
            f"{' and '.join(without)}: no counts by position (an earlier schema), so that {' and '.join(lost)} cannot "
            "be compared; measure again with mtpd eval"
        )
    found: dict[bytes, SliceChange] = {}
    for axis in wanted:
        for name, (old, new) in along(axis, sides).items():
            # The same prompts under another name are not tested twice.
            found.setdefault(np.concatenate([old, new]).tobytes(), _change(axis, name, old, new))
    return list(found.values()), notes


def _change(axis: str, name: str, old: Array, new: Array) -> SliceChange:
    change = jackknife(lambda first, second: tau(second) / tau(first) - 1.0, old, new)
    prompts = int(((old[:, 0] > 0) & (new[:, 0] > 0)).sum())
    return SliceChange(axis, name, prompts, float(tau(old.sum(axis=0))), float(tau(new.sum(axis=0))), change)


def judge_worst(changes: Sequence[SliceChange], *, max_drop: float) -> Verdict:
    """The verdict on the worst of some slices.

    Args:
        max_drop: the largest relative loss of tau that passes in each slice.

    Raises:
        UserError: max_drop is no share, or there is no slice.
    """
    check_max_drop(max_drop, option="--max-drop-worst")
    if not changes:
        raise UserError("--by: neither file has such slices; accepted with these files: suite, family")
    on = f" on {len(changes)} slices"
    failed, unclear = _sorted_out([each.change for each in changes], [each.prompts for each in changes], -max_drop)
    allowed = f"allowed {-100 * max_drop:+.2f}% in each"
    if failed:
        reasons = [f"{changes[i].label} {changes[i].shown()} on {changes[i].prompts} prompts" for i in failed]
        also = [f"too small to tell: {changes[i].label}" for i in unclear]
        return Verdict("failed", max_drop, [*reasons, allowed, *also], on=on, option="max-drop-worst")
    if unclear:
        reasons = [f"{changes[i].label} {changes[i].shown()} {_wanted(changes[i], max_drop)}" for i in unclear]
        return Verdict("undecided", max_drop, ["too small to tell", *reasons, allowed], on=on, option="max-drop-worst")
    worst = min(changes, key=lambda each: each.change.value)
    reasons = [f"the worst is {worst.label} {worst.shown()} on {worst.prompts} prompts", allowed]
    return Verdict("passed", max_drop, reasons, on=on, option="max-drop-worst")


def moved(changes: Sequence[SliceChange]) -> list[SliceChange]:
    """The slices whose tau has changed, up or down, all tested together."""
    p_values = [2 * min(p_value(each.change, 0.0), p_value(-each.change, 0.0)) for each in changes]
    return [changes[index] for index in holm(p_values, 1 - CONFIDENCE)]


def _wanted(change: SliceChange, max_drop: float) -> str:
    """Says how many prompts a slice has, and how many would decide in 80% of cases."""
    distance = change.change.value + max_drop
    wanted = float(FEW)
    if math.isfinite(change.change.error) and distance > 0:
        wanted = max(
            wanted, change.prompts + 1, change.prompts * (PASSING_ERRORS * change.change.error / distance) ** 2
        )
    known = distance > 0 and wanted < MOST_PROMPTS
    return f"on {change.prompts} prompts" + (f", {math.ceil(wanted)} wanted" if known else "")


def judge_floor(acceptance: Acceptance, min_tau: float, axes: Sequence[str] = ()) -> Verdict:
    """The verdict on a tau that all suites together must reach, and each slice of some axes.

    Raises:
        UserError: min_tau is below 1, or the file has no counts by prompt.
    """
    check_min_tau(min_tau)
    rows = [(name, row) for name, suite in acceptance.suites.items() for row in suite.rows or [] if row.trained is None]
    if not rows:
        raise UserError("--min-tau: no prompt is left that the run was not trained on")
    tables = {TOTAL: _whole([row for _, row in rows])}
    for axis in axes:
        tables |= {f"{axis} {name}": counts for name, (counts,) in along(axis, [rows]).items()}
    found = {name: jackknife(tau, counts) for name, counts in tables.items()}
    prompts = [int((counts[:, 0] > 0).sum()) for counts in tables.values()]
    failed, unclear = _sorted_out(list(found.values()), prompts, min_tau)
    if prompts[0] < MINIMUM_PROMPTS and 0 not in unclear:
        failed, unclear = [i for i in failed if i], [0, *unclear]
    shown = [
        f"{name} tau {each.estimate(within=(1.0, math.inf)).text()} on {count} prompts"
        for (name, each), count in zip(found.items(), prompts, strict=True)
    ]
    few = [f"the floor decides on {MINIMUM_PROMPTS} prompts or more"] if prompts[0] < MINIMUM_PROMPTS else []
    chosen = failed or unclear or [min(range(len(shown)), key=lambda index: list(found.values())[index].value)]
    reasons = [*(shown[index] for index in chosen), *few, f"asked for {min_tau:g}"]
    outcome: Outcome = "failed" if failed else "undecided" if unclear else "passed"
    return Verdict(outcome, min_tau, reasons, on=" on the floor of tau", option="min-tau")


def check_min_tau(min_tau: float) -> None:
    """Raises UserError unless a tau can reach it and can miss it."""
    if not (math.isfinite(min_tau) and min_tau > 1.0):
        raise UserError(f"--min-tau: {min_tau} is not accepted; accepted: above 1, which decoding without drafts has")


def _whole(rows: Sequence[PromptCounts]) -> Array:
    return np.array([[*row.drafted[:1], *row.accepted] for row in rows], dtype=np.float64)


def _sorted_out(ratios: Sequence[Ratio], prompts: Sequence[int], limit: float) -> tuple[list[int], list[int]]:
    """Which of some ratios lie below a limit, all tested together, and of which that cannot be told."""
    failed = holm([p_value(ratio, limit) for ratio in ratios], ERRORS)
    unclear = []
    for index, (ratio, count) in enumerate(zip(ratios, prompts, strict=True)):
        low = ratio.estimate().low
        if index not in failed and (count < FEW or low is None or low < limit):
            unclear.append(index)
    return failed, unclear


def p_value(ratio: Ratio, limit: float) -> float:
    """The chance to see so low a ratio where the true one is the limit; 1 where there are too few prompts."""
    if not math.isfinite(ratio.error):
        return 1.0
    if ratio.error == 0.0:
        return 0.0 if ratio.value < limit else 1.0
    from scipy.special import stdtr  # takes a moment to import

    return float(stdtr(ratio.freedom, (ratio.value - limit) / ratio.error))


def holm(p_values: Sequence[float], errors: float) -> list[int]:
    """Indices of the hypotheses that are refused, such that any is refused wrongly with this chance at most."""
    refused = []
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        if p_values[index] > errors / (len(p_values) - rank):
            break
        refused.append(index)
    return sorted(refused)
