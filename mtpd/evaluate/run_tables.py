"""Acceptance as tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from mtpd.evaluate.acceptance import Acceptance, SuiteCounts

TOTAL = "all"


def with_total(acceptance: Acceptance, *, apart: frozenset[str] = frozenset()) -> dict[str, SuiteCounts]:
    """Suites and their sum. Suites named in `apart` (of other families) are listed but not summed."""
    summed = [name for name in acceptance.suites if name not in apart]
    suites = {name: acceptance.suites[name] for name in summed}
    if summed:
        suites[TOTAL] = acceptance.total(summed)
    return {**suites, **{name: acceptance.suites[name] for name in acceptance.suites if name in apart}}


def offline_table(before: Acceptance, after: Acceptance, *, apart: frozenset[str] = frozenset()) -> Table:
    """AR, CAR, tau and expected acceptance by suite, before and after training."""
    table = Table(title="Acceptance offline, greedy text of the trunk (before → after)", title_justify="left")
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
    """Real decoding: tau, tokens/s of plain `generate` and with heads, and whether the text was the same."""
    table = Table(title="Decoded greedily with verification (before → after)", title_justify="left")
    for column in ("suite", "prompts", "CAR after", "tau", "plain tokens/s", "tokens/s", "speed-up", "same text"):
        table.add_column(column, justify="left" if column == "suite" else "right")
    first = with_total(before, apart=apart)
    for name, suite in with_total(after, apart=apart).items():
        table.add_row(
            name,
            str(suite.prompts),
            _short(suite.car),
            f"{first[name].tau:.2f} → {suite.tau:.2f}",
            f"{_rate(suite.tokens, suite.plain_seconds):.1f}",
            f"{_rate(first[name].tokens, first[name].seconds):.1f} → {_rate(suite.tokens, suite.seconds):.1f}",
            f"{first[name].speed_up or 0:.2f}x → {suite.speed_up or 0:.2f}x",
            f"{suite.identical}/{suite.prompts}" + (f", {suite.ties} at a tie" if suite.ties else ""),
            style="bold" if name == TOTAL else None,
        )
    return table


def _short(rates: Sequence[float]) -> str:
    """Rates of all depths in one cell: .45/.31/1.00"""
    return "/".join(f"{rate:.2f}".removeprefix("0") for rate in rates)


def _rate(tokens: int, seconds: float | None) -> float:
    return tokens / seconds if seconds else 0.0
