"""MiMo-7B's layout around any Llama or Qwen2 base: one block that engines use at every depth.

Self-contained, engines differ in what they hand to the block: vLLM the base's state before its final norm,
SGLang the state after it. As a draft model beside an unchanged base it is the state after the norm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mtpd.formats.directory import CONFIG, INDEX, link_others, write_beside, write_json, write_sharded
from mtpd.formats.exported_run import SIZES, Run, dtype_name
from mtpd.formats.families import FAMILIES
from mtpd.formats.importing import exclude_from_quantisation
from mtpd.formats.layer_names import Tensors
from mtpd.formats.norm_folding import same_size
from mtpd.formats.tensors import stored
from mtpd.formats.to_family import as_family

FAMILY = FAMILIES["fastmtp"]
DRAFT_BASES = ("llama", "qwen2")
QKV = ("q_proj", "k_proj", "v_proj")
KEYS = (*SIZES, "rope_parameters", "rope_scaling", "rope_theta")
"""What Qwen2's config has of a Llama's or a Qwen2's."""


def draft_refused(run: Run) -> str | None:
    return _needs_one_block(run) or _needs_qwen2_layers(run)


def fastmtp_refused(run: Run) -> str | None:
    return _needs_one_block(run) or _needs_qwen2_layers(run)


def refused(run: Run) -> str | None:
    reason = _needs_one_block(run) or _needs_qwen2_layers(run)
    if reason is None:
        gain = run.base_norm().load()
        # Signs could only be moved into the whole base (`mtpd.formats.norm_folding`).
        if not same_size(gain, eps=float(run.base.text_config.get("rms_norm_eps") or 1e-6)) or not bool(
            (gain > 0).all()
        ):
            return (
                "the engine hands on the base's state before its final norm, and the heads have learned from the "
                "state after it; that is the same only where all gains of the norm are equal, and here they are not; "
                "accepted: mimo-draft, hf-mtp"
            )
    return reason


def write_draft(run: Run, folder: Path) -> None:
    """Config and heads alone; the base is served as it is."""
    write_sharded(folder, _heads(run))
    write_json(folder / CONFIG, _config(run))


def write(run: Run, folder: Path) -> None:
    """Base and heads; a Llama becomes a Qwen2 whose attention biases are zero."""
    added = _heads(run)
    for layer in range(run.base.layers):
        added |= _zero_biases(run, f"model.layers.{layer}.")
    added = {name: tensor for name, tensor in added.items() if name not in run.base.tensors}
    link_others(run.base.path, folder, without={*run.base.files, INDEX, CONFIG, "README.md"})
    write_beside(run.base, folder, added, name="model-mtp.safetensors")
    config = _config(run) | {"tie_word_embeddings": bool(run.base.config.get("tie_word_embeddings", False))}
    if run.base.quantisation:
        config["quantization_config"] = run.base.quantisation
        exclude_from_quantisation(config, ["model.mtp_layers.0"])
    write_json(folder / CONFIG, config)


def _heads(run: Run) -> Tensors:
    tensors = as_family(run.heads(1), FAMILY, heads=1, layers=run.base.layers, model_type=run.model_type)
    return tensors | {
        name: tensor for name, tensor in _zero_biases(run, "model.mtp_layers.0.").items() if name not in tensors
    }


def _zero_biases(run: Run, prefix: str) -> Tensors:
    """Biases of queries, keys and values, which Qwen2 has and Llama has not."""
    found: Tensors = {}
    for part in QKV:
        weight = run.tensors[f"layers.0.block.layers.0.self_attn.{part}.weight"]
        found[f"{prefix}self_attn.{part}.bias"] = stored(torch.zeros(weight.shape[0], dtype=run.dtype))
    return found


def _config(run: Run) -> dict[str, Any]:
    base = run.base.text_config
    config = {key: base[key] for key in KEYS if base.get(key) is not None}
    return {
        "architectures": ["MiMoForCausalLM"],
        "model_type": "qwen2",
        "num_nextn_predict_layers": 1,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "dtype": dtype_name(run.dtype),
        **config,
    }


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
