"""Charts of the report as PNG files."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtpd.evaluate.intervals import Estimate, intervals
from mtpd.evaluate.run_tables import TOTAL
from mtpd.files import write_whole
from mtpd.report.page import CURVES, Section


def plot_intervals(path: Path, section: Section) -> None:
    """CAR by depth over all suites, and tau by suite, both with intervals and against the baseline."""
    pyplot = _pyplot()
    after = intervals(section.after, apart=section.apart)
    sides = [("this run", "#2456c8", after)]
    if section.before is not None:
        sides.insert(0, (section.before_name, "#8a929c", intervals(section.before, apart=section.apart)))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11.0, max(4.0, 1.2 + 0.42 * len(after))))
    for number, (name, colour, found) in enumerate(sides):
        depths = range(1, section.after.total().depth + 1)
        chosen = [found[None][f"car_{k}"] for k in depths if f"car_{k}" in found[None]]
        shift = 0.06 * (number - (len(sides) - 1) / 2)
        xs = [k + shift for k in list(depths)[: len(chosen)]]
        left.errorbar(xs, [e.value for e in chosen], _bars(chosen), color=colour, marker="o", capsize=3, label=name)
        rows = {suite: estimates["tau"] for suite, estimates in found.items() if suite in after}
        ys = [list(after).index(suite) + 3 * shift for suite in rows]
        taus = list(rows.values())
        right.errorbar([e.value for e in taus], ys, xerr=_bars(taus), color=colour, fmt="o", capsize=3, label=name)
    left.set(
        title=f"{section.title}: CAR by depth", xlabel="depth k", ylabel="CAR_k", xticks=list(depths), ylim=(0, None)
    )
    right.set(title="tau by suite", xlabel="tau, tokens per forward pass")
    right.set_yticks(range(len(after)), [name or TOTAL for name in after])
    right.invert_yaxis()
    left.legend()
    _finish(pyplot, figure, path)


def plot_curves(path: Path, metrics: Sequence[Mapping[str, Any]]) -> None:
    """What was logged while training."""
    pyplot = _pyplot()
    logged = list(dict.fromkeys(key for line in metrics for key in line))
    shown = []
    for title, y_label, wanted in CURVES:
        names = [key for key in logged if key in wanted or any(w.endswith("_") and key.startswith(w) for w in wanted)]
        if names:
            shown.append((title, y_label, names))
    figure, axes = pyplot.subplots(1, max(1, len(shown)), figsize=(5.4 * max(1, len(shown)), 4.0), squeeze=False)
    for axis, (title, y_label, names) in zip(axes[0], shown, strict=False):
        for name in names:
            points = [(line["step"], line[name]) for line in metrics if name in line]
            axis.plot(*zip(*points, strict=True), label=name)
        axis.set(xlabel="step", ylabel=y_label)
        axis.set_title(title, fontsize=9)
        axis.legend(fontsize=8)
    _finish(pyplot, figure, path)


def _bars(estimates: Sequence[Estimate]) -> list[list[float]] | None:
    """Lengths below and above each value, as matplotlib wants them; None without intervals."""
    if any(estimate.low is None or estimate.high is None for estimate in estimates):
        return None
    below = [max(0.0, e.value - e.low) for e in estimates if e.low is not None]
    above = [max(0.0, e.high - e.value) for e in estimates if e.high is not None]
    return [below, above]


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _finish(pyplot: Any, figure: Any, path: Path) -> None:
    for axis in figure.axes:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    pyplot.close(figure)
    write_whole(path, buffer.getvalue())
