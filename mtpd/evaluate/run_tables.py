"""Acceptance as tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from rich.table import Table

from mtpd.evaluate.acceptance import RANDOM, Acceptance, DrafterCounts, SuiteCounts

Item = TypeVar("Item")

TOTAL = "all"
NOT_MEASURED = "–"
WAYS = {
    "plain": "transformers' generate",
    "engine": "this engine, no drafts",
    "lookup": "look-up alone",
    "chain": "a chain of all heads",
    "heads": "heads alone",
    "together": "heads and look-up together",
}
"""Ways of decoding, in the order of tables."""
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
    """Lists the rows of a table: each suite, and None, their sum, where it does not repeat the only one."""
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
            short(suite.ar),
            short(suite.expected_acceptance or []),
            f"{first[name].tau:.2f} → {suite.tau:.2f}",
            style="bold" if name == TOTAL else None,
        )
    return table


def drafters_table(acceptance: Acceptance, *, apart: frozenset[str] = frozenset()) -> Table:
    """Tau of heads and look-up, each alone and together, and where the accepted drafts came from."""
    suites = {name: each for name, each in with_total(acceptance, apart=apart).items() if each.drafters}
    nodes = max((each.nodes or 0 for suite in suites.values() for each in (suite.drafters or {}).values()), default=0)
    title = f"Tau of what drafts, up to {nodes} drafts a round in one tree (no decoding; equal on every machine)"
    table = Table(title=title, title_justify="left")
    say_if_random(table, acceptance)
    columns = ("prompts", "chain of heads", "look-up alone", "heads alone", "together", "accepted from heads, look-up")
    table.add_column("suite")
    for column in columns:
        table.add_column(column, justify="right")
    for name, suite in suites.items():
        found = suite.drafters or {}
        table.add_row(
            name,
            str(suite.prompts),
            f"{suite.tau:.2f}",
            *(f"{found[each].tau:.2f}" for each in ("lookup", "heads", "together")),
            from_sources(found["together"]),
            style="bold" if name == TOTAL else None,
        )
    return table


def from_sources(counts: DrafterCounts) -> str:
    """Shares of the accepted drafts: heads 62%, lookup 38%"""
    sums = {source: sum(each) for source, each in counts.sources.items()}
    return ", ".join(f"{source} {100 * each / sum(sums.values()):.0f}%" for source, each in sorted(sums.items()))


def decoded_table(acceptance: Acceptance, *, apart: frozenset[str] = frozenset()) -> Table:
    """One line a way of decoding: tokens/s, tau, and what each adds to the one before."""
    total = acceptance.total([name for name in acceptance.suites if name not in apart] or None)
    title = (
        f"Decoded greedily, {total.prompts} prompts, {(acceptance.settings or {}).get('dtype')}: what each part brings"
    )
    table = Table(title=title, title_justify="left")
    say_if_random(table, acceptance)
    for column in ("decoded by", "tokens/s", "over generate", "over the engine", "over the line before", "tau"):
        table.add_column(column, justify="left" if column == "decoded by" else "right")
    before: float | None = None
    baselines = (total.plain_seconds, total.engine_seconds)
    for name, tokens, seconds, tau in ways(total):
        rate = tokens / seconds
        table.add_row(
            name,
            f"{rate:.1f}",
            *(f"{rate * each / total.tokens:.2f}x" if each else NOT_MEASURED for each in baselines),
            "" if before is None else f"{rate / before:.2f}x",
            "" if tau is None else f"{tau:.2f}",
            style="bold" if name == WAYS["together"] else None,
        )
        before = rate
    said = [table.caption] if isinstance(table.caption, str) else []
    table.caption, table.caption_justify = "\n".join([f"same text as generate: {same_text(total)}", *said]), "left"
    return table


def ways(suite: SuiteCounts) -> list[tuple[str, int, float, float | None]]:
    """Name, tokens, seconds and tau of each way of decoding that was timed, in the order of tables."""
    found: list[tuple[str, int, float | None, float | None]] = [
        (WAYS["plain"], suite.tokens, suite.plain_seconds, None),
        (WAYS["engine"], suite.tokens, suite.engine_seconds, 1.0),
    ]
    if not suite.drafters:
        found.append((WAYS["chain"], suite.tokens, suite.seconds, suite.tau))
    for name, each in (suite.drafters or {}).items():
        found.append((WAYS[name], each.tokens, each.seconds, each.tau))
    order = list(WAYS.values())
    timed = [(name, tokens, seconds, tau) for name, tokens, seconds, tau in found if seconds]
    return sorted(timed, key=lambda each: order.index(each[0]))


def short(rates: Sequence[float]) -> str:
    """Rates of all depths in one cell: .45/.31/1.00"""
    return "/".join(f"{rate:.2f}".removeprefix("0") for rate in rates)


def rate(tokens: int, seconds: float | None) -> str:
    """Tokens/s, or a dash where nothing was timed."""
    return f"{tokens / seconds:.1f}" if seconds else NOT_MEASURED


def same_text(suite: SuiteCounts) -> str:
    """In how many prompts the text was that of `generate`, and how many of the others part from it at a tie."""
    ties = f", {suite.ties} tie{'s' * (suite.ties > 1)}" if suite.ties else ""
    return f"{suite.identical}/{suite.prompts}{ties}"


def say_if_random(table: Table, acceptance: Acceptance) -> None:
    """Says under a table that its model is random, if it is."""
    if acceptance.random_trunk:
        table.caption, table.caption_justify = RANDOM, "left"
