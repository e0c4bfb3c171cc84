"""Heads alone, for vLLM with the plugin `mtpd-vllm` (plugins/vllm), which comes with the export.

The tensors have transformers' names for MTP layers. Beside them lie the output head's rows for a draft vocabulary, and
a few rows of the base's embedding, by which the plugin sees that it serves the base that the heads are for.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from mtpd.formats.directory import CONFIG, write_json, write_sharded
from mtpd.formats.engines.plugin import PLUGIN, plugin_folder
from mtpd.formats.exported_run import Run
from mtpd.formats.families.transformers_native import FAMILY
from mtpd.formats.find_heads import base_tensor
from mtpd.formats.importing import without_declarations
from mtpd.formats.layer_names import Tensors
from mtpd.formats.layout import VLLM, Layout
from mtpd.formats.tensors import FLOATS, cast, dtype_name, joined, part, read_header, stored
from mtpd.formats.to_family import as_family
from mtpd.heads import WEIGHTS

BASES = ("llama", "mistral", "qwen2", "qwen3")
SAMPLED = 16
"""Rows of the embedding that are kept."""
LEFT_OUT = ("auto_map", "layer_types", "quantization_config", "torch_dtype", "transformers_version")
"""Keys of the base's config that say nothing of heads; as those that begin with _, such as its name, do not."""


def refused(run: Run) -> str | None:
    sizes = run.base.text_config
    if run.model_type not in BASES:
        return f"the base is {run.model_type}; accepted: {', '.join(BASES)}, or hf-mtp for transformers"
    windowed = sizes.get("use_sliding_window") if run.model_type.startswith("qwen") else sizes.get("sliding_window")
    if windowed:
        return "the base's attention has a sliding window, which the plugin lacks; accepted: hf-mtp for transformers"
    for what in ("embedding", "unembedding"):
        tensor = base_tensor(run.base, what)
        if tensor is None or tensor.dtype not in FLOATS:
            return f"the base's {what} is quantised; accepted: a base with its {what} in 16 or 32 bits"
    return None


def write(run: Run, folder: Path) -> None:
    layers = run.base.layers
    tensors = as_family(run.heads(run.written), FAMILY, heads=run.written, layers=layers, model_type=run.model_type)
    write_sharded(folder, tensors | _sample(run) | _draft_vocabulary(run))
    write_json(folder / CONFIG, _config(run))
    shutil.copytree(plugin_folder(), folder / PLUGIN, ignore=shutil.ignore_patterns("tests", "__pycache__"))


def _sample(run: Run) -> Tensors:
    embedding = base_tensor(run.base, "embedding")
    assert embedding is not None, "a base has an embedding"
    count, size = embedding.shape
    ids = torch.linspace(1, count - 1, min(SAMPLED, count - 1)).long().unique()
    rows = [part(embedding, int(token) * size, (size,)) for token in ids]
    return {"base_sample.ids": stored(ids), "base_sample.rows": joined(rows, (len(ids), size))}


def _draft_vocabulary(run: Run) -> Tensors:
    if not run.config.vocabulary_size:
        return {}
    unembedding = base_tensor(run.base, "unembedding")
    assert unembedding is not None, "a base has an unembedding"
    ids = read_header(run.path / "heads" / WEIGHTS)[0]["vocabulary"].load()
    size = unembedding.shape[1]
    rows = joined([part(unembedding, int(token) * size, (size,)) for token in ids], (len(ids), size))
    return {"draft_ids": stored(ids), "lm_head.weight": cast(rows, run.dtype)}


def _config(run: Run) -> dict[str, Any]:
    declared = without_declarations(run.base.text_config)
    base = {key: value for key, value in declared.items() if key not in LEFT_OUT and not key.startswith("_")}
    return base | {
        "architectures": ["MtpdChainMTP"],
        "model_type": "mtp",
        "base_model_type": run.model_type,
        # Layers in the file. How many heads they make, one may be several, is the length of the list.
        FAMILY.counts[0]: run.written,
        "block_of": _blocks(run),
        "draft_vocab_size": run.config.vocabulary_size,
        "dtype": dtype_name(run.dtype),
    }


def _blocks(run: Run) -> list[int]:
    """By depth, the number of its block; one with an adapter is a block of its own."""
    adapters = run.config.adapters or [0] * run.config.depth
    kinds = [
        (block, place if rank else -1)
        for place, (block, rank) in enumerate(zip(run.config.block_of, adapters, strict=True))
    ][: run.depth]
    return [list(dict.fromkeys(kinds)).index(kind) for kind in kinds]


LAYOUT = Layout(
    "mtpd-vllm",
    "heads alone beside an unchanged base, for vLLM with the plugin that lies in the directory",
    refused,
    write,
    {"vllm": f"pip install {{out}}/{PLUGIN}  # once, in vLLM's environment\n{VLLM}"},
    rank=30,
    family=FAMILY,
    apart=True,
    vocabulary=True,
)
