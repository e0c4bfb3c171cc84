"""Charts as SVG, inside of a page or files of their own, whose colours follow light and dark mode.

Lines differ in dashes and marks as well as in colour, so that a chart can be read in grey.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from mtpd.evaluate.intervals import Estimate

WIDTH, HEIGHT = 420.0, 260.0
RIGHT, TOP, BOTTOM = 14.0, 12.0, 40.0
ROW = 34.0
"""Height of one line of a dot chart."""
MOST_POINTS = 400
"""A longer curve is thinned: more points than pixels show nothing."""
DARKEST = 0.6
"""Opacity of a cell of a heat map whose share is 1: the number in it has to be read."""
FEW_MARKS = 5
"""Marks on a line that does not mark each of its points: enough to tell it from the others."""
COLOURS = 6
"""Colours besides the baseline's grey; a further line has one of them again, with other dashes."""
DASHES = ("5 4", "", "9 4", "2 3", "9 3 2 3")
MARKS = ("square", "circle", "triangle", "diamond", "ring")

STYLE = """
:root {
  --card: #ffffff; --ink: #16191d; --soft: #5b6470; --line: #dfe3e8;
  --c0: #747d88; --c1: #2456c8; --c2: #b45309; --c3: #0f766e; --c4: #9333ea; --c5: #be123c; --c6: #4d7c0f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --card: #1a1f25; --ink: #e9edf2; --soft: #9aa5b1; --line: #2d343d;
    --c0: #8792a0; --c1: #7da6ff; --c2: #f0a95b; --c3: #4fd1c5; --c4: #c79bff; --c5: #ff8fa3; --c6: #a3d65c;
  }
}
svg text { fill: var(--soft); font-size: 12px; font-family: system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
svg .name { fill: var(--ink); } svg .title { fill: var(--ink); font-size: 17px; font-weight: 650; }
svg .grid { stroke: var(--line); stroke-width: 1; } svg .back { fill: var(--card); }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.bar { stroke-width: 2; stroke-linecap: round; opacity: .55; }
.ring { stroke-width: 2; }
""" + "".join(
    f".s{n} .line, .s{n} .bar, .s{n} .ring {{ stroke: var(--c{n}); }} .s{n} .dot {{ fill: var(--c{n}); }} "
    f".s{n} .ring {{ fill: var(--card); }}\n"
    for n in range(COLOURS + 1)
)
"""Stylesheet of charts; a page with charts has it once."""


@dataclass(frozen=True)
class Point:
    """One value of a series, with its interval where it has one."""

    x: float
    estimate: Estimate


@dataclass(frozen=True)
class Series:
    """Points of one kind."""

    name: str
    points: Sequence[Point]
    style: int
    """Number of its colour, dashes and marks; 0 is the baseline."""
    marks: bool = True
    """Marks each point, not a few of them."""
    band: bool = False
    """Draws intervals as a band around the line, not as a bar at each point."""


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[float] | None = None,
    x_names: Sequence[str] = (),
    y_low: float | None = None,
    y_high: float | None = None,
    width: float = WIDTH,
    height: float = HEIGHT,
    place: tuple[float, float] | None = None,
) -> str:
    """Lines over x with error bars where points have intervals.

    Args:
        x_names: what stands under the ticks in place of their numbers.
        place: x and y of the chart where it is a part of another one.
    """
    points = [point for each in series for point in each.points]
    xs = [point.x for point in points] or [0.0, 1.0]
    lows = [value for point in points for value in _span(point.estimate)] or [0.0, 1.0]
    bottom, top, y_ticks = _nice(min(lows) if y_low is None else y_low, max(lows) if y_high is None else y_high)
    left, right = min(xs), max(xs)
    if x_ticks is None:
        _, _, x_ticks = _nice(left, right)
        x_ticks = [tick for tick in x_ticks if left <= tick <= right]
    elif len(x_ticks) > 1:
        pad = (right - left) * 0.06
        left, right = left - pad, right + pad
    start = 26.0 + 6.6 * max(len(_number(tick)) for tick in y_ticks)
    across = _scale(left, right, start, width - RIGHT)
    up = _scale(bottom, top, height - BOTTOM, TOP)
    parts = [_open(height, title, width=width, place=place)]
    for tick in y_ticks:
        y = up(tick)
        parts.append(f'<line class="grid" x1="{start:.1f}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(start - 6, y + 4, _number(tick), "end"))
    for tick, name in zip(x_ticks, x_names or map(_number, x_ticks), strict=True):
        parts.append(_text(across(tick), height - BOTTOM + 16, name, "middle"))
    parts.append(_text((start + width - RIGHT) / 2, height - 6, x_label, "middle"))
    parts.append(
        f'<text class="label" text-anchor="middle" transform="translate(11 {(TOP + height - BOTTOM) / 2:.1f}) '
        f'rotate(-90)">{escape(y_label)}</text>'
    )
    for offset, each in zip(_offsets(len(series)), series, strict=True):
        shift = offset if not each.band and any(point.estimate.low is not None for point in each.points) else 0.0
        parts += _series(each, across, up, shift)
    return "".join(parts) + "</svg>"


def _series(series: Series, across: _Scale, up: _Scale, shift: float) -> list[str]:
    chosen = series.points[:: math.ceil(len(series.points) / MOST_POINTS) or 1]
    places = [(across(point.x) + shift, up(point.estimate.value), point) for point in chosen]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
    parts = [f'<g class="{_colour(series.style)}"><polyline class="line"{_dashes(series.style)} points="{path}"/>']
    if series.band:
        parts.append(_band(places, up))
    # Neighbouring lines have their marks at different points.
    apart = 1 if series.marks else max(1, len(places) // FEW_MARKS)
    for number, (x, y, point) in enumerate(places):
        if not series.band and point.estimate.low is not None and point.estimate.high is not None:
            low, high = up(point.estimate.low), up(point.estimate.high)
            parts.append(f'<line class="bar" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
        if (number + series.style) % apart == 0:
            parts.append(_mark(series.style, x, y, f"{series.name}, {_number(point.x)}: {point.estimate.text()}"))
    return [*parts, "</g>"]


def _band(places: Sequence[tuple[float, float, Point]], up: _Scale) -> str:
    """The area between the ends of intervals; a point without one is of no width."""
    ends = [(x, _span(point.estimate)) for x, _, point in places]
    corners = [(x, up(max(span))) for x, span in ends] + [(x, up(min(span))) for x, span in reversed(ends)]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    return f'<polygon class="dot band" fill-opacity="0.16" points="{points}"/>'


def heat_map(
    rows: Sequence[tuple[str, Sequence[Estimate]]], *, columns: Sequence[str], title: str, x_label: str
) -> str:
    """A cell for each row and column, the darker the nearer its share is to 1, with the number in it."""
    step = 26.0
    left = 22.0 + 7.2 * min(20, max((len(name) for name, _ in rows), default=1))
    wide = (WIDTH - RIGHT - left) / max(1, len(columns))
    height = TOP + step * len(rows) + BOTTOM
    drawn = [_open(height, title)]
    for number, (name, found) in enumerate(rows):
        y = TOP + step * number
        drawn.append(_text(left - 8, y + 17, name if len(name) <= 20 else f"{name[:19]}…", "end", style="name"))
        for place, (column, estimate) in enumerate(zip(columns, found, strict=True)):
            x, share = left + wide * place, min(1.0, max(0.0, estimate.value))
            said = escape(f"{name}, {column}: {estimate.text()}")
            box = f'x="{x:.1f}" y="{y:.1f}" width="{wide - 2:.1f}" height="{step - 2:.1f}"'
            opacity = f'fill-opacity="{DARKEST * share:.2f}"'
            drawn.append(f'<g class="s1"><rect class="dot" {box} {opacity}><title>{said}</title></rect></g>')
            if wide >= 24:
                words = f"{estimate.value:.2f}".removeprefix("0")
                drawn.append(_text(x + (wide - 2) / 2, y + 16, words, "middle", style="name"))
    for place, column in enumerate(columns):
        drawn.append(_text(left + wide * (place + 0.5) - 1, height - BOTTOM + 16, column, "middle"))
    drawn.append(_text((left + WIDTH - RIGHT) / 2, height - 6, x_label, "middle"))
    return "".join(drawn) + "</svg>"


def _mark(style: int, x: float, y: float, title: str = "", *, size: float = 4.0) -> str:
    """A mark in the shape of a style; its title is what a pointer shows."""
    said = f"<title>{escape(title)}</title>" if title else ""
    shape = MARKS[style % len(MARKS)]
    if shape in ("circle", "ring"):
        kind = "dot" if shape == "circle" else "ring"
        return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{size}">{said}</circle>'
    wide = {"square": size * 0.9, "triangle": size * 1.15, "diamond": size * 1.25}[shape]
    corners = {
        "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        "triangle": ((0, -1), (1, 0.8), (-1, 0.8)),
        "diamond": ((0, -1), (1, 0), (0, 1), (-1, 0)),
    }[shape]
    points = " ".join(f"{x + dx * wide:.1f},{y + dy * wide:.1f}" for dx, dy in corners)
    return f'<polygon class="dot" points="{points}">{said}</polygon>'


def _colour(style: int) -> str:
    return f"s{(style - 1) % COLOURS + 1 if style else 0}"


def _dashes(style: int) -> str:
    dashes = DASHES[style % len(DASHES)]
    return f' stroke-dasharray="{dashes}"' if dashes else ""


def swatch(style: int, *, place: tuple[float, float] | None = None) -> str:
    """Draws a style for a legend: a piece of its line with its mark."""
    where = "" if place is None else f' x="{place[0]:.1f}" y="{place[1]:.1f}" width="32" height="12"'
    line = f'<line class="line"{_dashes(style)} x1="1" x2="31" y1="6" y2="6"/>'
    mark = _mark(style, 16, 6)
    return f'<svg class="swatch"{where} viewBox="0 0 32 12"><g class="{_colour(style)}">{line}{mark}</g></svg>'


def dot_chart(rows: Sequence[tuple[str, Sequence[tuple[str, int, Estimate]]]], *, title: str, x_label: str) -> str:
    """A line for each row, with a dot and its interval for each (name, style, estimate) of it."""
    height = TOP + ROW * len(rows) + BOTTOM
    values = [value for _, dots in rows for _, _, estimate in dots for value in _span(estimate)] or [0.0, 1.0]
    low, high, ticks = _nice(min(values), max(values))
    widest = max((len(name) for name, _ in rows), default=1)
    left = 22.0 + 7.2 * min(20, max(3, widest))
    across = _scale(low, high, left, WIDTH - RIGHT)
    parts = [_open(height, title)]
    for tick in ticks:
        x = across(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - BOTTOM:.1f}"/>')
        parts.append(_text(x, height - BOTTOM + 16, _number(tick), "middle"))
    parts.append(_text((left + WIDTH - RIGHT) / 2, height - 6, x_label, "middle"))
    for number, (name, dots) in enumerate(rows):
        middle = TOP + ROW * (number + 0.5)
        shown = name if len(name) <= 20 else f"{name[:19]}…"
        parts.append(_text(left - 8, middle + 4, shown, "end", style="name"))
        for offset, (who, style, estimate) in zip(_offsets(len(dots), step=9.0), dots, strict=True):
            y = middle + offset
            parts.append(f'<g class="{_colour(style)}">')
            if estimate.low is not None and estimate.high is not None:
                ends = f'x1="{across(estimate.low):.1f}" x2="{across(estimate.high):.1f}"'
                parts.append(f'<line class="bar" {ends} y1="{y:.1f}" y2="{y:.1f}"/>')
            said = f"{name}, {who}: {estimate.text()}"
            parts.append(_mark(style, across(estimate.value), y, said, size=4.5) + "</g>")
    return "".join(parts) + "</svg>"


def stacked_chart(
    rows: Sequence[tuple[str, Sequence[float]]], *, names: Sequence[str], title: str, x_label: str
) -> str:
    """A bar for each row, made of one piece for each name, with the sum behind it."""
    height = TOP + ROW * len(rows) + BOTTOM
    _, high, ticks = _nice(0.0, max((sum(parts) for _, parts in rows), default=1.0) * 1.08)
    left = 22.0 + 7.2 * max((len(name) for name, _ in rows), default=1)
    across = _scale(0.0, high, left, WIDTH - RIGHT)
    drawn = [_open(height, title)]
    for tick in ticks:
        x = across(tick)
        drawn.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - BOTTOM:.1f}"/>')
        drawn.append(_text(x, height - BOTTOM + 16, _number(tick), "middle"))
    drawn.append(_text((left + WIDTH - RIGHT) / 2, height - 6, x_label, "middle"))
    for number, (name, parts) in enumerate(rows):
        y, begin = TOP + ROW * number + 6, 0.0
        drawn.append(_text(left - 8, y + 15, name, "end", style="name"))
        for style, (part, value) in enumerate(zip(names, parts, strict=True), 1):
            wide = across(begin + value) - across(begin)
            said = escape(f"{name}, {part}: {value:.2f}")
            box = f'x="{across(begin):.1f}" y="{y:.1f}" width="{max(0.0, wide - 1):.1f}" height="{ROW - 12:.1f}"'
            drawn.append(f'<g class="{_colour(style)}"><rect class="dot" {box}><title>{said}</title></rect></g>')
            begin += value
        drawn.append(_text(across(begin) + 5, y + 15, _number(round(begin, 1)), "start"))
    return "".join(drawn) + "</svg>"


@dataclass(frozen=True)
class _Scale:
    """A linear map from values to places."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return self.start + share * (self.end - self.start)


def _scale(low: float, high: float, start: float, end: float) -> _Scale:
    return _Scale(low, high, start, end)


def _nice(low: float, high: float) -> tuple[float, float, list[float]]:
    """Bounds and ticks at round numbers that take in both values."""
    if not high > low:
        low, high = low - 0.5, high + 0.5
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [index * step for index in range(first, last + 1)]
    return ticks[0], ticks[-1], ticks


def _offsets(count: int, *, step: float = 5.0) -> list[float]:
    return [step * (index - (count - 1) / 2) for index in range(count)]


def _span(estimate: Estimate) -> list[float]:
    found = [estimate.value]
    return found if estimate.low is None or estimate.high is None else [*found, estimate.low, estimate.high]


def _open(height: float, title: str, *, width: float = WIDTH, place: tuple[float, float] | None = None) -> str:
    inside = ""
    if place is not None:
        inside = f' x="{place[0]:.1f}" y="{place[1]:.1f}" width="{width:.0f}" height="{height:.0f}"'
    return f'<svg{inside} viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">'


def _text(x: float, y: float, text: str, anchor: str, *, style: str = "label") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _number(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.0e}"
    return f"{round(value, 4):g}" if abs(value) < 10_000 else f"{value / 1000:g}k"
