"""The report: one HTML file that needs no network and no script."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mtpd.decode.drafting import CORPUS
from mtpd.errors import UserError
from mtpd.evaluate.acceptance import Acceptance
from mtpd.evaluate.depths import Depths
from mtpd.evaluate.drafters import NODES
from mtpd.evaluate.gate import Comparison, compare, label
from mtpd.evaluate.intervals import Estimate, intervals
from mtpd.evaluate.other_model import Cost
from mtpd.evaluate.run_tables import TOTAL
from mtpd.report import svg
from mtpd.report.car import car_chart, highest, styled
from mtpd.report.drafting import DRAFTER_NAMES, SOURCE_NAMES, accepted_from, as_used, ordinal, way_lines
from mtpd.report.samples import SampleText
from mtpd.report.slices import places_charts, suites_by_depth
from mtpd.report.verdict import Measured, measured_on, verdict

PART_NAMES = {
    "trunk": "pass of the trunk",
    "drafts": "drafting",
    "verification": "main head and choice",
    "bookkeeping": "everything else",
}
"""Parts of a round, and what the report calls them."""
TEMPLATES = Path(__file__).parent / "templates"
CURVES = (
    ("Loss", "loss", ["loss"]),
    ("Cross-entropy with the text, by depth", "nats a token", ["ce_"]),
    ("Acceptance in training (teacher-forced, on the training text)", "CAR", ["train_car_"]),
    ("Held-out acceptance during training", "tau", ["eval_tau"]),
    ("Held-out acceptance during training, by family", "tau", ["eval_tau_"]),
    ("Learning rate", "learning rate", ["learning_rate"]),
)
"""Title, label and names (or beginnings of names) of the training curves; those that were not logged are left out."""
DIVERGENCE = re.compile(r"(?!ce_|train_|eval_)([a-z_]+_)\d+")
"""What the distillation loss of each depth is logged under; its beginning says which divergence it is."""


@dataclass(frozen=True)
class Section:
    """One measurement, and the baseline that it is compared with."""

    title: str
    after: Acceptance
    before: Acceptance | None = None
    before_name: str = "before training"
    apart: tuple[str, ...] = ()
    """Suites that are not summed."""
    kept: bool = True
    """These are the run's heads, and not trained ones that were worse than the start."""


@dataclass(frozen=True)
class ReportContents:
    """Everything that the report shows."""

    title: str
    recipe: Mapping[str, Any]
    provenance: Mapping[str, Any]
    sections: Sequence[Section]
    """Offline and decoded measurements, at least one."""
    metrics: Sequence[Mapping[str, Any]] = ()
    samples: Sequence[SampleText] = field(default_factory=list)
    depths: Depths | None = None
    """Tokens/s by number of drafts."""
    models: Sequence[Cost] = ()
    """What other models cost these heads."""


def render_report(contents: ReportContents) -> str:
    """The page as text."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"label": label, "yaml": _yaml, "ordinal": ordinal, "accepted_from": accepted_from}
    sections = [_section(section) for section in contents.sections]
    offline = [each for each in sections if not each["decoded"]]
    decoded = [each for each in sections if each["decoded"]]
    return environment.get_template("report.html").render(
        contents=contents,
        sections=sections,
        offline=offline,
        decoded=decoded,
        verdict=verdict(
            [each["measured"] for each in offline],
            [each["measured"] for each in decoded],
            contents.depths,
            contents.models,
        ),
        facts=_facts(contents, sections[0]),
        curves=_curves(contents.metrics),
        depths_charts=_depths_charts(contents.depths),
        part_names=PART_NAMES,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        total=TOTAL,
        style=Markup(svg.STYLE),
        swatch=lambda style: Markup(svg.swatch(style)),
        nodes=NODES,
        drafter_names=DRAFTER_NAMES,
        source_names=SOURCE_NAMES,
        sources={source for text in contents.samples for source in text.sources or ()},
    )


def _facts(contents: ReportContents, first: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Model, heads, hardware and time."""
    heads, provenance = contents.recipe["heads"], contents.provenance
    settings = first["section"].after.settings or {}
    facts = [("model", str(contents.recipe["model"])), ("heads", f"{first['depth']}, {heads['kind']}")]
    if "dtype" in settings:
        facts.append(("number format", str(settings["dtype"])))
    if provenance.get("machine"):
        facts.append(("hardware", str(provenance["machine"])))
    if (answered := provenance.get("responses")) and answered.get("count"):
        share = f"{answered['cut'] / answered['count']:.0%} cut at {contents.recipe['data']['max_new_tokens']} tokens"
        facts.append(("responses", f"{answered['count']:,}, {share}"))
    began, ended = (_time(provenance.get(key)) for key in ("started", "finished"))
    if began and ended:
        facts.append(("run", f"{began:%Y-%m-%d %H:%M} to {ended:%Y-%m-%d %H:%M} UTC"))
    elif began:
        facts.append(("run", f"begun {began:%Y-%m-%d %H:%M} UTC"))
    seconds = sum(line["train_runtime"] for line in contents.metrics if _is_number(line.get("train_runtime")))
    if seconds:
        steps = max(int(line["step"]) for line in contents.metrics)
        facts.append(("training", f"{steps} steps, {_duration(seconds)}"))
    return facts


def _time(value: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(str(value)).astimezone(UTC)
    except ValueError:
        return None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _section(section: Section) -> dict[str, Any]:
    """Numbers and charts of one measurement."""
    sides = {} if section.before is None else {section.before_name: intervals(section.before, apart=section.apart)}
    # Where heads and look-up were timed together, that is what a user gets.
    used = as_used(section.after, apart=section.apart)
    shown = used or section.after
    sides["this run"] = after = intervals(shown, apart=section.apart)
    before: Mapping[str | None, Mapping[str, Estimate]] = sides.get(section.before_name, {})
    depth = section.after.total().depth
    comparison, why = _compare(section, shown)
    names = [name for name in after if name is not None]
    together = [name for name in names if name not in section.apart]
    counts = {name: shown.suites[name] for name in names} | {None: shown.total(together)}
    top = highest(sides)
    title = section.title
    return {
        "title": title,
        "decoded": section.after.mode == "decoded",
        "used": used is not None,
        "sources": {
            name: what
            for name, what in SOURCE_NAMES.items()
            if name != CORPUS or any(name in each.sources for each in (counts[None].drafters or {}).values())
        },
        "measured_on": measured_on(section.after, together, "heads and look-up together" if used else ""),
        "measured_in_tree": measured_on(section.after, together, f"up to {NODES} drafts a round in one tree"),
        "ways": way_lines(section.after.total(together)) if used else [],
        "measured": Measured(
            title,
            section.after,
            counts[None],
            after[None],
            comparison,
            section.before_name if section.before else "",
            section.kept,
            section.apart,
        ),
        "section": section,
        "styles": styled(sides),
        "depth": depth,
        "after": after,
        "before": before,
        "comparison": comparison,
        "not_compared": why,
        "order": [*together, None, *section.apart],
        "counts": counts,
        "car_chart": Markup(car_chart(sides, None)),
        "suite_charts": [(name, Markup(car_chart(sides, name, y_high=top))) for name in names],
        "tau_chart": Markup(_tau_chart(section, after, before)),
        "places_charts": places_charts(section.after, apart=section.apart),
        "heat_map": Markup(suites_by_depth(after, [*together, *section.apart], depth)),
    }


def _compare(section: Section, after: Acceptance) -> tuple[Comparison | None, str]:
    """Paired changes, or why there are none."""
    if section.before is None:
        return None, ""
    before = section.before
    if after is not section.after:
        used = as_used(before, apart=section.apart)
        if used is None:
            return None, f"{section.before_name} was decoded by a chain of heads, without look-up"
        before = used
    try:
        names = [name for name in section.after.suites if name not in section.apart]
        sides = (
            each.model_copy(update={"suites": {name: each.suites[name] for name in names if name in each.suites}})
            for each in (before, after)
        )
        return compare(*sides, names=("the baseline", "this run")), ""
    except UserError as error:
        return None, str(error)


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
            dots.append((section.before_name, 0, before[name]["tau"]))
        rows.append((name or TOTAL, [*dots, ("this run", 1, found["tau"])]))
    return svg.dot_chart(rows, title="tau by suite", x_label="tau, tokens per forward pass")


def _curves(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[tuple[int, str]], Markup]]:
    """Title, lines (number of the style, name), and chart of each training curve."""
    curves = []
    logged = [key for key in dict.fromkeys(key for line in metrics for key in line) if key != "step"]
    divergences = dict.fromkeys(found[1] for key in logged if (found := DIVERGENCE.fullmatch(key)))
    by_depth = [
        (f"{each.rstrip('_').upper()} from the main head, by depth", "nats a token", [each])
        if each == "kl_"
        else (f"{each.rstrip('_')} from the main head, by depth", each.rstrip("_"), [each])
        for each in divergences
    ]
    for title, y_label, wanted in [*CURVES[:2], *by_depth, *CURVES[2:]]:
        names = [key for key in logged if key in wanted or any(w.endswith("_") and key.startswith(w) for w in wanted)]
        series = [
            svg.Series(
                name,
                [svg.Point(line["step"], Estimate(line[name])) for line in metrics if _is_number(line.get(name))],
                number,
                marks=name.startswith("eval_"),
            )
            for number, name in enumerate(names, 1)
        ]
        series = [each for each in series if len(each.points) > 1]
        if series:
            chart = svg.line_chart(series, title=title, x_label="step", y_label=y_label)
            curves.append((title, [(each.style, each.name) for each in series], Markup(chart)))
    return curves


def _depths_charts(depths: Depths | None) -> list[tuple[str, list[tuple[int, str]], Markup]]:
    """Tokens/s, and the parts of a round, by number of drafts."""
    if depths is None:
        return []
    counts = [each.depth for each in depths.depths]
    lines = {
        "with drafts": [svg.Point(each.depth, Estimate(each.tokens_per_second)) for each in depths.depths],
        "the engine without drafts": [
            svg.Point(count, Estimate(depths.depths[0].tokens_per_second)) for count in (counts[0], counts[-1])
        ],
        "transformers' generate": [
            svg.Point(count, Estimate(depths.plain_tokens_per_second)) for count in (counts[0], counts[-1])
        ],
    }
    styles = dict(zip(lines, (1, 2, 0), strict=True))
    series = [svg.Series(name, points, styles[name]) for name, points in lines.items()]
    speed = svg.line_chart(
        series,
        title="Tokens/s by number of drafts",
        x_label="drafts a round",
        y_label="tokens/s",
        x_ticks=counts,
        y_low=0.0,
    )
    charts = [("Tokens/s by number of drafts", [(styles[name], name) for name in lines], Markup(speed))]
    if all(each.part_ms is not None for each in depths.depths):
        rows = [
            (
                f"{each.depth} draft" + ("s" if each.depth != 1 else ""),
                [(each.part_ms or {}).get(part, 0.0) for part in PART_NAMES],
            )
            for each in depths.depths
        ]
        names = list(PART_NAMES.values())
        title = "Where the time of a round goes"
        parts = svg.stacked_chart(rows, names=names, title=title, x_label="milliseconds a round")
        charts.append((title, list(enumerate(names, 1)), Markup(parts)))
    return charts


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and value == value and abs(value) != float("inf")


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
