"""MiMo-7B's layout as a draft model beside any Llama or Qwen2 base: one block that engines use at every depth.

Beside an unchanged base, the block gets the base's state after its final norm.
"""

from __future__ import annotations

from pathlib import Path

import torch

from mtpd.formats.directory import CONFIG, write_json, write_sharded
from mtpd.formats.exported_run import KEYS, Run
from mtpd.formats.families.fastmtp import FAMILY
from mtpd.formats.layer_names import Tensors
from mtpd.formats.layout import SGLANG, VLLM, Layout
from mtpd.formats.layouts.hyv3_draft import quantised
from mtpd.formats.tensors import dtype_name, stored
from mtpd.formats.to_family import as_family

DRAFT_BASES = ("llama", "qwen2")
QKV = ("q_proj", "k_proj", "v_proj")


def refused(run: Run) -> str | None:
    return _needs_one_block(run) or _needs_qwen2_layers(run) or quantised(run)


def write(run: Run, folder: Path) -> None:
    """Config and heads alone; the base is served as it is."""
    tensors = as_family(run.heads(1), FAMILY, heads=1, layers=run.base.layers, model_type=run.model_type)
    # Qwen2's layers have biases of queries, keys and values, and Llama's have none.
    write_sharded(folder, _zero_biases(run) | tensors)
    base = run.base.text_config
    config = {
        "architectures": ["MiMoForCausalLM"],
        "model_type": "qwen2",
        "num_nextn_predict_layers": 1,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "dtype": dtype_name(run.dtype),
        **{key: base[key] for key in KEYS if base.get(key) is not None},
    }
    write_json(folder / CONFIG, config)


def _zero_biases(run: Run) -> Tensors:
    found: Tensors = {}
    for part in QKV:
        weight = run.tensors[f"layers.0.block.layers.0.self_attn.{part}.weight"]
        found[f"model.mtp_layers.0.self_attn.{part}.bias"] = stored(torch.zeros(weight.shape[0], dtype=run.dtype))
    return found


def _needs_one_block(run: Run) -> str | None:
    if run.recycles:
        return None
    return (
        f"the layout has one block that is used at every depth, and the run has {run.blocks} different ones; accepted: "
        "heads trained with heads.shared=true, --depth 1, or hf-mtp for transformers"
    )


def _needs_qwen2_layers(run: Run) -> str | None:
    if run.model_type not in DRAFT_BASES:
        return f"the base is {run.model_type}; accepted: {', '.join(DRAFT_BASES)}, or hf-mtp for transformers"
    sizes = run.base.text_config
    if sizes.get("head_dim") not in (None, sizes["hidden_size"] // sizes["num_attention_heads"]):
        return "its head_dim is not hidden_size / num_attention_heads, as Qwen2 has it; accepted: hf-mtp"
    if any(sizes.get(key) for key in ("mlp_bias", "use_sliding_window")):
        return "it has biases in its MLP or a sliding window, which the layout lacks; accepted: hf-mtp"
    if run.model_type == "llama" and sizes.get("attention_bias"):
        return "it has a bias in its attention's output, which the layout lacks; accepted: hf-mtp"
    return None


LAYOUT = Layout(
    "mimo-draft",
    "a draft model beside an unchanged base: one block that is used at every depth, under MiMo's names",
    refused,
    write,
    {"vllm": VLLM, "sglang": SGLANG},
    rank=20,
    family=FAMILY,
    apart=True,
    overrides=lambda run: {"num_nextn_predict_layers": 1},
)
