"""The same results for other readers: Markdown for a pull request, JUnit XML for a CI system."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mtpd.evaluate.acceptance import RANDOM, Acceptance, SuiteCounts
from mtpd.evaluate.gate import COMPARED, Comparison, Verdict, label
from mtpd.evaluate.run_tables import TOTAL, listed
from mtpd.evaluate.tables import Estimates, interval_note
from mtpd.evaluate.worst import SliceChange

if TYPE_CHECKING:  # brings in torch
    from mtpd.evaluate.trunk_quality import TrunkQuality

MARKS = {"passed": "✅", "failed": "❌", "undecided": "❔"}


def markdown(
    acceptance: Acceptance,
    estimates: Estimates,
    *,
    comparison: Comparison | None = None,
    verdicts: Sequence[Verdict] = (),
    moved: Sequence[SliceChange] = (),
    sparklines: Mapping[str | None, str] | None = None,
    quality: Mapping[str, tuple[TrunkQuality, TrunkQuality]] | None = None,
) -> str:
    """A comment for a pull request: verdicts, the change of each suite and slice, and all ratios with intervals.

    Args:
        moved: slices whose tau has changed.
        sparklines: tau of earlier results by suite.
    """
    lines = ["### Draft acceptance", ""]
    for verdict in verdicts:
        lines += [f"{MARKS[verdict.outcome]} **{verdict.line}**", ""]
    if comparison is not None:
        names = [name for name in COMPARED if name in comparison.suites[None]]
        lines += _row(["suite", "prompts", *map(label, names)], head=True)
        for suite, changes in listed(comparison.suites):
            cells = [f"{changes[n].before:.3f} → {changes[n].after:.3f} ({changes[n].shown()})" for n in names]
            lines += _row([suite or f"**{TOTAL}**", str(comparison.prompts[suite]), *cells])
        lines += ["", *(f"- {note}" for note in comparison.notes)]
    if moved:
        lines += ["", "Slices that moved:", ""]
        lines += _row(["slice", "prompts", "tau"], head=True)
        for each in moved:
            lines += _row([each.label, str(each.prompts), each.shown().removeprefix("tau ")])
    if sparklines:
        lines += ["", "tau over the last results:", ""]
        lines += _row(["suite", "tau"], head=True)
        lines += [line for suite, drawn in sparklines.items() for line in _row([suite or f"**{TOTAL}**", drawn])]
    if quality:
        lines += ["", "Main head, before → after the run:", ""]
        lines += _row(["suite", "perplexity", "exact match"], head=True)
        for name, (before, after) in quality.items():
            match = "" if before.score is None or after.score is None else f"{before.score:.3f} → {after.score:.3f}"
            lines += _row([name, f"{before.perplexity:.4f} → {after.perplexity:.4f}", match])
    if acceptance.random_trunk and comparison is None:
        lines += ["", RANDOM]
    lines += ["", f"<details><summary>All ratios, {acceptance.mode}{interval_note(estimates)}</summary>", ""]
    ratios = list(estimates[None])
    lines += _row(["suite", "prompts", *map(label, ratios), "control CAR_1"], head=True)
    for suite, found in listed(estimates):
        counts = acceptance.total() if suite is None else acceptance.suites[suite]
        control = f"{counts.control.car[0]:.3f}" if counts.control else ""
        cells = [found[name].text() if name in found else "" for name in ratios]
        lines += _row([suite or f"**{TOTAL}**", _prompts(counts), *cells, control])
    lines += ["", "</details>", "", f"Trunk `{acceptance.trunk[:12]}`, heads `{acceptance.heads[:12]}`."]
    return "\n".join(lines) + "\n"


def _prompts(counts: SuiteCounts) -> str:
    return str(counts.prompts) + (f" ({counts.trained} trained on)" if counts.trained else "")


def _row(cells: list[str], *, head: bool = False) -> list[str]:
    line = "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    return [line, "|" + "|".join(["---"] + ["---:"] * (len(cells) - 1)) + "|"] if head else [line]


def junit(acceptance: Acceptance, estimates: Estimates, *, seconds: float, verdicts: Sequence[Verdict] = ()) -> str:
    """JUnit XML: a test case for each suite that says its numbers, and one for each verdict.

    A regression is a failure; an undecided gate is an error, because it has found nothing out.
    """
    suite = ET.Element("testsuite", name="mtpd.acceptance", time=f"{seconds:.3f}")
    for name, found in estimates.items():
        case = ET.SubElement(suite, "testcase", classname=f"mtpd.acceptance.{acceptance.mode}", name=name or TOTAL)
        values = [f"{label(ratio)} {estimate.text()}" for ratio, estimate in found.items()]
        ET.SubElement(case, "system-out").text = "\n".join(values)
    for verdict in verdicts:
        case = ET.SubElement(suite, "testcase", classname="mtpd.gate", name=f"{verdict.option} {verdict.limit}")
        if verdict.outcome != "passed":
            kind = "failure" if verdict.outcome == "failed" else "error"
            problem = ET.SubElement(case, kind, message=verdict.line, type=verdict.outcome)
            problem.text = "\n".join(verdict.reasons)
    outcomes = [case.find("failure") is not None for case in suite], [case.find("error") is not None for case in suite]
    suite.set("tests", str(len(suite)))
    suite.set("failures", str(sum(outcomes[0])))
    suite.set("errors", str(sum(outcomes[1])))
    ET.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(suite, encoding="unicode") + "\n"
