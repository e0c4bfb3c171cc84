"""The pictures of the documents, drawn from rows of benchmarks.

    python benchmarks/plot.py                              # all, from docs/results/data/
    python benchmarks/plot.py loss --json loss.json        # one, from the rows that a benchmark has written
    python benchmarks/plot.py demo --run runs/demo         # one, from the acceptance files of a run

What is drawn by `--json` or `--run` takes the place of the rows in docs/results/data/.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mtpd.evaluate.acceptance import Acceptance
from mtpd.evaluate.intervals import Estimate, intervals
from mtpd.report import svg

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
EXTRA = "builtin-other"
"""The suite of the demo that is not summed with the others."""

Rows = Sequence[Mapping[str, Any]]
Panel = tuple[str, str]
"""What stands above a chart, and the chart."""
WIDE, HEADER, GAP = svg.WIDTH, 58.0, 30.0


def picture(title: str, panels: Sequence[Panel], *, legend: Sequence[tuple[str, int]] = ()) -> str:
    """Joins charts, one below the other, into an SVG file with a title and a legend of (name, style)."""
    parts, x, y = [], 14.0, HEADER if legend else HEADER - 22
    for name, style in legend:
        parts.append(svg.swatch(style, place=(x, 38)))
        parts.append(f'<text class="label" x="{x + 37:.0f}" y="48">{escape(name)}</text>')
        x += 58 + 6.6 * len(name)
    for heading, chart in panels:
        height = float(chart.split('viewBox="0 0 ', 1)[1].split('"', 1)[0].split()[1])
        parts.append(f'<text class="name" x="14" y="{y + 16:.0f}">{escape(heading)}</text>')
        parts.append(f'<svg y="{y + GAP - 8:.0f}" width="{WIDE:.0f}" height="{height:.0f}">{chart}</svg>')
        y += GAP + height
    # A browser that shows the file by itself needs the background, a page that shows it in dark mode too.
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE:.0f} {y:.0f}" width="{WIDE:.0f}" '
        f'height="{y:.0f}" role="img" aria-label="{escape(title)}"><style>{svg.STYLE}</style>'
        f'<rect class="back" width="100%" height="100%"/><text class="title" x="14" y="24">{escape(title)}</text>'
        f"{''.join(parts)}</svg>\n"
    )


def demo(rows: Rows) -> str:
    """CAR by depth, a line for each side."""
    series = []
    for style, side in enumerate(dict.fromkeys(row["side"] for row in rows)):
        own = [row for row in rows if row["side"] == side]
        points = [svg.Point(row["depth"], Estimate(row["car"], row["low"], row["high"])) for row in own]
        series.append(svg.Series(side, points, style))
    chart = svg.line_chart(
        series, title="CAR by depth", x_label="depth k", y_label="CAR_k", x_ticks=[1, 2, 3, 4], y_low=0.0
    )
    heading = f"{rows[0]['prompts']} held-out prompts, offline; bars are 95% intervals"
    return picture("Drafts whose first k tokens are accepted", [(heading, chart)], legend=_legend(series))


def distillation(rows: Rows) -> str:
    """How much more tau a loss gives than CE, by training text and kind of prompts."""
    shown = ("KL", "KL, teacher T 0.5", "CE + KL")
    lines = []
    for text, domain in dict.fromkeys((row["text"], row["domain"]) for row in rows):
        of = {
            loss: [row for row in rows if (row["text"], row["domain"], row["loss"]) == (text, domain, loss)]
            for loss in ("CE", *shown)
        }
        dots = [(loss, style, _gap(of[loss], of["CE"])) for style, loss in enumerate(shown, start=1)]
        lines.append((f"{text}, {domain.split()[0]}", dots))
    chart = svg.dot_chart(lines, title="tau minus that of CE", x_label="tau minus that of CE")
    heading = "By text and prompts; bars: ± a standard deviation of 3 seeds"
    return picture("Losses against labels alone", [(heading, chart)], legend=[(s, n) for n, s in enumerate(shown, 1)])


def _gap(own: Rows, labels: Rows) -> Estimate:
    if "seed" not in own[0]:
        mean, deviation = own[0]["minus CE"], own[0]["deviation"]
    else:
        gaps = [row["tau"] - other["tau"] for row, other in zip(own, labels, strict=True)]
        mean, deviation = statistics.mean(gaps), statistics.stdev(gaps) if len(gaps) > 1 else 0.0
    return Estimate(mean, mean - deviation, mean + deviation)


def loss(rows: Rows) -> str:
    """Seconds and peak memory of the fused loss beside others."""
    panels = []
    for unit, label, scale in (("seconds", "seconds, forward and backward", 1.0), ("bytes", "MB at most", 1e-6)):
        bars: dict[str, float] = {}
        for row in rows:
            if row["unit"] == unit and row["against"] != "roofline":
                dtype = row["name"].split()[4]
                bars[f"mtpd, {dtype}"] = row["ours"] * scale
                bars[f"{row['against']}, {dtype}"] = row["other"] * scale
        panels.append((label, _bars(bars, label)))
    return picture("The loss of four depths", panels)


def decode(rows: Rows) -> str:
    """Tokens/s of one prompt at a time, by dtype."""
    bars: dict[str, float] = {}
    for row in rows:
        if row["name"].startswith("1 prompt"):
            dtype = row["name"].split(", ")[1]
            bars[f"mtpd, {dtype}"] = row["ours"]
            bars[f"{row['against']}, {dtype}"] = row["other"]
    return picture("Tokens/s, one prompt at a time", [("The demo on two CPU cores", _bars(bars, "tokens/s"))])


def circuits(rows: Rows) -> str:
    """Speed on bytes over transformers' generate, by kind of heads."""
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        dots = []
        for row in rows:
            if row["name"] == name:
                value, deviation = row["over generate"], row.get("deviation")
                bounds = (None, None) if deviation is None else (value - deviation, value + deviation)
                dots.append((row["mode"], modes.index(row["mode"]) + 1, Estimate(value, *bounds)))
        lines.append((name, dots))
    chart = svg.dot_chart(lines, title="Speed against generate", x_label="times generate")
    heading = "Bytes/s at batch 1; bars: ± a standard deviation of 3 seeds"
    return picture("Heads on bytes", [(heading, chart)], legend=[(mode, n) for n, mode in enumerate(modes, 1)])


def _bars(values: Mapping[str, float], label: str) -> str:
    return svg.stacked_chart([(name, [value]) for name, value in values.items()], names=[""], title=label, x_label="")


def _legend(series: Sequence[svg.Series]) -> list[tuple[str, int]]:
    return [(each.name, each.style) for each in series]


def rows_of_run(run: Path) -> list[dict[str, Any]]:
    """CAR by depth of a run before and after training, over its suites together."""
    rows = []
    for side, name in (("before training", "acceptance-before.json"), ("after", "acceptance.json")):
        acceptance = Acceptance.load(run / name)
        prompts = acceptance.total([suite for suite in acceptance.suites if suite != EXTRA]).prompts
        for ratio, found in intervals(acceptance, apart=[EXTRA])[None].items():
            if ratio.startswith("car_") and found.low is not None and found.high is not None:
                depth = int(ratio.removeprefix("car_"))
                bounds = {"low": round(found.low, 4), "high": round(found.high, 4)}
                rows.append({"side": side, "depth": depth, "car": round(found.value, 4), **bounds, "prompts": prompts})
    return rows


DRAWINGS: dict[str, Callable[[Rows], str]] = {
    "circuits": circuits,
    "decode": decode,
    "demo": demo,
    "distillation": distillation,
    "loss": loss,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", nargs="?", choices=DRAWINGS, help="all of them if not given")
    parser.add_argument("--json", type=Path, help="rows of the benchmark")
    parser.add_argument("--run", type=Path, help="a run directory, for the picture of the demo")
    parser.add_argument("--into", type=Path, default=RESULTS, help="folder of the pictures, and of data/")
    options = parser.parse_args()
    if options.picture is None and (options.json or options.run):
        parser.error("name the picture that --json or --run is for")
    for name in [options.picture] if options.picture else DRAWINGS:
        data = options.into / "data" / f"{name}.json"
        if options.run or options.json:
            rows = rows_of_run(options.run) if options.run else read_rows(options.json)
            data.parent.mkdir(parents=True, exist_ok=True)
            data.write_text("[\n" + ",\n".join(f" {json.dumps(row)}" for row in rows) + "\n]\n", encoding="utf-8")
        (options.into / f"{name}.svg").write_text(DRAWINGS[name](read_rows(data)), encoding="utf-8")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads a JSON list, or JSON lines."""
    text = path.read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = json.loads(text) if text.startswith("[") else list(map(json.loads, text.splitlines()))
    return rows


if __name__ == "__main__":
    main()
