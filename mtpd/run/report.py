"""`mtpd report`: everything in a run directory as one HTML file."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtpd.errors import UserError
from mtpd.evaluate.acceptance import Acceptance
from mtpd.evaluate.depths import Depths
from mtpd.evaluate.gate import check_comparable
from mtpd.evaluate.other_model import Cost, cost
from mtpd.files import read_sealed, write_whole
from mtpd.finished_run import open_finished
from mtpd.recipe import Recipe
from mtpd.report.page import ReportContents, Section, render_report
from mtpd.report.samples import read_samples
from mtpd.run.directory import RunDirectory, warn_of_changes
from mtpd.run.material import other_families

logger = logging.getLogger(__name__)

SHOWN_PROMPTS = 5
"""Fingerprints of training prompts that the provenance shows; the others are counted."""


def report_run(path: Path, *, output: Path | None = None, against: Path | None = None) -> Path:
    """Writes the report of a run, from its files alone: no model is loaded.

    Args:
        output: the HTML file; `report.html` in the run directory by default.
        against: an acceptance file that the evaluation on suites is compared with.

    Returns:
        The HTML file.

    Raises:
        UserError: no run there, nothing measured yet, a file that cannot be read, or one that must not be compared.
    """
    recipe, run = open_finished(path, heads=None).recipe, RunDirectory(path)
    warn_of_changes(run)
    sections = _sections(recipe, run, against)
    if not sections:
        raise UserError(f"{path}: nothing is measured yet; finish the run with mtpd distill, or run mtpd eval {path}")
    contents = ReportContents(
        title=f"{recipe.model} · {path.resolve().name}",
        recipe=recipe.model_dump(mode="json"),
        provenance=_provenance(run),
        sections=sections,
        metrics=_metrics(run.metrics),
        samples=read_samples(run.samples),
        depths=_depths(run, sections),
        models=_other_models(run),
    )
    page = output or run.report
    write_whole(page, render_report(contents))
    return page


def _sections(recipe: Recipe, run: RunDirectory, against: Path | None) -> list[Section]:
    """All measurements of the run: on held-out prompts, then by `mtpd eval`."""
    sections = []
    for title, path, before in (
        ("Held-out prompts", run.acceptance, run.acceptance_before),
        ("Held-out prompts, decoded", run.decoded, run.decoded_before),
    ):
        if path.is_file():
            after = Acceptance.load(path)
            first = Acceptance.load(before) if before.is_file() else None
            # Heads that were kept as they started have changed in nothing.
            first = None if first is None or first.heads == after.heads else first
            sections.append(Section(title, after, first, apart=_apart(recipe, after)))
    if run.acceptance_trained.is_file():
        after, first = Acceptance.load(run.acceptance_trained), Acceptance.load(run.acceptance_before)
        sections.append(Section("Trained heads, not kept", after, first, apart=_apart(recipe, after), kept=False))
    baseline = None if against is None else Acceptance.load(against)
    for title, path in (("mtpd eval", run.evaluation), ("mtpd eval, decoded", run.evaluation_decoded)):
        if path.is_file():
            found = Acceptance.load(path)
            first = baseline if baseline is not None and baseline.mode == found.mode else None
            if first is not None:
                check_comparable(first, found, names=(str(against), str(path)))
            sections.append(Section(title, found, first, before_name="" if against is None else against.name))
    if baseline is not None and not any(section.before is baseline for section in sections):
        wanted = run.evaluation if baseline.mode == "offline" else run.evaluation_decoded
        raise UserError(
            f"--against: {run.path} has no {wanted.name} to compare; run mtpd eval {run.path} --against {against} first"
        )
    return sections


def _other_models(run: RunDirectory) -> list[Cost]:
    """What `mtpd eval --model` has measured of these heads, beside what they have under their own model."""
    if not run.evaluation.is_file():
        return []
    own, costs = Acceptance.load(run.evaluation), []
    for path in sorted(run.path.glob(f"{run.evaluation.stem}-*.json")):
        found = Acceptance.load(path)
        if found.mode != own.mode or found.heads_trunk != own.trunk or found.heads != own.heads:
            continue
        name = path.stem.removeprefix(f"{run.evaluation.stem}-")
        try:
            costs.append(cost(own, found, name=name))
        except UserError as error:
            logger.warning("%s is not shown: %s", path, error)
    return costs


def _apart(recipe: Recipe, acceptance: Acceptance) -> tuple[str, ...]:
    return tuple(name for name in acceptance.suites if name in other_families(recipe))


def _depths(run: RunDirectory, sections: Sequence[Section]) -> Depths | None:
    """Tokens/s by number of drafts, unless they are those of other heads."""
    if not run.depths.is_file():
        return None
    found = Depths.load(run.depths)
    heads = {section.after.heads for section in sections}
    return found if not found.heads or found.heads in heads else None


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
