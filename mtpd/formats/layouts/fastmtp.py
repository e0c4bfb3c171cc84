"""Base and block together under MiMo-7B's names, for SGLang, which hands the block the state after the final norm."""

from __future__ import annotations

from pathlib import Path

from mtpd.formats.directory import write_beside
from mtpd.formats.exported_run import Run
from mtpd.formats.families.fastmtp import FAMILY
from mtpd.formats.importing import exclude_from_quantisation
from mtpd.formats.layout import SGLANG, Layout
from mtpd.formats.layouts.mimo_draft import block, config_of, refused, zero_biases


def write(run: Run, folder: Path) -> None:
    """Base and heads; a Llama becomes a Qwen2 whose attention biases are zero."""
    added = block(run)
    for layer in range(run.base.layers):
        added |= zero_biases(run, f"model.layers.{layer}.")
    added = {name: tensor for name, tensor in added.items() if name not in run.base.tensors}
    config = config_of(run) | {"tie_word_embeddings": bool(run.base.config.get("tie_word_embeddings", False))}
    if run.base.quantisation:
        config["quantization_config"] = run.base.quantisation
        exclude_from_quantisation(config, ["model.mtp_layers.0"])
    write_beside(run.base, folder, added, config)


LAYOUT = Layout(
    FAMILY.name,
    "base and heads together under MiMo's names, for engines that hand on the state after the final norm",
    refused,
    write,
    {"sglang": SGLANG},
    rank=40,
    family=FAMILY,
)
