"""HY-V3's layout as a draft model beside a Llama, Mistral or Qwen3: a block of its own for each depth, in stock vLLM.

vLLM builds the blocks out of the config of the base, and so that config is told what it lacks (`overrides`). With more
than one block it takes its second model runner, which hands each block the state of the one before, after its norm,
and keeps a cache for each: what heads of mtpd learn with. The embedding at position 0 is zeroed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtpd.formats.directory import CONFIG, write_json, write_sharded
from mtpd.formats.exported_run import KEYS, Run
from mtpd.formats.families.hy_v3 import FAMILY
from mtpd.formats.layout import VLLM, Layout
from mtpd.formats.tensors import dtype_name
from mtpd.formats.to_family import as_family

BASES = ("llama", "mistral", "qwen3")
NORMED = ("qwen3",)
"""Bases that norm queries and keys."""

BIASES = ("attention_bias", "mlp_bias")


def refused(run: Run) -> str | None:
    sizes = run.base.text_config
    if run.model_type == "qwen2":
        return (
            "a qwen2 has biases in its attention, and the layout's block has none; accepted: mimo-draft for one block "
            "(heads.shared=true, or --depth 1), or hf-mtp for transformers"
        )
    if run.model_type not in BASES or sizes is not run.base.config:
        return (
            f"the base is {run.model_type}{' inside of another model' * (sizes is not run.base.config)}; accepted: "
            f"{', '.join(BASES)}, or hf-mtp for transformers"
        )
    if biases := next((key for key in BIASES if sizes.get(key)), None):
        return f"the base has {biases}: true, and the layout's block has no biases; accepted: hf-mtp for transformers"
    # Llama's classes read no window, and Qwen's none that `use_sliding_window` leaves out.
    if sizes.get("use_sliding_window", run.model_type == "mistral") and (window := sizes.get("sliding_window")):
        return (
            f"the base has sliding_window: {window}, and the layout's block has no window; accepted: hf-mtp for "
            "transformers"
        )
    if sizes.get("hidden_act", "silu") != "silu":
        return f"the base has hidden_act: {sizes['hidden_act']}; accepted: silu, or hf-mtp for transformers"
    return quantised(run)


def quantised(run: Run) -> str | None:
    """Refuses a quantised base: vLLM builds the blocks of a draft model in the base's form."""
    if run.base.quantisation is None:
        return None
    return (
        f"the base is quantised ({run.base.quantisation.get('quant_method')}), and vLLM would read the heads in its "
        "form; accepted: a base in 16 bits, or hf-mtp for transformers"
    )


def write(run: Run, folder: Path) -> None:
    """Config and heads alone; the base is served as it is."""
    heads = run.heads(run.depth)
    tensors = as_family(heads, FAMILY, heads=run.depth, layers=run.base.layers, model_type=run.model_type)
    write_sharded(folder, tensors)
    base = run.base.text_config
    config = {
        "architectures": ["HYV3ForCausalLM"],
        "model_type": "hy_v3",
        **{key: base[key] for key in KEYS if base.get(key) is not None},
        "head_dim": base.get("head_dim") or base["hidden_size"] // base["num_attention_heads"],
        "tie_word_embeddings": False,
        "dtype": dtype_name(run.dtype),
        **overrides(run),
    }
    write_json(folder / CONFIG, config)


def overrides(run: Run) -> dict[str, Any]:
    """Keys that the layout's block has and the base's config lacks. No block has experts: all are below this number."""
    normed = {"qk_norm": True} if run.model_type in NORMED else {}
    return {
        "num_nextn_predict_layers": run.depth,
        "first_k_dense_replace": run.base.layers + run.depth,
        **normed,
    }


LAYOUT = Layout(
    "hyv3-draft",
    "a draft model beside an unchanged base: a block for each depth, under HY-V3's names; vLLM 0.28 and later use them "
    "all in the model runner for GPUs, and the one for CPUs the first of them alone",
    refused,
    write,
    {"vllm": VLLM},
    rank=15,
    family=FAMILY,
    apart=True,
    overrides=overrides,
    second_runner=True,
)
