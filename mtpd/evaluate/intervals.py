"""Intervals by the bootstrap over prompts (Efron 1979): prompts are drawn again, with replacement, within each suite.

Every ratio here (CAR, AR, tau, Σ min(p, q), tau of drafters, speed-up) is a function of sums over
prompts. So a resample is a vector of how often each prompt was drawn, all resamples are one matrix product
with the table of counts, and all ratios come from the same resamples. Two measurements of the same prompts
are resampled together, which makes the interval of their difference a paired one.

Drafts of one prompt are alike, so prompts are drawn and not drafts: an interval over drafts would be too
narrow. Each suite has random numbers of its own: its interval does not depend on the others measured.

Legend: N prompts, C columns of counts, R resamples.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mtpd.evaluate.acceptance import Acceptance, PromptCounts, SuiteCounts

Array = NDArray[np.float64]

RESAMPLES = 10_000
DRAFTERS = ("lookup", "heads", "together")
"""Drafters whose tau is estimated, as tau_lookup and so on; see `mtpd.evaluate.drafters`."""
_FURTHER = 3 + 2 * len(DRAFTERS)
"""Columns of `_table` that are not by depth."""
FEWEST = 5
"""Prompts from which on a suite is resampled. Fewer have no interval of their own, one would be of width zero."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A ratio and its interval; the bounds are None where there are no counts by prompt."""

    value: float
    low: float | None = None
    high: float | None = None

    def text(self, digits: int = 3) -> str:
        """0.412 [0.398, 0.427]"""
        if self.low is None or self.high is None:
            return f"{self.value:.{digits}f}"
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def intervals(
    acceptance: Acceptance,
    *,
    apart: Sequence[str] = (),
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> dict[str | None, dict[str, Estimate]]:
    """Each ratio of each suite, and under None those of all suites together, with intervals.

    Args:
        apart: suites that are not summed.

    Returns:
        By suite, then by name of the ratio: car_1.., ar_1.., tau, expected_1.., and where measured tau_together,
        tau_heads, tau_lookup and both speed-ups.
    """
    found: dict[str | None, dict[str, Estimate]] = {}
    summed: dict[str, Array] = {}
    for name, suite in acceptance.suites.items():
        sums = _resampled_sums(name, suite.rows, suite.depth, resamples, seed)
        found[name] = _estimates(suite, sums, confidence)
        if name not in apart:
            summed[name] = sums
    if summed:
        total = acceptance.total(summed)
        if all(map(len, summed.values())):
            sums = np.sum(list(summed.values()), axis=0)
        else:
            # Some suites are too small to draw within them: prompts are drawn from all of them.
            rows = [row for name in summed for row in acceptance.suites[name].rows or []]
            sums = _resampled_sums("", rows, total.depth, resamples, seed)
        found[None] = _estimates(total, sums, confidence)
    return found


def estimate(value: float, spread: Array, confidence: float = CONFIDENCE) -> Estimate:
    """A ratio with the central part of its resamples that has this share of them."""
    if not spread.size:
        return Estimate(value)
    tail = (1.0 - confidence) / 2
    low, high = np.quantile(spread, [tail, 1.0 - tail])
    return Estimate(value, float(low), float(high))


def _estimates(suite: SuiteCounts, sums_RC: Array, confidence: float) -> dict[str, Estimate]:
    point = ratios(_table([suite])[0], suite.depth)
    spread = ratios(sums_RC, suite.depth)
    return {
        name: estimate(float(value), spread[name], confidence) for name, value in point.items() if not np.isnan(value)
    }


def ratios(sums_C: Array, depth: int) -> dict[str, Array]:
    """Ratios from sums whose last axis is the columns of `_table`; NaN where something was not measured."""
    drafted, accepted, expected, expected_rows = (sums_C[..., i * depth : (i + 1) * depth] for i in range(4))
    seconds, plain_seconds, engine_seconds, *of_drafters = (sums_C[..., 4 * depth + i] for i in range(_FURTHER))
    with np.errstate(divide="ignore", invalid="ignore"):
        car = np.where(drafted > 0, accepted / drafted, 0.0)
        before = np.concatenate([np.ones_like(car[..., :1]), car[..., :-1]], axis=-1)
        ar = np.where(before > 0, car / before, 0.0)
        expected = np.where(expected_rows > 0, expected / expected_rows, 0.0) + 0.0 * expected
        further = {"speed_up": plain_seconds / seconds, "speed_up_over_engine": engine_seconds / seconds}
        taus = zip(DRAFTERS, of_drafters[::2], of_drafters[1::2], strict=True)
        further |= {f"tau_{name}": tokens / forwards for name, tokens, forwards in taus}
    found = {f"car_{k + 1}": car[..., k] for k in range(depth)}
    found |= {f"ar_{k + 1}": ar[..., k] for k in range(depth)}
    found |= {"tau": 1.0 + car.sum(axis=-1)}
    found |= {f"expected_{k + 1}": expected[..., k] for k in range(depth)}
    return found | further


def draws(name: str, prompts: int, resamples: int, seed: int) -> Array:
    """Draws prompts: how often each one of a suite is in each resample [R, N]."""
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return generator.multinomial(prompts, np.full(prompts, 1.0 / prompts), size=resamples).astype(np.float64)


def _resampled_sums(name: str, rows: Sequence[PromptCounts] | None, depth: int, resamples: int, seed: int) -> Array:
    """Sums of each resample [R, C]; without resamples where there are too few counts by prompt."""
    if not rows or len(rows) < FEWEST:
        return np.zeros((0, 4 * depth + _FURTHER))
    return draws(name, len(rows), resamples, seed) @ _table(rows)


def _table(rows: Sequence[PromptCounts | SuiteCounts]) -> Array:
    """Counts [N, C], NaN for null.

    Drafted, accepted, expected and expected_rows by depth, then the three seconds, then tokens and passes of each
    drafter.
    """
    missing = [float("nan")] * rows[0].depth
    return np.array(
        [
            [
                *row.drafted,
                *row.accepted,
                *(missing if row.expected is None else row.expected),
                *(missing if row.expected_rows is None else row.expected_rows),
                # Offline nothing is timed: 0 seconds are no measurement.
                row.seconds or float("nan"),
                float("nan") if row.plain_seconds is None else row.plain_seconds,
                float("nan") if row.engine_seconds is None else row.engine_seconds,
                *(count for name in DRAFTERS for count in _passes(row, name)),
            ]
            for row in rows
        ],
        dtype=np.float64,
    )


def _passes(row: PromptCounts | SuiteCounts, drafter: str) -> tuple[float, float]:
    found = (row.drafters or {}).get(drafter)
    return (math.nan, math.nan) if found is None else (found.tokens, found.forwards)


def paired_differences(
    before: Mapping[str, Sequence[PromptCounts]],
    after: Mapping[str, Sequence[PromptCounts]],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str | None, tuple[dict[str, Array], dict[str, Array]]]:
    """Resampled ratios of two measurements of the same prompts, drawn together.

    Args:
        before, after: by suite, rows of the same prompts in the same order.

    Returns:
        By suite, and under None for all together: the ratios of both, [R + 1] each. Entry 0 is what was
        measured, the others are resamples; there are none where a suite has too few prompts.
    """
    found: dict[str | None, tuple[dict[str, Array], dict[str, Array]]] = {}
    depths = [next(iter(side.values()))[0].depth for side in (before, after)]

    def sums(name: str, old: Sequence[PromptCounts], new: Sequence[PromptCounts]) -> list[Array]:
        times = draws(name, len(old), resamples if len(old) >= FEWEST else 0, seed)
        drawn = np.concatenate([np.ones((1, len(old))), times])
        return [drawn @ _table(old), drawn @ _table(new)]

    suites = {name: sums(name, before[name], after[name]) for name in before}
    for name, (first, second) in suites.items():
        found[name] = ratios(first, depths[0]), ratios(second, depths[1])
    totals = [np.sum(sides, axis=0) for sides in zip(*suites.values(), strict=True)] if _all_drawn(before) else None
    if totals is None:
        # Some suites are too small to draw within them: prompts are drawn from all of them.
        everything = [[row for name in before for row in side[name]] for side in (before, after)]
        totals = sums("", *everything)
    found[None] = ratios(totals[0], depths[0]), ratios(totals[1], depths[1])
    return found


def _all_drawn(rows: Mapping[str, Sequence[PromptCounts]]) -> bool:
    return all(len(each) >= FEWEST for each in rows.values())
