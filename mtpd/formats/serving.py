"""How an export is served: a command for each engine that loads it, vLLM's config file, and a first request."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtpd.formats.directory import Checkpoint
from mtpd.formats.exported_run import Run
from mtpd.formats.find_heads import find_heads
from mtpd.formats.importing import open_checkpoint
from mtpd.formats.layout import ENGINES, VLLM_YAML, Layout
from mtpd.recipe.text import to_yaml

PORTS = {"vllm": 8000, "llama.cpp": 8080, "sglang": 30000}
"""Where engines with OpenAI's interface listen unless they are told otherwise."""

ASK = (
    "curl http://localhost:{port}/v1/completions -H 'Content-Type: application/json' "
    '-d \'{{"prompt": "Once upon a time", "max_tokens": 64, "temperature": 0}}\''
)


def commands(layout: Layout, says: Mapping[str, Any], output: Path, *, written: Path | None = None) -> dict[str, str]:
    """Gives the command with which each engine serves an export.

    Args:
        says: the contents of its `mtpd.json`.
        output: its directory.
        written: where it lies as long as it is being written.
    """
    found = layout.commands(out=str(output), base=base_of(str(says["base"])), drafts=int(says["depth"]))
    if not layout.replaces:
        return found
    # The base's own family decides.
    known = find_heads(Checkpoint(written or output)).family.engines
    return {engine: command for engine, command in found.items() if ENGINES[engine].startswith(known)}


def base_of(model: str) -> str:
    """What an engine is told to serve: a directory as a whole path, from wherever it is started, or a hub id."""
    if model in ("demo", "tiny") or Path(model).expanduser().is_dir():
        return str(open_checkpoint(model).path.resolve())
    return model


def vllm_config(run: Run, layout: Layout, output: Path) -> str:
    """YAML for `vllm serve --config`."""
    out = str(output.resolve())
    content: dict[str, Any] = {"model": base_of(run.model) if layout.apart else out}
    if overrides := layout.overrides(run):
        content["hf-overrides"] = dict(overrides)
    content["speculative-config"] = layout.speculative(out, run.depth)
    return f"# The file names places: where this directory or its base moves, change them here.\n{to_yaml(content)}"


def write_vllm_config(run: Run, layout: Layout, folder: Path, output: Path) -> None:
    """Writes the file into an export that vLLM loads."""
    if "vllm" in layout.serve:
        (folder / VLLM_YAML).unlink(missing_ok=True)
        (folder / VLLM_YAML).write_text(vllm_config(run, layout, output), encoding="utf-8")


def to_a_completion(layout: Layout, says: Mapping[str, Any], output: Path, *, engine: str) -> list[str]:
    """Gives the commands that lead from an export to its first text: to serve it, and to ask.

    Args:
        engine: which one; of a layout that was chosen by its name, the first that loads it is taken.
    """
    known = commands(layout, says, output)
    chosen = engine if engine in known else next(iter(known), None)
    if chosen is None:
        return []
    asked = [ASK.format(port=PORTS[chosen])] if chosen in PORTS else []
    return [known[chosen], *asked]
