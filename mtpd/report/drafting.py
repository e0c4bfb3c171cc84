"""Numbers of heads and look-up, together and each alone, for the report's tables, cards and verdict."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from mtpd.evaluate.acceptance import Acceptance, DrafterCounts, PromptCounts, SuiteCounts
from mtpd.evaluate.intervals import Estimate, estimate, paired_differences
from mtpd.evaluate.run_tables import WAYS, ways

SOURCE_NAMES = {"heads": "heads", "lookup": "look-up", "corpus": "trained responses"}
"""Sources of drafts, and what the report calls them."""
DRAFTER_NAMES = {
    "tau": "a chain of heads",
    "tau_lookup": "look-up alone",
    "tau_heads": "heads as a tree",
    "tau_together": "heads and look-up together",
}
"""Ratios of the table of drafters, and whose tau they are."""


@dataclass(frozen=True)
class Way:
    """One way of decoding that was timed."""

    name: str
    tokens_per_second: float
    over_generate: float | None
    over_engine: float | None
    over_before: float | None
    """Over the line before; None on the first."""
    tau: float | None
    used: bool
    """What a user gets."""


def way_lines(suite: SuiteCounts) -> list[Way]:
    """A line for each way of decoding, in the order in which one is built on the other."""
    lines: list[Way] = []
    for name, tokens, seconds, tau in ways(suite):
        rate = tokens / seconds
        plain, engine = (
            rate * each / suite.tokens if each else None for each in (suite.plain_seconds, suite.engine_seconds)
        )
        before = rate / lines[-1].tokens_per_second if lines else None
        lines.append(Way(name, rate, plain, engine, before, tau, name == WAYS["together"]))
    return lines


def as_used(acceptance: Acceptance, *, apart: Collection[str] = (), drafter: str = "together") -> Acceptance | None:
    """A decoded measurement whose seconds are those of a drafter, and no longer those of the chain of all heads.

    Its speed-ups, and their intervals, are then the drafter's. None where the drafter was not timed.
    """
    names = [name for name in acceptance.suites if name not in apart] or list(acceptance.suites)
    total = acceptance.total(names)
    found = (total.drafters or {}).get(drafter)
    timed = all(drafter in (suite.drafters or {}) for suite in acceptance.suites.values())
    if acceptance.mode != "decoded" or found is None or not found.seconds or not timed:
        return None
    # Seconds of as many tokens as the chain wrote: where texts part at a tie, one can be longer.
    share = total.tokens / found.tokens

    def seconds(part: SuiteCounts | PromptCounts) -> float:
        return share * ((part.drafters or {})[drafter].seconds or 0.0)

    suites = {}
    for name, suite in acceptance.suites.items():
        rows = suite.rows and [row.model_copy(update={"seconds": seconds(row)}) for row in suite.rows]
        suites[name] = suite.model_copy(update={"seconds": seconds(suite), "rows": rows})
    return acceptance.model_copy(update={"suites": suites})


def added_by_heads(acceptance: Acceptance, *, apart: Collection[str] = ()) -> Estimate | None:
    """By what share heads raise what look-up alone gives: of tau offline, of tokens/s decoded; on the same prompts."""
    sides: list[Acceptance | None] = [acceptance, acceptance]
    ratios = ["tau_lookup", "tau_together"]
    if acceptance.mode == "decoded":
        sides = [as_used(acceptance, apart=apart, drafter=name) for name in ("lookup", "together")]
        ratios = ["speed_up", "speed_up"]
    rows = [
        {name: suite.rows for name, suite in side.suites.items() if name not in apart and suite.rows}
        for side in sides
        if side is not None
    ]
    if len(rows) < len(sides) or not rows[0] or acceptance.total(rows[0]).drafters is None:
        return None
    without, added = (side[ratio] for side, ratio in zip(paired_differences(*rows)[None], ratios, strict=True))
    change = added / without - 1.0
    return estimate(float(change[0]), change[1:])


def accepted_from(counts: DrafterCounts, source: str) -> tuple[float, list[float]] | None:
    """A source's share of the accepted drafts, and that of each depth; None where nothing was accepted."""
    everything = sum(map(sum, counts.sources.values()))
    own = counts.sources.get(source, [])
    return (sum(own) / everything, [each / everything for each in own]) if everything else None


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th."""
    ending = "th" if number // 10 % 10 == 1 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
