"""Two acceptance files compared prompt by prompt, and the gate: passed, failed, or undecided.

The gate looks at ratios over all suites together. Of the heads: the change of CAR_1 in points, and the relative
change of tau. Of the drafter that they are part of: the relative change of the tau of heads and look-up together. It
can be told to guard one of the two. Each has bootstrap intervals over prompts, both files resampled together. With
M = max_drop:

    failed      at least MINIMUM_PROMPTS prompts, and a 99.5% interval lies below -M
    passed      at least MINIMUM_PROMPTS prompts, and all 95% intervals lie at or above -M
    undecided   everything else; the number of prompts that would decide is estimated

Failing takes more than passing: several ratios are tested, and a pipeline that runs every week should not fail by
chance. Heads that are equally good then fail in fewer than 1 of 100 runs whatever M is, and heads that have lost
more than M pass in fewer than 1 of 40.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mtpd.errors import UserError
from mtpd.evaluate.acceptance import RANDOM, Acceptance, PromptCounts, Settings
from mtpd.evaluate.intervals import DRAFTERS, RESAMPLES, Array, Estimate, estimate, paired_differences

MINIMUM_PROMPTS = 50
"""Fewer prompts never decide: percentile intervals are too narrow below about so many."""
FAILING_CONFIDENCE = 0.995
FAILING_ERRORS = 2.807 + 0.842
PASSING_ERRORS = 1.960 + 0.842
"""Standard errors between a change and the limit at which an interval keeps off the limit in 80% of cases."""
RELATIVE = ("tau", "tau_together", "tau_heads", "tau_lookup", "speed_up", "speed_up_over_engine")
"""Ratios whose change is relative; that of the others is a difference."""
COMPARED = ("car_1", "tau", "tau_together", "speed_up", "speed_up_over_engine")
"""Ratios that a comparison shows, as far as both files have them."""
GUARDED = {"heads": ("car_1", "tau"), "together": ("tau_together",)}
"""Ratios that the gate looks at: of the heads, and of heads and look-up together."""
Guard = Literal["heads", "together", "both"]
MOST_PROMPTS = 100_000
"""An estimate of more prompts than this says only that the change lies at the limit."""

LABELS = {
    "tau": "tau",
    "tau_together": "tau with look-up",
    "tau_heads": "tau of the heads as a tree",
    "tau_lookup": "tau of look-up",
    "speed_up": "speed-up over generate",
    "speed_up_over_engine": "speed-up over engine without drafts",
}

Outcome = Literal["passed", "failed", "undecided"]
EXIT_CODES = {"passed": 0, "undecided": 4, "failed": 3}
"""From the best to the worst."""


@dataclass(frozen=True)
class Change:
    """One ratio before and after, and its change: relative for tau and speed-up, else a difference."""

    name: str
    before: float
    after: float
    change: Estimate
    """With a 95% interval."""
    failing: Estimate
    """The same with the interval by which the gate fails."""
    standard_error: float

    @property
    def relative(self) -> bool:
        return self.name in RELATIVE

    @property
    def direction(self) -> Literal["up", "down", "flat"]:
        """Side of no change on which the 95% interval lies; flat where it has both, or there is none."""
        if self.change.low is None or self.change.high is None:
            return "flat"
        return "up" if self.change.low > 0 else "down" if self.change.high < 0 else "flat"

    def shown(self) -> str:
        """The change as points or percent, with its 95% interval if it has one: -2.1 points [-2.8, -1.4]"""
        unit = "%" if self.relative else " points"
        return f"{100 * self.change.value:+.2f}{unit}{percent(' ', self.change)}"


def percent(before: str, estimate: Estimate) -> str:
    """An interval in hundredths behind some words: [-2.80, -1.40]; nothing where there is none."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{before}[{100 * estimate.low:+.2f}, {100 * estimate.high:+.2f}]"


@dataclass(frozen=True)
class Comparison:
    """Two measurements of the same prompts."""

    suites: dict[str | None, dict[str, Change]]
    """By suite, and under None over all of them: the change of each ratio that both files have."""
    prompts: dict[str | None, int]
    """Prompts compared."""
    left_out: int = 0
    """Prompts that are not compared because one of the runs was trained on them."""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """The verdict of the gate."""

    outcome: Outcome
    limit: float
    """Value of the option."""
    reasons: list[str]
    """One line for each ratio that the gate looks at."""
    more_prompts: int | None = None
    """Undecided: how many more would decide, if the change stays as it is; None where no number helps."""
    on: str = ""
    """Words behind "gate", where it is not the one on all suites together."""
    option: str = "max-drop"
    """The option that asked for it."""

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.outcome]

    @property
    def line(self) -> str:
        """The verdict in one line."""
        if self.outcome != "undecided" or self.on:
            return f"gate{self.on} {self.outcome}: {'; '.join(self.reasons)}"
        more = "more prompts will hardly decide" if self.more_prompts is None else f"{self.more_prompts} more needed"
        return f"gate undecided, {more.replace('more needed', 'more prompts needed')}: {'; '.join(self.reasons)}"


def compare(
    baseline: Acceptance,
    candidate: Acceptance,
    *,
    names: Sequence[str] = ("baseline", "candidate"),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Changes of all ratios from baseline to candidate, with paired intervals.

    Args:
        names: what messages call the two.

    Raises:
        UserError: another trunk, mode, suite, prompt or setting, or a file without counts by prompt.
    """
    check_comparable(baseline, candidate, names=names)
    before, after, left_out = pairs_compared(baseline, candidate)
    texts = sum(
        old.text != new.text for name, rows in before.items() for old, new in zip(rows, after[name], strict=True)
    )
    if not before:
        raise UserError(f"{names[1]}: all {left_out} prompts were trained on; nothing is left to compare")
    notes = [RANDOM] if baseline.random_trunk or candidate.random_trunk else []
    if left_out:
        notes.append(f"{left_out} prompts are left out of the comparison: a run was trained on them, or nearly")
    other = baseline.trunk != candidate.trunk
    if other:
        notes.append(
            f"heads under another trunk than their own ({candidate.trunk[:12]} in place of {baseline.trunk[:12]}): the "
            "change is what it costs"
        )
    if texts:
        total = sum(map(len, before.values()))
        why = "each model writes its own" if other else "rounding of another machine or batch"
        notes.append(f"{texts} of {total} texts differ between the two ({why})")
    # As many nodes in both, or the taus of drafters do not compare.
    apart = set() if _nodes(baseline) == _nodes(candidate) else {f"tau_{name}" for name in DRAFTERS}
    sizes: dict[str | None, int] = {name: len(rows) for name, rows in before.items()}
    changes = {
        name: {
            ratio: _change(ratio, first[ratio], second[ratio])
            for ratio in first
            if ratio in second
            and ratio not in apart
            and not np.isnan(first[ratio]).any()
            and not np.isnan(second[ratio]).any()
        }
        for name, (first, second) in paired_differences(before, after, resamples=resamples, seed=seed).items()
    }
    return Comparison(changes, {**sizes, None: sum(map(len, before.values()))}, left_out, notes)


def pairs_compared(
    baseline: Acceptance, candidate: Acceptance
) -> tuple[dict[str, list[PromptCounts]], dict[str, list[PromptCounts]], int]:
    """Rows of both files by suite, without prompts that a run was trained on, and how many those are."""
    before: dict[str, list[PromptCounts]] = {}
    after: dict[str, list[PromptCounts]] = {}
    left_out = 0
    for name, suite in baseline.suites.items():
        for old, new in zip(suite.rows or [], candidate.suites[name].rows or [], strict=True):
            if old.trained or new.trained:
                left_out += 1
                continue
            before.setdefault(name, []).append(old)
            after.setdefault(name, []).append(new)
    return before, after, left_out


def _nodes(acceptance: Acceptance) -> dict[str, int | None]:
    return {name: each.nodes for name, each in (acceptance.total().drafters or {}).items()}


def _change(name: str, before: Array, after: Array) -> Change:
    """From resampled ratios, entry 0 being the one measured."""
    changes = after / before - 1.0 if name in RELATIVE else after - before
    point, spread = float(changes[0]), changes[1:]
    return Change(
        name,
        float(before[0]),
        float(after[0]),
        estimate(point, spread),
        estimate(point, spread, FAILING_CONFIDENCE),
        float(spread.std()) if spread.size else math.inf,
    )


def judge(comparison: Comparison, *, max_drop: float, guard: Guard = "both") -> Verdict:
    """The gate's verdict.

    Args:
        guard: which of the two is looked at. Both: the heads, and where both files have it, the drafter.
        max_drop: how much may be lost: 0.01 is one point of CAR_1, and one percent of tau.

    Raises:
        UserError: max_drop is no share, or heads and look-up together are to be guarded and were not measured.
    """
    check_max_drop(max_drop)
    prompts, changes = comparison.prompts[None], comparison.suites[None]
    wanted = [name for part, names in GUARDED.items() if guard in (part, "both") for name in names]
    checks = [changes[name] for name in wanted if name in changes]
    if not checks:
        raise UserError(
            "--guard: together is not accepted: one of the files does not have heads and look-up together; measure "
            "again with mtpd eval, or guard the heads"
        )
    reasons = [
        f"{label(check.name)} {check.before:.3f} → {check.after:.3f}, {check.shown()}"
        f"{percent(', 99.5% ', check.failing)}, on {prompts} prompts, allowed {-100 * max_drop:+.2f}"
        for check in checks
    ]
    if prompts < MINIMUM_PROMPTS:
        reasons.append(f"the gate decides on {MINIMUM_PROMPTS} prompts or more")
        return Verdict("undecided", max_drop, reasons, MINIMUM_PROMPTS - prompts)
    if any(_high(check.failing) < -max_drop for check in checks):
        return Verdict("failed", max_drop, reasons)
    undecided = [check for check in checks if _low(check.change) < -max_drop]
    if not undecided:
        return Verdict("passed", max_drop, reasons)
    most = max(_prompts_wanted(check, prompts, max_drop) for check in undecided)
    return Verdict("undecided", max_drop, reasons, None if most > MOST_PROMPTS else max(1, math.ceil(most - prompts)))


def _low(estimate: Estimate) -> float:
    assert estimate.low is not None
    return estimate.low


def _high(estimate: Estimate) -> float:
    assert estimate.high is not None
    return estimate.high


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """The exit code of the worst of some verdicts; 0 where there are none."""
    codes = list(EXIT_CODES.values())
    return max((verdict.exit_code for verdict in verdicts), key=codes.index, default=0)


def check_max_drop(max_drop: float, *, option: str = "--max-drop") -> None:
    """Raises UserError unless it is a share."""
    if not 0.0 <= max_drop < 1.0:
        raise UserError(f"{option}: {max_drop} is not accepted; accepted: from 0 to below 1, such as 0.01")


def _prompts_wanted(check: Change, prompts: int, max_drop: float) -> float:
    """Prompts that decide in 80% of cases if the change is what it seems; errors fall with the root of their number."""
    distance = check.change.value + max_drop
    if distance == 0.0:
        return math.inf
    errors = PASSING_ERRORS if distance > 0 else FAILING_ERRORS
    return prompts * (errors * check.standard_error / distance) ** 2


def label(ratio: str) -> str:
    """Names a ratio as people read it: CAR_1, AR_1, tau, Σ min(p,q)_1, speed-up with its baseline."""
    if ratio in LABELS:
        return LABELS[ratio]
    kind, _, depth = ratio.partition("_")
    return {"expected": "Σ min(p,q)"}.get(kind, kind.upper()) + f"_{depth}"


def check_comparable(baseline: Acceptance, candidate: Acceptance, *, names: Sequence[str]) -> None:
    """Raises UserError if a difference between the two files could come from anything but the heads."""
    for name, each in zip(names, (baseline, candidate), strict=True):
        check_rows(each, name)
    between = f"{names[0]} and {names[1]}"
    check_trunk(baseline, candidate.trunk, between, heads_trunk=candidate.heads_trunk)
    check_mode(baseline, candidate.mode, between)
    if baseline.sampling != candidate.sampling:
        raise UserError(f"{between}: decoded with different sampling ({baseline.sampling}, {candidate.sampling})")
    check_settings(baseline, candidate.settings, between)
    check_suites(baseline, {name: suite.settings for name, suite in candidate.suites.items()}, between)
    for name, suite in baseline.suites.items():
        first, second = ([(row.id, row.prompt) for row in each.rows or []] for each in (suite, candidate.suites[name]))
        if first != second:
            common = len(set(first) & set(second))
            raise UserError(
                f"{between}: suite {name} has other prompts ({len(first)} and {len(second)}, {common} in both)"
            )


def check_rows(acceptance: Acceptance, name: str) -> None:
    """Raises UserError for a file without counts by prompt."""
    if any(suite.rows is None for suite in acceptance.suites.values()):
        raise UserError(
            f"{name}: has no counts by prompt (schema {acceptance.schema_version}), which a paired comparison needs; "
            "measure again with mtpd eval"
        )


def check_trunk(baseline: Acceptance, trunk: str, between: str, *, heads_trunk: str | None = None) -> None:
    """Raises UserError if the baseline was measured with another trunk, unless that is what is compared.

    Args:
        heads_trunk: the trunk that the heads were trained for, where they are measured under another on purpose.
    """
    if baseline.trunk not in (trunk, heads_trunk):
        raise UserError(
            f"{between}: measured with different trunks ({baseline.trunk[:12]}, {trunk[:12]}); "
            "acceptance is comparable on one trunk only"
        )


def check_mode(baseline: Acceptance, mode: str, between: str) -> None:
    """Raises UserError if the baseline was measured in another mode."""
    if baseline.mode != mode:
        raise UserError(f"{between}: measured in different modes ({baseline.mode}, {mode})")


def check_settings(baseline: Acceptance, settings: Settings | None, between: str) -> None:
    """Raises UserError if the baseline was decoded with other settings."""
    _same_settings(baseline.settings, settings, f"{between}: decoding settings differ")


def check_suites(baseline: Acceptance, suites: Mapping[str, Settings | None], between: str) -> None:
    """Raises UserError if other suites, or other settings of one, are compared with a baseline."""
    if baseline.suites.keys() != suites.keys():
        raise UserError(f"{between}: measured on different suites ({', '.join(baseline.suites)}; {', '.join(suites)})")
    for name, suite in baseline.suites.items():
        _same_settings(suite.settings, suites[name], f"{between}: suite {name} differs")


def _same_settings(first: Settings | None, second: Settings | None, message: str) -> None:
    first, second = first or {}, second or {}
    for key in sorted(first.keys() | second.keys()):
        if first.get(key) != second.get(key):
            raise UserError(f"{message}: {key} is {first.get(key)} and {second.get(key)}")
