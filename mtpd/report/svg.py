"""Charts as inline SVG whose colours come from the page, so that they follow its light and dark mode."""

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


@dataclass(frozen=True)
class Point:
    """One value of a series, with its interval where it has one."""

    x: float
    estimate: Estimate


@dataclass(frozen=True)
class Series:
    """Points of one kind; `style` is a class of the page's stylesheet (`s0` is the baseline's grey)."""

    name: str
    points: Sequence[Point]
    style: str
    marks: bool = True


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[float] | None = None,
    y_low: float | None = None,
    y_high: float | None = None,
) -> str:
    """Lines over x with error bars where points have intervals."""
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
    across = _scale(left, right, start, WIDTH - RIGHT)
    up = _scale(bottom, top, HEIGHT - BOTTOM, TOP)
    parts = [_open(HEIGHT, title)]
    for tick in y_ticks:
        y = up(tick)
        parts.append(f'<line class="grid" x1="{start:.1f}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(start - 6, y + 4, _number(tick), "end"))
    for tick in x_ticks:
        parts.append(_text(across(tick), HEIGHT - BOTTOM + 16, _number(tick), "middle"))
    parts.append(_text((start + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, "middle"))
    parts.append(
        f'<text class="label" text-anchor="middle" transform="translate(11 {(TOP + HEIGHT - BOTTOM) / 2:.1f}) '
        f'rotate(-90)">{escape(y_label)}</text>'
    )
    for offset, each in zip(_offsets(len(series)), series, strict=True):
        shift = offset if any(point.estimate.low is not None for point in each.points) else 0.0
        parts += _series(each, across, up, shift)
    return "".join(parts) + "</svg>"


def _series(series: Series, across: _Scale, up: _Scale, shift: float) -> list[str]:
    chosen = series.points[:: math.ceil(len(series.points) / MOST_POINTS) or 1]
    places = [(across(point.x) + shift, up(point.estimate.value), point) for point in chosen]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
    parts = [f'<g class="{series.style}"><polyline class="line" points="{path}"/>']
    for x, y, point in places:
        if point.estimate.low is not None and point.estimate.high is not None:
            low, high = up(point.estimate.low), up(point.estimate.high)
            parts.append(f'<line class="bar" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
        if series.marks:
            name = escape(f"{series.name}, {_number(point.x)}: {point.estimate.text()}")
            parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{name}</title></circle>')
    return [*parts, "</g>"]


def dot_chart(rows: Sequence[tuple[str, Sequence[tuple[str, str, Estimate]]]], *, title: str, x_label: str) -> str:
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
            parts.append(f'<g class="{style}">')
            if estimate.low is not None and estimate.high is not None:
                ends = f'x1="{across(estimate.low):.1f}" x2="{across(estimate.high):.1f}"'
                parts.append(f'<line class="bar" {ends} y1="{y:.1f}" y2="{y:.1f}"/>')
            what = escape(f"{name}, {who}: {estimate.text()}")
            x = across(estimate.value)
            parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4.5"><title>{what}</title></circle></g>')
    return "".join(parts) + "</svg>"


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


def _open(height: float, title: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">'


def _text(x: float, y: float, text: str, anchor: str, *, style: str = "label") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _number(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.0e}"
    return f"{round(value, 4):g}" if abs(value) < 10_000 else f"{value / 1000:g}k"
