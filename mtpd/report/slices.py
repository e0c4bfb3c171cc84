"""Charts of slices: acceptance by where a round was, and by suite and depth."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from markupsafe import Markup

from mtpd.evaluate.acceptance import Acceptance
from mtpd.evaluate.intervals import Estimate
from mtpd.evaluate.slices import has_places, slices
from mtpd.report import svg

TITLES = {
    "position": ("CAR by position in the response", "tokens of the response before the round"),
    "context": ("CAR by position in the context", "tokens of prompt and response before the round"),
}
MOST_LINES = 5
"""Depths in one chart; of more heads these are 1, 2, 4, 8 and so on."""

Chart = tuple[str, list[tuple[int, str]], Markup]
"""Title, lines (number of the style, name), and picture."""


def places_charts(acceptance: Acceptance, *, apart: Collection[str] = ()) -> list[Chart]:
    """CAR by position with bands of 95%, a line for each depth; none for files without counts by position.

    Args:
        apart: suites that are not summed.
    """
    summed = {name: suite for name, suite in acceptance.suites.items() if name not in apart}
    chosen = acceptance.model_copy(update={"suites": summed})
    if not summed or any(suite.rows is None for suite in summed.values()) or not has_places(chosen):
        return []
    depth = chosen.total().depth
    depths = [k for k in range(1, depth + 1) if depth <= MOST_LINES or k & (k - 1) == 0]
    charts = []
    for axis, (title, x_label) in TITLES.items():
        found = [(each.name, each.ratios()) for each in slices(chosen, [axis])]
        if len(found) < 2:
            continue
        series = [
            svg.Series(
                f"depth {k}",
                [svg.Point(float(place), ratios[f"car_{k}"]) for place, (_, ratios) in enumerate(found)],
                style,
                band=True,
            )
            for style, k in enumerate(depths, start=1)
        ]
        picture = svg.line_chart(
            series,
            title=title,
            x_label=x_label,
            y_label="CAR_k",
            x_ticks=list(map(float, range(len(found)))),
            x_names=[name for name, _ in found],
            y_low=0.0,
        )
        charts.append((title, [(each.style, each.name) for each in series], Markup(picture)))
    return charts


def suites_by_depth(found: Mapping[str | None, Mapping[str, Estimate]], suites: Sequence[str], depth: int) -> str:
    """AR of each suite at each depth, as a heat map."""
    rows = [(name, [found[name][f"ar_{k}"] for k in range(1, depth + 1)]) for name in suites]
    columns = [str(k) for k in range(1, depth + 1)]
    return svg.heat_map(rows, columns=columns, title="AR by suite and depth", x_label="depth k")
