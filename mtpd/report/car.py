"""CAR by depth, before and after: the chart of the report, and the same for each suite as a picture beside the run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from html import escape
from pathlib import Path

from mtpd.evaluate.acceptance import Acceptance
from mtpd.evaluate.intervals import Estimate, intervals
from mtpd.evaluate.run_tables import TOTAL
from mtpd.files import write_whole
from mtpd.report import svg

WIDE, TALL = 860.0, 280.0
"""Size of the chart over all suites, at the top of the picture."""
COLUMNS, PANEL = 3, 190.0
"""Charts of single suites in a row, and how tall each is."""
HEADER, NAME = 66.0, 22.0

Estimates = Mapping[str | None, Mapping[str, Estimate]]


def write_car(path: Path, run: str, sides: Mapping[str, Acceptance], *, apart: Sequence[str] = ()) -> None:
    """Writes an SVG file: CAR by depth over all suites with 95% intervals, and a small chart of each suite.

    Args:
        run: name of the run, the title.
        sides: one or two measurements by name, such as before and after training; the last one is the run's.
        apart: suites that are not summed.
    """
    found = {name: intervals(side, apart=apart) for name, side in sides.items()}
    last = list(sides.values())[-1]
    summed = [suite for suite in last.suites if suite not in apart]
    prompts = last.total(summed).prompts if summed else 0
    suites = [suite for suite in last.suites if any(suite in side for side in found.values())]
    panels = suites if len(suites) > 1 else []
    rows = -(-len(panels) // COLUMNS)
    height = HEADER + NAME + TALL + rows * (NAME + PANEL) + 8
    title = f"{run}: CAR by depth"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE:.0f} {height:.0f}" width="{WIDE:.0f}" '
        f'height="{height:.0f}" role="img" aria-label="{escape(title)}"><style>{svg.STYLE}</style>',
        '<rect class="back" width="100%" height="100%"/>',
        f'<text class="title" x="14" y="26">{escape(title)}</text>',
        f'<text class="label" x="14" y="46">{last.mode}, {prompts} prompts; CAR_k is the share of rounds whose first '
        "k drafts were all accepted; bars are 95% intervals</text>",
        *_legend(list(sides)),
        _named(14, HEADER + 14, _with_tau(None, found)),
        car_chart(found, None, size=(WIDE - 22, TALL), place=(8, HEADER + NAME)),
    ]
    wide = WIDE / COLUMNS
    high = highest(found)
    for number, suite in enumerate(panels):
        x, y = number % COLUMNS * wide, HEADER + NAME + TALL + number // COLUMNS * (NAME + PANEL)
        parts.append(_named(x + 14, y + 14, _with_tau(suite, found)))
        parts.append(car_chart(found, suite, size=(wide - 16, PANEL), place=(x + 8, y + NAME), y_high=high))
    write_whole(path, "".join(parts) + "</svg>\n")


def car_chart(
    sides: Mapping[str, Estimates],
    suite: str | None,
    *,
    size: tuple[float, float] = (svg.WIDTH, svg.HEIGHT),
    place: tuple[float, float] | None = None,
    y_high: float | None = None,
) -> str:
    """CAR by depth of one suite, or of all together (None), with a line for each side that has it."""
    series = [
        svg.Series(name, by_depth(sides[name][suite], "car"), style)
        for style, name in styled(sides)
        if suite in sides[name]
    ]
    return svg.line_chart(
        series,
        title=f"CAR by depth, {suite or TOTAL}",
        x_label="depth k",
        y_label="CAR_k",
        x_ticks=sorted({point.x for each in series for point in each.points}),
        y_low=0.0,
        y_high=y_high,
        width=size[0],
        height=size[1],
        place=place,
    )


def by_depth(found: Mapping[str, Estimate], ratio: str) -> list[svg.Point]:
    """A ratio's estimates, over their depths."""
    return [
        svg.Point(float(name.removeprefix(f"{ratio}_")), estimate)
        for name, estimate in found.items()
        if name.startswith(f"{ratio}_")
    ]


def styled(names: Collection[str]) -> list[tuple[int, str]]:
    """Sides with the number of their style: the run's is 1, and a baseline before it has 0."""
    return list(enumerate(names, start=2 - len(names)))


def highest(sides: Mapping[str, Estimates]) -> float:
    """The top of the suites' common axis."""
    return max(
        (
            estimate.value if estimate.high is None else estimate.high
            for estimates in sides.values()
            for suite, found in estimates.items()
            for name, estimate in found.items()
            if suite is not None and name.startswith("car_")
        ),
        default=1.0,
    )


def _with_tau(suite: str | None, sides: Mapping[str, Estimates]) -> str:
    taus = [f"{estimates[suite]['tau'].value:.2f}" for estimates in sides.values() if suite in estimates]
    return f"{TOTAL if suite is None else suite}: tau {' → '.join(taus)}"


def _named(x: float, y: float, text: str) -> str:
    return f'<text class="name" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _legend(names: Sequence[str]) -> list[str]:
    parts, x = [], WIDE - 14.0
    for style, name in reversed(styled(names)):
        x -= 7.0 * len(name)
        parts.append(f'<text class="label" x="{x:.1f}" y="26">{escape(name)}</text>')
        x -= 38
        parts.append(svg.swatch(style, place=(x, 16)))
        x -= 16
    return parts
