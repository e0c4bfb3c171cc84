"""Tables that `mtpd eval` and `mtpd compare` print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from mtpd.evaluate.acceptance import Acceptance, SuiteCounts
from mtpd.evaluate.gate import COMPARED, Change, Comparison, label
from mtpd.evaluate.intervals import DRAFTERS, FEWEST, Estimate
from mtpd.evaluate.load import Load
from mtpd.evaluate.run_tables import (
    DECODED_COLUMNS,
    NOT_MEASURED,
    TOTAL,
    from_sources,
    listed,
    rate,
    same_text,
    say_if_random,
    short,
)
from mtpd.evaluate.slices import Slice
from mtpd.evaluate.worst import SliceChange

if TYPE_CHECKING:  # brings in torch
    from mtpd.evaluate.trunk_quality import TrunkQuality

Estimates = Mapping[str | None, Mapping[str, Estimate]]


def suites_table(acceptance: Acceptance, estimates: Estimates) -> Table:
    """One line a suite: acceptance at depth 1, tau, and the control (offline) or the speed-up (decoded)."""
    columns, cells_of = FURTHER[acceptance.mode]
    drafts = f"{acceptance.total().depth} drafts a round"
    title = f"Acceptance {acceptance.mode}, {drafts}{interval_note(estimates)}"
    if acceptance.mode == "decoded":
        title += "; generate is that of transformers, engine is mtpd's own without drafts"
    table = Table(title=title, title_justify="left")
    say_if_random(table, acceptance)
    table.add_column("suite")
    for column in ("prompts", "tau", "CAR_1", *columns):
        table.add_column(column, justify="right")
    for name, found in listed(estimates):
        suite = acceptance.total() if name is None else acceptance.suites[name]
        table.add_row(
            name or TOTAL,
            str(suite.prompts) + (f" ({suite.trained} trained on)" if suite.trained else ""),
            found["tau"].text(),
            found["car_1"].text(),
            *cells_of(suite, found),
            style="bold" if name is None else None,
        )
    return table


def interval_note(estimates: Estimates) -> str:
    """Words a title's note on intervals: which estimates have one depends on the number of prompts."""
    have = [found["tau"].low is not None for found in estimates.values()]
    if not any(have):
        return ""
    where = "" if all(have) else f", where there are {FEWEST} prompts or more"
    return f" (95% intervals over prompts{where})"


def _offline_cells(suite: SuiteCounts, found: Mapping[str, Estimate]) -> list[str]:
    control = f"{suite.control.car[0]:.3f}" if suite.control is not None else ""
    return [found["expected_1"].text() if "expected_1" in found else "", control]


def _decoded_cells(suite: SuiteCounts, found: Mapping[str, Estimate]) -> list[str]:
    seconds = (suite.plain_seconds, suite.engine_seconds, suite.seconds)
    speed_ups = [
        found[name].text(2) if name in found else NOT_MEASURED for name in ("speed_up", "speed_up_over_engine")
    ]
    return [*(rate(suite.tokens, each) for each in seconds), *speed_ups, same_text(suite)]


def _served_cells(suite: SuiteCounts, found: Mapping[str, Estimate]) -> list[str]:
    return [NOT_MEASURED if suite.identical is None else same_text(suite)]


FURTHER = {
    "offline": (("Σ min(p,q)_1", "control CAR_1"), _offline_cells),
    "decoded": (DECODED_COLUMNS, _decoded_cells),
    "served": (("same text as without drafts",), _served_cells),
}
"""By mode, further columns of a table of suites, and what gives their cells."""


def loads_table(loads: Sequence[Load]) -> Table:
    """Speeds of a server by requests at a time, and how many drafts a round would be fastest."""
    title = "Speed of the server; tau by its own count of all rounds, fewer drafts estimated from both speeds"
    table = Table(title=title, title_justify="left")
    for column in ("at a time", "tokens/s", "tau", "without drafts", "speed-up", "fastest"):
        table.add_column(column, justify="right")
    for load in loads:
        plain, depth = load.plain_speed, len(load.accepted)
        cells = [NOT_MEASURED] * 3
        if plain is not None:
            speeds = [load.speed_with(drafts) or 0.0 for drafts in range(depth + 1)]
            best = max(range(depth + 1), key=lambda drafts: speeds[drafts])
            cells = [f"{plain:.1f}", f"{load.speed / plain:.2f}x", f"{best} drafts, {speeds[best]:.1f} tokens/s"]
        table.add_row(str(load.concurrency), f"{load.speed:.1f}", f"{load.tau:.3f}", *cells)
    return table


def depths_table(acceptance: Acceptance, estimates: Estimates) -> Table:
    """One line a depth, over all suites."""
    total, found = acceptance.total(), estimates[None]
    table = Table(title="All suites by depth", title_justify="left")
    say_if_random(table, acceptance)
    for column in ("depth", "AR", "CAR", "Σ min(p,q)", "control CAR"):
        table.add_column(column, justify="right")
    for k in range(1, total.depth + 1):
        expected = found.get(f"expected_{k}")
        table.add_row(
            str(k),
            found[f"ar_{k}"].text(),
            found[f"car_{k}"].text(),
            expected.text() if expected else "",
            f"{total.control.car[k - 1]:.3f}" if total.control else "",
        )
    return table


def drafters_table(acceptance: Acceptance, estimates: Estimates) -> Table:
    """One line a suite: tau of heads and look-up, each alone and together, and what the accepted drafts came from."""
    table = Table(title=f"Tau of what drafts{interval_note(estimates)}", title_justify="left")
    say_if_random(table, acceptance)
    table.add_column("suite")
    for column in ("look-up alone", "heads alone", "together", "accepted from heads, look-up"):
        table.add_column(column, justify="right")
    for name, found in listed(estimates):
        suite = acceptance.total() if name is None else acceptance.suites[name]
        if suite.drafters is None:
            continue
        table.add_row(
            name or TOTAL,
            *(found[f"tau_{each}"].text() if f"tau_{each}" in found else "" for each in DRAFTERS),
            from_sources(suite.drafters["together"]),
            style="bold" if name is None else None,
        )
    return table


def comparison_table(comparison: Comparison) -> Table:
    """CAR_1, tau and speed-ups of each suite before and after, and by how much they changed."""
    measured = any(changes["tau"].change.low is not None for changes in comparison.suites.values())
    title = "Change on the same prompts" + (" (95% intervals, paired)" if measured else "")
    table = Table(title=title, title_justify="left")
    table.add_column("suite")
    names = [name for name in COMPARED if name in comparison.suites[None]]
    for column in ("prompts", *(label(name) for name in names)):
        table.add_column(column, justify="right")
    for name, changes in listed(comparison.suites):
        cells = [_cell(changes[ratio]) for ratio in names]
        table.add_row(name or TOTAL, str(comparison.prompts[name]), *cells, style="bold" if name is None else None)
    return table


def changes_table(changes: Sequence[SliceChange]) -> Table:
    """Tau of each slice before and after."""
    table = Table(title="Change of tau in each slice (95% intervals, paired)", title_justify="left")
    for column in ("by", "slice", "prompts", "tau"):
        table.add_column(column, justify="left" if column in ("by", "slice") else "right")
    for each in changes:
        table.add_row(each.axis, each.name, str(each.prompts), each.shown().removeprefix("tau "))
    return table


def slices_table(found: Sequence[Slice]) -> Table:
    """One line a slice: tau and CAR_1 with intervals, and AR at all depths."""
    title = "Acceptance by slice (95% intervals over prompts); position and context are tokens before a round"
    table = Table(title=title, title_justify="left")
    for column in ("by", "slice", "prompts", "rounds", "tau", "CAR_1", "AR"):
        table.add_column(column, justify="left" if column in ("by", "slice") else "right")
    for each in found:
        ratios = each.ratios()
        ar = [ratio.value for name, ratio in ratios.items() if name.startswith("ar_")]
        cells = (str(each.prompts), f"{each.rounds}", ratios["tau"].text(), ratios["car_1"].text(), short(ar))
        table.add_row(each.axis, each.name, *cells)
    return table


def _cell(change: Change) -> str:
    return f"{change.before:.3f} → {change.after:.3f}  {change.shown()}"


def quality_table(quality: Mapping[str, tuple[TrunkQuality, TrunkQuality]]) -> Table:
    """The main head before and after the run."""
    table = Table(title="Main head, before → after the run", title_justify="left")
    for column in ("suite", "tokens", "perplexity", "exact match"):
        table.add_column(column, justify="left" if column == "suite" else "right")
    for name, (before, after) in quality.items():
        match = "" if before.score is None or after.score is None else f"{before.score:.3f} → {after.score:.3f}"
        table.add_row(name, str(before.tokens), f"{before.perplexity:.4f} → {after.perplexity:.4f}", match)
    return table
