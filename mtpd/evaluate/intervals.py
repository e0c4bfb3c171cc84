"""Intervals by the bootstrap over prompts (Efron 1979): prompts are drawn again, with replacement, within each suite.

Every ratio here (CAR, AR, tau, Σ min(p, q), speed-up) is a function of sums over prompts. So a resample is
a vector of how often each prompt was drawn, all resamples are one matrix product with the table of
counts, and all ratios come from the same resamples. Two measurements of the same prompts are resampled
together, which makes the interval of their difference a paired one.

Drafts of one prompt are alike, so prompts are drawn and not drafts: an interval over drafts would be too
narrow. Each suite has random numbers of its own: its interval does not depend on the others measured.

Legend: N prompts, C columns of counts, R resamples.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mtpd.evaluate.acceptance import Acceptance, PromptCounts, SuiteCounts

Array = NDArray[np.float64]

RESAMPLES = 10_000
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
        By suite, then by name of the ratio: car_1.., ar_1.., tau, expected_1.. and speedup where measured.
    """
    found: dict[str | None, dict[str, Estimate]] = {}
    summed: list[Array] = []
    for name, suite in acceptance.suites.items():
        sums = _resampled_sums(name, suite, resamples, seed)
        found[name] = _estimates(suite, sums, confidence)
        if name not in apart:
            summed.append(sums)
    together = [name for name in acceptance.suites if name not in apart]
    if together:
        found[None] = _estimates(acceptance.total(together), np.sum(summed, axis=0), confidence)
    return found


def bounds(values: Array, confidence: float) -> tuple[float, float]:
    """The central part of the values that has this share of them."""
    tail = (1.0 - confidence) / 2
    low, high = np.quantile(values, [tail, 1.0 - tail])
    return float(low), float(high)


def _estimates(suite: SuiteCounts, sums_RC: Array, confidence: float) -> dict[str, Estimate]:
    point = ratios(_table([suite])[0], suite.depth)
    spread = ratios(sums_RC, suite.depth)
    estimates = {}
    for name, value in point.items():
        if np.isnan(value):
            continue
        low, high = bounds(spread[name], confidence) if sums_RC.size else (None, None)
        estimates[name] = Estimate(float(value), low, high)
    return estimates


def ratios(sums_C: Array, depth: int) -> dict[str, Array]:
    """Ratios from sums whose last axis is the columns of `_table`; NaN where something was not measured."""
    drafted, accepted, expected, expected_rows = (sums_C[..., i * depth : (i + 1) * depth] for i in range(4))
    seconds, plain_seconds = sums_C[..., 4 * depth], sums_C[..., 4 * depth + 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        car = np.where(drafted > 0, accepted / drafted, 0.0)
        before = np.concatenate([np.ones_like(car[..., :1]), car[..., :-1]], axis=-1)
        ar = np.where(before > 0, car / before, 0.0)
        expected = np.where(expected_rows > 0, expected / expected_rows, 0.0) + 0.0 * expected
        speedup = plain_seconds / seconds
    found = {f"car_{k + 1}": car[..., k] for k in range(depth)}
    found |= {f"ar_{k + 1}": ar[..., k] for k in range(depth)}
    found |= {"tau": 1.0 + car.sum(axis=-1)}
    found |= {f"expected_{k + 1}": expected[..., k] for k in range(depth)}
    return found | {"speedup": speedup}


def draws(name: str, prompts: int, resamples: int, seed: int) -> Array:
    """How often each prompt of a suite is drawn in each resample [R, N]."""
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return generator.multinomial(prompts, np.full(prompts, 1.0 / prompts), size=resamples).astype(np.float64)


def _resampled_sums(name: str, suite: SuiteCounts, resamples: int, seed: int) -> Array:
    """Sums of each resample [R, C]; without resamples where there are no counts by prompt."""
    if not suite.rows:
        return np.zeros((0, 4 * suite.depth + 2))
    return draws(name, len(suite.rows), resamples, seed) @ _table(suite.rows)


def _table(rows: Sequence[PromptCounts | SuiteCounts]) -> Array:
    """Counts [N, C]: drafted, accepted, expected, expected_rows by depth, seconds, plain_seconds; NaN for null."""
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
            ]
            for row in rows
        ],
        dtype=np.float64,
    )


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
        measured, the others are resamples.
    """
    found: dict[str | None, tuple[dict[str, Array], dict[str, Array]]] = {}
    totals: list[list[Array]] = [[], []]
    depths = [next(iter(side.values()))[0].depth for side in (before, after)]
    for name in before:
        drawn = draws(name, len(before[name]), resamples, seed)
        drawn = np.concatenate([np.ones((1, drawn.shape[1])), drawn])
        sums = [drawn @ _table(side[name]) for side in (before, after)]
        for total, each in zip(totals, sums, strict=True):
            total.append(each)
        found[name] = (ratios(sums[0], depths[0]), ratios(sums[1], depths[1]))
    first, second = (np.sum(total, axis=0) for total in totals)
    found[None] = (ratios(first, depths[0]), ratios(second, depths[1]))
    return found
