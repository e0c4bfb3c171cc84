"""The report: one HTML file that needs no network and no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mtpd.errors import UserError
from mtpd.evaluate.acceptance import Acceptance
from mtpd.evaluate.depths import Depths
from mtpd.evaluate.gate import Comparison, compare, label
from mtpd.evaluate.intervals import Estimate, intervals
from mtpd.evaluate.run_tables import TOTAL
from mtpd.report import svg
from mtpd.report.samples import SampleText

TEMPLATES = Path(__file__).parent / "templates"
CURVES = (
    ("Loss", "loss", ["loss"]),
    ("Acceptance in training (teacher-forced, on the training text)", "CAR", ["train_car_"]),
    ("Held-out acceptance during training", "tau", ["eval_tau"]),
    ("Learning rate", "learning rate", ["learning_rate"]),
)
"""Title, label and names (or beginnings of names) of the training curves; those that were not logged are left out."""


@dataclass(frozen=True)
class Section:
    """One measurement, and the baseline that it is compared with."""

    title: str
    after: Acceptance
    before: Acceptance | None = None
    before_name: str = "before training"
    apart: tuple[str, ...] = ()
    """Suites that are not summed."""


@dataclass(frozen=True)
class ReportContents:
    """Everything that the report shows."""

    title: str
    recipe: Mapping[str, Any]
    provenance: Mapping[str, Any]
    sections: Sequence[Section]
    decoded: Section | None = None
    metrics: Sequence[Mapping[str, Any]] = ()
    samples: Sequence[SampleText] = field(default_factory=list)
    depths: Depths | None = None
    """Which depth pays."""


def render_report(contents: ReportContents) -> str:
    """The page as text."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"label": label, "yaml": _yaml}
    sections = [_section(section) for section in contents.sections]
    return environment.get_template("report.html").render(
        contents=contents,
        sections=sections,
        decoded=_section(contents.decoded) if contents.decoded else None,
        curves=_curves(contents.metrics),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        total=TOTAL,
        most_depths=max((max(text.depths, default=0) for text in contents.samples), default=0),
    )


def _section(section: Section) -> dict[str, Any]:
    """Numbers and charts of one measurement."""
    after = intervals(section.after, apart=section.apart)
    before: dict[str | None, dict[str, Estimate]] = {}
    if section.before is not None:
        before = intervals(section.before, apart=section.apart)
    depth = section.after.total().depth
    comparison, why = _compare(section)
    names = [name for name in after if name is not None]
    together = [name for name in names if name not in section.apart]
    return {
        "title": section.title,
        "section": section,
        "depth": depth,
        "after": after,
        "before": before,
        "comparison": comparison,
        "not_compared": why,
        "order": [*together, None, *section.apart],
        "counts": {name: section.after.suites[name] for name in names} | {None: section.after.total(together)},
        "car_chart": Markup(_car_chart(section, after[None], before.get(None), depth)),
        "suite_charts": [
            (name, Markup(_car_chart(section, after[name], before.get(name), depth, name=name))) for name in names
        ],
        "tau_chart": Markup(_tau_chart(section, after, before)),
    }


def _compare(section: Section) -> tuple[Comparison | None, str]:
    """Paired changes, or why there are none."""
    if section.before is None:
        return None, ""
    try:
        names = [name for name in section.after.suites if name not in section.apart]
        sides = (
            each.model_copy(update={"suites": {name: each.suites[name] for name in names if name in each.suites}})
            for each in (section.before, section.after)
        )
        return compare(*sides, names=("the baseline", "this run")), ""
    except UserError as error:
        return None, str(error)


def _car_chart(
    section: Section,
    after: Mapping[str, Estimate],
    before: Mapping[str, Estimate] | None,
    depth: int,
    *,
    name: str = "all suites",
) -> str:
    series = []
    if before is not None:
        series.append(svg.Series(section.before_name, _by_depth(before, "car"), "s0"))
    series.append(svg.Series("this run", _by_depth(after, "car"), "s1"))
    return svg.line_chart(
        series,
        title=f"CAR by depth, {name}",
        x_label="depth k",
        y_label="CAR_k",
        x_ticks=list(range(1, depth + 1)),
        y_low=0.0,
    )


def _by_depth(found: Mapping[str, Estimate], ratio: str) -> list[svg.Point]:
    return [
        svg.Point(float(name.removeprefix(f"{ratio}_")), estimate)
        for name, estimate in found.items()
        if name.startswith(f"{ratio}_")
    ]


def _tau_chart(
    section: Section,
    after: Mapping[str | None, Mapping[str, Estimate]],
    before: Mapping[str | None, Mapping[str, Estimate]],
) -> str:
    rows = []
    apart = [(name, after[name]) for name in section.apart]
    for name, found in [*((n, f) for n, f in after.items() if n not in section.apart), *apart]:
        dots = []
        if name in before:
            dots.append((section.before_name, "s0", before[name]["tau"]))
        rows.append((name or TOTAL, [*dots, ("this run", "s1", found["tau"])]))
    return svg.dot_chart(rows, title="tau by suite", x_label="tau, tokens per forward pass")


def _curves(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str], Markup]]:
    """Title, names of the lines, and chart of each training curve."""
    curves = []
    logged = [key for key in dict.fromkeys(key for line in metrics for key in line) if key != "step"]
    for title, y_label, wanted in CURVES:
        names = [key for key in logged if key in wanted or any(w.endswith("_") and key.startswith(w) for w in wanted)]
        series = [
            svg.Series(
                name,
                [svg.Point(line["step"], Estimate(line[name])) for line in metrics if _is_number(line.get(name))],
                f"s{number}",
                marks=name.startswith("eval_"),
            )
            for number, name in enumerate(names, 1)
        ]
        series = [each for each in series if len(each.points) > 1]
        if series:
            chart = svg.line_chart(series, title=title, x_label="step", y_label=y_label)
            curves.append((title, [each.name for each in series], Markup(chart)))
    return curves


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and value == value and abs(value) != float("inf")


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
