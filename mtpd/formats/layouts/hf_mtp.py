"""transformers' own layout: heads as further layers, read by `generate(use_mtp=True)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from mtpd.formats.directory import write_beside
from mtpd.formats.exported_run import Run, changed_config
from mtpd.formats.families.transformers_native import FAMILY
from mtpd.formats.find_heads import HEAD_LIKE
from mtpd.formats.importing import exclude_from_quantisation
from mtpd.formats.layout import PYTHON, Layout
from mtpd.formats.to_family import as_family

BASES = ("llama", "mistral", "qwen2", "qwen3")
"""Bases that the layout is tested with."""

GENERATE = '''"""Generation with this checkpoint's MTP layers; transformers loads it with trust_remote_code=True."""

from transformers import GenerationMixin


def generate(*args, model, use_mtp=True, **kwargs):
    """`generate` of transformers, drafting with the MTP layers unless `use_mtp=False`."""
    first = model.config.get_text_config().num_hidden_layers
    count = model.config.get_text_config().num_mtp_layers
    # transformers finds the tensors of MTP layers by the patterns of names that the main model ignores.
    patterns = [rf"model\\.layers\\.{first + index}\\..*" for index in range(count)]
    model._keys_to_ignore_on_load_unexpected = patterns
    return GenerationMixin.generate(model, *args, use_mtp=use_mtp, **kwargs)
'''


def refused(run: Run) -> str | None:
    if run.model_type not in BASES:
        return (
            f"the base is {run.model_type}, and this layout is tested with {', '.join(BASES)}; accepted: one of those, "
            "or mtpd's own decoding (`mtpd generate`)"
        )
    if any(HEAD_LIKE.search(name) for name in run.base.tensors):
        return "the base has MTP heads of its own; accepted: in-place"
    return None


def write(run: Run, folder: Path) -> None:
    tensors = as_family(
        run.heads(run.depth), FAMILY, heads=run.depth, layers=run.base.layers, model_type=run.model_type
    )
    changes: dict[str, Any] = {"num_mtp_layers": run.depth}
    settings = AutoConfig.from_pretrained(run.base.path).get_text_config(decoder=True)
    kinds = getattr(settings, "layer_types", None)
    if kinds is None and getattr(settings, "sliding_window", None):
        # Mistral's decoder has one window for all layers; MTP layers have one only where a list of kinds says so.
        kinds = changes["layer_types"] = ["sliding_attention"] * run.base.layers
    if kinds is not None:
        layers = [run.config.source_layers[block] for block in run.config.block_of[: run.depth]]
        changes["mtp_layer_types"] = [kinds[layer] for layer in layers]
    config = changed_config(run.base, **changes)
    exclude_from_quantisation(config, [f"model.layers.{run.base.layers + index}" for index in range(run.depth)])
    write_beside(run.base, folder, tensors, config)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(GENERATE, encoding="utf-8")


LAYOUT = Layout(
    "hf-mtp",
    "the base with heads as further layers, in transformers' own MTP layout",
    refused,
    write,
    {"transformers": PYTHON % (", trust_remote_code=True", "")},
    rank=10,
    family=FAMILY,
)
