"""Acceptance as tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from rich.table import Table

from mtpd.evaluate.acceptance import RANDOM, Acceptance, SuiteCounts

Item = TypeVar("Item")

TOTAL = "all"
NOT_MEASURED = "–"
DECODED_COLUMNS = (
    "generate tokens/s",
    "engine tokens/s",
    "tokens/s",
    "speed-up over generate",
    "speed-up over engine",
    "same text",
)
"""Both baselines stand beside each other: a speed-up over `generate` counts the slower loop of transformers in."""


def with_total(acceptance: Acceptance, *, apart: frozenset[str] = frozenset()) -> dict[str, SuiteCounts]:
    """Suites and their sum, if it is one of several. Those in `apart` (of other families) are listed, not summed."""
    summed = [name for name in acceptance.suites if name not in apart]
    suites = {name: acceptance.suites[name] for name in summed}
    if len(summed) > 1:
        suites[TOTAL] = acceptance.total(summed)
    return {**suites, **{name: acceptance.suites[name] for name in acceptance.suites if name in apart}}


def listed(found: Mapping[str | None, Item]) -> list[tuple[str | None, Item]]:
    """What a table has a row for: each suite, and None, their sum, where it does not repeat the only one."""
    return [(name, each) for name, each in found.items() if name is not None or len(found) != 2]


def offline_table(before: Acceptance, after: Acceptance, *, apart: frozenset[str] = frozenset()) -> Table:
    """AR, CAR, tau and expected acceptance by suite, before and after training."""
    table = Table(title="Acceptance offline, greedy text of the trunk (before → after)", title_justify="left")
    say_if_random(table, after)
    depth = len(next(iter(after.suites.values())).drafted)
    table.add_column("suite")
    table.add_column("prompts", justify="right")
    for k in range(1, depth + 1):
        table.add_column(f"CAR_{k}", justify="right")
    table.add_column("AR after", justify="right")
    table.add_column("Σ min(p,q) after", justify="right")
    table.add_column("tau", justify="right")
    first = with_total(before, apart=apart)
    for name, suite in with_total(after, apart=apart).items():
        cells = [f"{a:.2f} → {b:.2f}" for a, b in zip(first[name].car, suite.car, strict=True)]
        table.add_row(
            name,
            str(suite.prompts),
            *cells,
            _short(suite.ar),
            _short(suite.expected_acceptance or []),
            f"{first[name].tau:.2f} → {suite.tau:.2f}",
            style="bold" if name == TOTAL else None,
        )
    return table


def decoded_table(before: Acceptance, after: Acceptance, *, apart: frozenset[str] = frozenset()) -> Table:
    """Real decoding: tau, tokens/s of both baselines and with heads, and whether the text was the same."""
    title = (
        f"Decoded greedily with verification, {after.total().depth} drafts a round (before → after; generate is that "
        "of transformers, engine is mtpd's own without drafts)"
    )
    table = Table(title=title, title_justify="left")
    say_if_random(table, after)
    for column in ("suite", "prompts", "CAR after", "tau", *DECODED_COLUMNS):
        table.add_column(column.replace(" ", "\n"), justify="left" if column == "suite" else "right")
    first = with_total(before, apart=apart)
    for name, suite in with_total(after, apart=apart).items():
        table.add_row(
            name,
            str(suite.prompts),
            _short(suite.car),
            f"{first[name].tau:.2f} → {suite.tau:.2f}",
            rate(suite.tokens, suite.plain_seconds),
            rate(suite.tokens, suite.engine_seconds),
            f"{rate(first[name].tokens, first[name].seconds)} → {rate(suite.tokens, suite.seconds)}",
            _times(first[name].speed_up, suite.speed_up),
            _times(first[name].speed_up_over_engine, suite.speed_up_over_engine),
            same_text(suite),
            style="bold" if name == TOTAL else None,
        )
    return table


def _short(rates: Sequence[float]) -> str:
    """Rates of all depths in one cell: .45/.31/1.00"""
    return "/".join(f"{rate:.2f}".removeprefix("0") for rate in rates)


def rate(tokens: int, seconds: float | None) -> str:
    """Tokens/s, or a dash where nothing was timed."""
    return f"{tokens / seconds:.1f}" if seconds else NOT_MEASURED


def same_text(suite: SuiteCounts) -> str:
    """In how many prompts the text was that of `generate`, and how many of the others part from it at a tie."""
    ties = f", {suite.ties} tie{'s' * (suite.ties > 1)}" if suite.ties else ""
    return f"{suite.identical}/{suite.prompts}{ties}"


def _times(before: float | None, after: float | None) -> str:
    """A speed-up before and after, in a cell narrow enough for a table of both baselines to fit into 132 columns."""
    return f"{before:.2f} → {after:.2f}x" if before is not None and after is not None else NOT_MEASURED


def say_if_random(table: Table, acceptance: Acceptance) -> None:
    """Says under a table that its model is random, if it is."""
    if acceptance.random_trunk:
        table.caption, table.caption_justify = RANDOM, "left"
