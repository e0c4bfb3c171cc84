"""Layouts of exports and their register; without PyTorch, so that a command line is read at once.

To add a layout, write a file of its name in `layouts/` with a `LAYOUT`. Another package calls `register` itself.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtpd.formats.family import Family
from mtpd.heads.chain.config import KIND as CHAIN_HEADS

if TYPE_CHECKING:  # brings in torch
    from mtpd.formats.exported_run import Run

ENGINES = {
    "transformers": "transformers",
    "vllm": "vLLM",
    "llama.cpp": "llama.cpp",
    "sglang": "SGLang (not run by mtpd's authors)",
}
"""Engines that `mtpd export` chooses a layout for, and how model cards call them."""

VLLM_YAML = "vllm.yaml"
"""In an export that vLLM loads: the base, what its config is told besides, and the drafts."""
VLLM = "{runner}vllm serve --config {out}/" + VLLM_YAML
SECOND_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
"""vLLM's variable that is 1 for its second model runner. Where that cannot run, vLLM then says so and ends."""
SGLANG = (
    "python -m sglang.launch_server --model-path {model} --speculative-algorithm NEXTN{draft} "
    "--speculative-num-steps {k} --speculative-eagle-topk 1"
)
PYTHON = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({path!r}%s)
words = AutoTokenizer.from_pretrained({path!r})
asked = words("Once upon a time", return_tensors="pt")
print(words.decode(model.generate(**asked, max_new_tokens=64%s)[0]))  # drafts {k} a round"""
"""With what `from_pretrained` and `generate` are told besides."""


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
    """Commands of the engines that load it: {out} is the directory ({path!r} in Python), {model} what is served (the
    directory, or the base beside it), {k} the drafts a round. VLLM, SGLANG and PYTHON are such commands."""
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
    vocabulary: bool = False
    """Whether engines draft over the heads' draft vocabulary, and not over all tokens."""
    checked: Callable[[Run, Path], str] | None = None
    """For what is no checkpoint of transformers: reads it back, raises MtpdError if it is not what it should be, and
    says what was found."""
    method: str = "mtp"
    """vLLM's method of speculative decoding."""
    overrides: Callable[[Run], Mapping[str, Any]] = lambda run: {}
    """Keys of the base's config that vLLM has to be told otherwise."""
    second_runner: bool = False
    """Whether vLLM drafts more than one token a round with the right blocks in its second model runner alone."""

    def speculative(self, out: str, drafts: int) -> dict[str, Any]:
        """vLLM's speculative_config."""
        return {"method": self.method, **({"model": out} if self.apart else {}), "num_speculative_tokens": drafts}

    def commands(self, *, out: str, base: str, drafts: int) -> dict[str, str]:
        """Gives the command of each engine, by the engine's name."""
        quoted = shlex.quote(out)
        values = {
            "out": quoted,
            "path": out,
            "model": shlex.quote(base) if self.apart else quoted,
            "draft": f" --speculative-draft-model-path {quoted}" if self.apart else "",
            "runner": f"{SECOND_RUNNER}=1 " if self.second_runner and drafts > 1 else "",
            "k": drafts,
        }
        return {engine: command.format(**values) for engine, command in self.serve.items()}


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
