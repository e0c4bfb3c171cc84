"""The model card of an export: what it is, what was measured, where it is from, and how it is served."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from mtpd.evaluate.acceptance import RANDOM, Acceptance, SuiteCounts
from mtpd.files import fingerprint_file
from mtpd.finished_run import EXPORTED
from mtpd.formats.exported_run import Run
from mtpd.formats.layout import ENGINES, Layout
from mtpd.formats.serving import commands
from mtpd.heads import WEIGHTS
from mtpd.recipe import dump
from mtpd.recipe.text import to_yaml

CARD = "README.md"
OWN_CARD = "README-mtpd.md"
"""Where the base's own card stays as it is."""

MEASURED = {
    "acceptance-decoded.json": "decoded: held-out prompts, really decoded, greedily",
    "acceptance.json": "offline: held-out prompts, teacher-forced over the base's greedy text",
}

SPEED_UPS = ("speed-up over generate", "speed-up over engine without drafts")
SPEED_UPS_ARE = (
    "Speed-ups are wall clock of mtpd's own decoding on the machine that trained the heads: over `generate` of "
    "transformers, whose slower loop is counted in, and over mtpd's engine without drafts, which is what drafts gain.\n"
)


def about(run: Run, layout: Layout) -> dict[str, Any]:
    """Contents of `mtpd.json`."""
    return {
        "schema": 1,
        "layout": layout.name,
        "engines": list(layout.serve),
        "base": run.model,
        "run": str(run.path.resolve()),
        "depth": run.depth,
        "shared": run.config.shared,
        "overrides": dict(layout.overrides(run)),
        "draft_vocabulary": run.config.vocabulary_size,
        "heads": fingerprint_file(run.path / "heads" / WEIGHTS),
    }


def model_card(run: Run, layout: Layout, output: Path, folder: Path) -> str:
    """Markdown with the metadata that model hubs read.

    Args:
        output: where the export will be.
        folder: where it lies until then.
    """
    blocks = "one block" if run.recycles else f"{run.blocks} different blocks"
    parts = [
        f"---\nlibrary_name: {next(iter(layout.serve), 'transformers')}\ntags:\n- mtp\n"
        f"- speculative-decoding\n{to_yaml({'base_model': run.model})}---\n",
        f"# {_inline(output.name)}\n",
        f"Multi-token-prediction heads for `{_inline(run.model)}`, trained by self-distillation with mtpd. "
        f"Layout `{layout.name}`: {layout.about}. Depth {run.depth}: {blocks}.\n",
        "Drafts are verified by the base's own output head, so the text is the base's.\n",
        "## Acceptance\n",
        *_acceptance(run, layout),
        "## Serving\n",
        *_serving(layout, about(run, layout), output, folder),
        "## Recipe\n",
        _fenced(dump(run.recipe), "yaml"),
    ]
    return "\n".join(parts)


def _inline(text: str) -> str:
    """Words of somebody else as a part of a line: no markup, no column of a table, no line of their own."""
    return " ".join(escape(text, quote=False).replace("|", "\\|").replace("`", "'").split())


def _fenced(text: str, language: str) -> str:
    """A block of code that nothing in it ends."""
    longest = max((len(found) for found in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}{fence}\n"


def _acceptance(run: Run, layout: Layout) -> list[str]:
    lines = []
    for file, how in MEASURED.items():
        if not (run.path / file).is_file():
            continue
        found = Acceptance.load(run.path / file)
        total = found.total()
        depth = min(run.depth, total.depth)
        # What was timed drafted so many tokens a round: it says nothing of an export with fewer heads.
        timed = depth == total.depth and total.speed_up is not None
        columns = ["suite", "prompts", *(f"CAR_{k + 1}" for k in range(depth)), "tau", *(SPEED_UPS if timed else ())]
        rows = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
        named: Mapping[str, SuiteCounts] = {**found.suites, "all": total}
        for name, suite in named.items():
            shares = [f"{share:.3f}" for share in suite.car[:depth]]
            cells = [_inline(name), str(suite.prompts), *shares, f"{1 + sum(suite.car[:depth]):.2f}"]
            if timed:
                cells += [_times(suite.speed_up), _times(suite.speed_up_over_engine)]
            rows.append(f"| {' | '.join(cells)} |")
        lines += [f"{how}.\n", "\n".join(rows) + "\n"]
        if timed:
            lines.append(SPEED_UPS_ARE)
        if found.random_trunk:
            lines.append(f"{RANDOM}\n")
    if not lines:
        return ["Not measured.\n"]
    if run.config.vocabulary_size and not layout.vocabulary:
        lines.append(
            f"Measured with a draft vocabulary of {run.config.vocabulary_size} tokens; engines draft over all tokens.\n"
        )
    return lines


def _times(speed_up: float | None) -> str:
    return "not measured" if speed_up is None else f"{speed_up:.2f}x"


def _serving(layout: Layout, says: Mapping[str, Any], output: Path, folder: Path) -> list[str]:
    found = commands(layout, says, output, written=folder)
    if not found:
        return ["No engine loads this directory by itself.\n"]
    named = {ENGINES.get(engine, engine): command for engine, command in found.items()}
    return [line for engine, command in named.items() for line in (f"{engine}:\n", f"```\n{command}\n```\n")]


def read_says(folder: Path) -> dict[str, Any] | None:
    """`mtpd.json` of an export, or None."""
    file = folder / EXPORTED
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
