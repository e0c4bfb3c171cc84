"""`mtpd report`: everything in a run directory as one HTML file, and its charts as PNG files beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtpd.errors import UserError
from mtpd.evaluate.acceptance import Acceptance
from mtpd.evaluate.depths import Depths
from mtpd.files import read_sealed, write_whole
from mtpd.recipe import Recipe, load_recipe
from mtpd.report.page import ReportContents, Section, render_report
from mtpd.report.plots import plot_curves, plot_intervals
from mtpd.report.samples import read_samples
from mtpd.run.directory import RunDirectory, warn_of_changes

SHOWN_PROMPTS = 5
"""Fingerprints of training prompts that the provenance shows; the others are counted."""


def report_run(path: Path, *, output: Path | None = None, against: Path | None = None) -> list[Path]:
    """Writes the report of a run, from its files alone: no model is loaded.

    Args:
        output: the HTML file; `report.html` in the run directory by default.
        against: an acceptance file that the evaluation on suites is compared with.

    Returns:
        The files written, the HTML file first.

    Raises:
        UserError: no run there, nothing measured yet, or a file that cannot be read.
    """
    run = RunDirectory(path)
    if not run.recipe.is_file():
        raise UserError(f"{path}: holds no run (no {run.recipe.name}); give the output directory of mtpd distill")
    warn_of_changes(run)
    recipe = load_recipe(run.recipe)
    sections = _sections(recipe, run, against)
    if not sections:
        raise UserError(f"{path}: nothing is measured yet; finish the run with mtpd distill, or run mtpd eval {path}")
    contents = ReportContents(
        title=f"{recipe.model} · {path.resolve().name}",
        recipe=recipe.model_dump(mode="json"),
        provenance=_provenance(run),
        sections=sections,
        decoded=_decoded(run),
        metrics=_metrics(run.metrics),
        samples=read_samples(run.samples),
        depths=Depths.load(run.depths) if run.depths.is_file() else None,
    )
    page = output or run.report
    write_whole(page, render_report(contents))
    beside = page.with_suffix("")
    written = [page]
    for number, section in enumerate(sections, 1):
        written.append(Path(f"{beside}-acceptance-{number}.png"))
        plot_intervals(written[-1], section)
    if contents.metrics:
        written.append(Path(f"{beside}-training.png"))
        plot_curves(written[-1], contents.metrics)
    return written


def _sections(recipe: Recipe, run: RunDirectory, against: Path | None) -> list[Section]:
    sections = []
    if run.acceptance.is_file():
        before = Acceptance.load(run.acceptance_before) if run.acceptance_before.is_file() else None
        apart = tuple(Path(source).stem for source in recipe.evaluation.extra)
        after = Acceptance.load(run.acceptance)
        sections.append(
            Section("Held-out prompts", after, before, apart=tuple(name for name in apart if name in after.suites))
        )
    if run.evaluation.is_file():
        baseline = None if against is None else Acceptance.load(against)
        name = "" if against is None else against.name
        sections.append(Section("Suites", Acceptance.load(run.evaluation), baseline, before_name=name))
    elif against is not None:
        raise UserError(
            f"--against: {run.path} has no {run.evaluation.name} to compare; run mtpd eval {run.path} first"
        )
    return sections


def _decoded(run: RunDirectory) -> Section | None:
    for path in (run.evaluation_decoded, run.decoded):
        if path.is_file():
            return Section("Decoded", Acceptance.load(path))
    return None


def _metrics(path: Path) -> list[Mapping[str, Any]]:
    """Lines of metrics.jsonl; a line that a kill tore is left out."""
    if not path.is_file():
        return []
    found: list[Mapping[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict) and "step" in content:
            found.append(content)
    return found


def _provenance(run: RunDirectory) -> dict[str, Any]:
    if not run.provenance.is_file():
        return {}
    content = read_sealed(run.provenance, refusal="not a provenance")
    prompts = content.pop("prompts", [])
    more = f"and {len(prompts) - SHOWN_PROMPTS} more" if len(prompts) > SHOWN_PROMPTS else ""
    return {**content, "prompts": [*prompts[:SHOWN_PROMPTS], *([more] if more else [])]}
