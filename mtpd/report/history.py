"""Tau and CAR over time, of the acceptance files of a folder: one HTML page without scripts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mtpd.evaluate.history import Past
from mtpd.evaluate.intervals import Estimate, intervals
from mtpd.evaluate.run_tables import TOTAL
from mtpd.report import svg
from mtpd.report.slices import Chart

TEMPLATES = Path(__file__).parent / "templates"
DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
MOST_NAMES = 5
"""Names under an axis at most."""
MOST_DEPTHS = 4


@dataclass(frozen=True)
class _Line:
    """Measurements of one mode, with their places on the axis of time."""

    names: list[str]
    xs: list[float]
    estimates: list[dict[str | None, dict[str, Estimate]]]


def render_history(title: str, past: Sequence[Past]) -> str:
    """The page as text: for each mode tau and CAR of the suites that all its files have, and tau of each suite."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    modes = dict.fromkeys(each.acceptance.mode for each in past)
    sections = [_section(mode, [each for each in past if each.acceptance.mode == mode]) for mode in modes]
    return environment.get_template("history.html").render(
        title=title,
        sections=sections,
        style=Markup(svg.STYLE),
        swatch=lambda style: Markup(svg.swatch(style)),
    )


def _section(mode: str, past: Sequence[Past]) -> dict[str, Any]:
    every = list(dict.fromkeys(name for each in past for name in each.acceptance.suites))
    common = [name for name in every if all(name in each.acceptance.suites for each in past)]
    names = [each.name for each in past]
    apart = [[name for name in each.acceptance.suites if name not in common] for each in past]
    found = [intervals(each.acceptance, apart=others) for each, others in zip(past, apart, strict=True)]
    line = _Line(names, _places(names), found)
    depth = min(MOST_DEPTHS, *(each.acceptance.total().depth for each in past))
    charts = []
    if common:
        charts.append(_chart("tau, tokens per forward pass", "tau", line, {"tau": (None, "tau")}))
        wanted: dict[str, tuple[str | None, str]] = {f"CAR_{k}": (None, f"car_{k}") for k in range(1, depth + 1)}
        charts.append(_chart("CAR by depth", "CAR_k", line, wanted))
    rows = [
        {
            "name": each.name,
            "prompts": each.acceptance.total(common or None).prompts,
            "found": estimates.get(None),
            "heads": each.acceptance.heads[:12],
            "trunk": each.acceptance.trunk[:12],
        }
        for each, estimates in zip(past, found, strict=True)
    ]
    return {
        "mode": mode,
        "charts": charts,
        "suites": [_chart(name, "tau", line, {"tau": (name, "tau")}) for name in every] if len(every) > 1 else [],
        "rows": rows,
        "common": common,
        "apart": [name for name in every if name not in common],
        "total": TOTAL,
    }


def _places(names: Sequence[str]) -> list[float]:
    """Days, where all names have a date of their own; else numbers."""
    days: set[float] = set()
    places = []
    for name in names:
        try:
            places.append(float(date.fromisoformat(_label(name)).toordinal()))
        except ValueError:
            break
        days.add(places[-1])
    return places if len(days) == len(names) else list(map(float, range(len(names))))


def _label(name: str) -> str:
    """What stands under an axis: the date in a name, or its beginning."""
    found = DATE.search(name)
    return found[0] if found else name[:12]


def _chart(title: str, y_label: str, line: _Line, wanted: Mapping[str, tuple[str | None, str]]) -> Chart:
    """A line for each ratio that is wanted, over the files that have it.

    Args:
        wanted: by name of the line, the suite and the ratio.
    """
    series = [
        svg.Series(
            name,
            [
                svg.Point(x, found[suite][ratio])
                for x, found in zip(line.xs, line.estimates, strict=True)
                if suite in found and ratio in found[suite]
            ],
            style,
            band=True,
        )
        for style, (name, (suite, ratio)) in enumerate(wanted.items(), start=1)
    ]
    ticks = range(0, len(line.xs), -(-len(line.xs) // MOST_NAMES))
    picture = svg.line_chart(
        series,
        title=title,
        x_label="measurement",
        y_label=y_label,
        x_ticks=[line.xs[index] for index in ticks],
        x_names=[_label(line.names[index]) for index in ticks],
    )
    return title, [(each.style, each.name) for each in series], Markup(picture)
