"""Layouts of exports and their register; without PyTorch, so that a command line is read at once.

To add a layout, write a file of its name in `layouts/` with a `LAYOUT`. Another package calls `register` itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtpd.formats.family import Family
from mtpd.heads.chain.config import KIND as CHAIN_HEADS

if TYPE_CHECKING:  # brings in torch
    from mtpd.formats.exported_run import Run

ENGINES = {"transformers": "transformers", "vllm": "vLLM", "sglang": "SGLang (not run by mtpd's authors)"}
"""Engines that `mtpd export` chooses a layout for, and how model cards call them."""

VLLM = "vllm serve {model}{overrides} --speculative-config '{speculative}'"
SGLANG = (
    "python -m sglang.launch_server --model-path {model} --speculative-algorithm NEXTN{draft} "
    "--speculative-num-steps {k} --speculative-eagle-topk 1"
)


@dataclass(frozen=True)
class Layout:
    """The entry of a layout."""

    name: str
    about: str
    """Says in the model card what the directory is."""
    refused: Callable[[Run], str | None]
    """Says why a run does not fit, with the alternative; None if it does."""
    write: Callable[[Run, Path], None]
    """Fills an empty directory, all but its model card."""
    serve: Mapping[str, str]
    """Commands of the engines that load it: {out} is the directory, {base} the base, {model} the one of them that is
    served, {k} the drafts a round, {n} the heads that were written. VLLM and SGLANG are such commands."""
    rank: int = 100
    """Of the layouts that an engine loads, the lowest that fits a run is chosen."""
    kind: str = CHAIN_HEADS.name
    """Kind of the heads that it is for."""
    family: Family | None = None
    """Family that an export is read with; None where its config says which."""
    apart: bool = False
    """Whether the heads lie alone, and the base is served as it is."""
    replaces: bool = False
    """Whether it is for bases with heads of their own. Those that are not replaced stay, and what engines load is what
    they load of the base's family."""
    cut: str | None = None
    """Part of the names of tensors that are cut into others. The rest is compared by name and shape alone."""
    vocabulary: bool = False
    """Whether engines draft over the heads' draft vocabulary, and not over all tokens."""
    method: str = "mtp"
    """vLLM's method of speculative decoding."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the base's config that vLLM has to be told otherwise."""

    def speculative(self, out: str, drafts: int) -> dict[str, Any]:
        """vLLM's speculative_config."""
        return {"method": self.method, **({"model": out} if self.apart else {}), "num_speculative_tokens": drafts}

    def commands(self, *, out: str, base: str, drafts: int, heads: int) -> dict[str, str]:
        """Gives the command of each engine, by the name that a model card has for it."""
        values = {
            "out": out,
            "base": base,
            "model": base if self.apart else out,
            "draft": f" --speculative-draft-model-path {out}" if self.apart else "",
            "overrides": f" --hf-overrides '{json.dumps(self.overrides)}'" if self.overrides else "",
            "speculative": json.dumps(self.speculative(out, drafts), ensure_ascii=False),
            "k": drafts,
            "n": heads,
        }
        return {ENGINES.get(engine, engine): command.format(**values) for engine, command in self.serve.items()}


LAYOUTS: dict[str, Layout] = {}
"""The layouts by name, in the order of their ranks; `mtpd.formats.layouts` fills it."""


def register(layout: Layout) -> Layout:
    """Adds a layout, and returns it. Its name has to be new."""
    assert layout.name not in LAYOUTS, f"a layout named {layout.name} is registered already"
    LAYOUTS[layout.name] = layout
    for name in sorted(LAYOUTS, key=lambda name: LAYOUTS[name].rank):
        LAYOUTS[name] = LAYOUTS.pop(name)
    return layout


def targets() -> list[str]:
    """Names the engines and layouts that `mtpd export --to` takes. Layouts of mtpd are named by their files."""
    files = sorted((Path(__file__).parent / "layouts").glob("[!_]*.py"))
    return list(dict.fromkeys([*ENGINES, *(file.stem.replace("_", "-") for file in files), *LAYOUTS]))
