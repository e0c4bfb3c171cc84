"""A dense Llama, Qwen2 or Qwen3 written exactly as a GLM-4.5 model, with heads as its MTP layers.

GLM's MTP layers have experts, and engines expect the base to have some: the MLPs of the base's last layer
and of the heads are cut along their width I. Half of it becomes the two shared experts, a quarter each two
routed ones, which a router of zeros always chooses both, each with weight 1/2; times
`routed_scaling_factor` 2 their sum is the MLP's. Engines hand on the state before the head's last norm, so
that more than one depth is the same only where `mtpd.formats.norm_folding` says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mtpd.formats.directory import CONFIG, INDEX, link_others, write_json, write_sharded
from mtpd.formats.exported_run import SIZES, Run
from mtpd.formats.families.glm4_moe import FAMILY
from mtpd.formats.find_heads import base_tensor
from mtpd.formats.layer_names import Tensors
from mtpd.formats.layout import VLLM, Layout
from mtpd.formats.norm_folding import same_size, upright
from mtpd.formats.tensors import Stored, computed, dtype_name, part, stored
from mtpd.formats.to_family import as_family

BASES = ("llama", "qwen2", "qwen3")
ROUTED = 2


def refused(run: Run) -> str | None:
    sizes = run.base.text_config
    if run.model_type not in BASES:
        return f"the base is {run.model_type}; accepted: {', '.join(BASES)}, or hf-mtp for transformers"
    if run.base.quantisation:
        return "the base is quantised, and its last MLP has to be cut; accepted: hf-mtp, mimo-draft"
    if sizes["intermediate_size"] % (2 * ROUTED):
        return f"its intermediate_size {sizes['intermediate_size']} is no multiple of 4; accepted: hf-mtp, mimo-draft"
    if any(sizes.get(key) for key in ("mlp_bias", "use_sliding_window")) or (
        run.model_type != "qwen2" and sizes.get("attention_bias")
    ):
        return "it has biases or a sliding window that GLM lacks; accepted: hf-mtp"
    heads, eps = run.heads(run.written), float(sizes.get("rms_norm_eps") or 1e-6)
    for index in _handed_on(run):
        if not same_size(heads[f"layers.{index}.block.norm.weight"].load(), eps=eps):
            return (
                "vLLM hands a head's state on before its last norm, and these heads have learned from the state after "
                "it; that is the same only where all gains of the norm are of one size, and those of head "
                f"{index + 1} are not; accepted: --depth 1, heads trained with heads.shared=true as mimo-draft, or "
                "hf-mtp for transformers"
            )
    return None


def _handed_on(run: Run) -> range:
    """The heads whose state another one reads, or they themselves at the next depth."""
    if run.depth == 1:
        return range(0)
    return range(1 if run.recycles else run.depth - 1)


def write(run: Run, folder: Path) -> None:
    base = run.base
    last = f"model.layers.{base.layers - 1}."
    tensors: Tensors = {}
    for name, tensor in base.tensors.items():
        if name.startswith(last + "mlp."):
            tensors |= _experts(name, tensor)
        else:
            tensors[name] = tensor
    tensors |= _router(run, last)
    # vLLM's GLM does not tie the output head to the embedding.
    unembedding = base_tensor(base, "unembedding")
    assert unembedding is not None, "a base has an embedding"
    tensors.setdefault("lm_head.weight", unembedding)
    own = run.heads(run.written)
    for index in _handed_on(run):
        own = upright(own, index)
    heads = as_family(own, FAMILY, heads=run.written, layers=base.layers)
    for index in range(run.written):
        tensors |= _router(run, f"model.layers.{base.layers + index}.")
    for name, tensor in heads.items():
        tensors |= _experts(name, tensor) if ".mlp." in name else {name: tensor}
    link_others(base.path, folder, without={*base.files, INDEX, CONFIG, "README.md"})
    write_sharded(folder, tensors)
    write_json(folder / CONFIG, _config(run))


def _experts(name: str, weight: Stored) -> Tensors:
    """The parts of one matrix of an MLP, cut along its width."""
    prefix, kind = name.split(".mlp.")
    columns = kind == "down_proj.weight"
    width = weight.shape[1 if columns else 0]
    half, quarter = width // 2, width // (2 * ROUTED)
    cuts = {f"{prefix}.mlp.shared_experts.{kind}": (0, half)}
    cuts |= {f"{prefix}.mlp.experts.{expert}.{kind}": (half + expert * quarter, quarter) for expert in range(ROUTED)}
    if columns:
        return {name: _columns(weight, start, count) for name, (start, count) in cuts.items()}
    size = weight.shape[1]
    return {name: part(weight, start * size, (count, size)) for name, (start, count) in cuts.items()}


def _columns(weight: Stored, start: int, count: int) -> Stored:
    return computed(weight, lambda matrix: matrix[:, start : start + count], (weight.shape[0], count))


def _router(run: Run, prefix: str) -> Tensors:
    return {
        f"{prefix}mlp.gate.weight": stored(torch.zeros(ROUTED, run.hidden_size, dtype=run.dtype)),
        f"{prefix}mlp.gate.e_score_correction_bias": stored(torch.zeros(ROUTED)),
    }


def _config(run: Run) -> dict[str, Any]:
    base = run.base.text_config
    sizes = {key: base[key] for key in SIZES if base.get(key) is not None}
    rope = dict(base.get("rope_parameters") or {})
    if not rope:
        rope = {
            "rope_type": "default",
            "rope_theta": base.get("rope_theta", 10000.0),
            **(base.get("rope_scaling") or {}),
        }
    rope["partial_rotary_factor"] = 1.0
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        **sizes,
        "tie_word_embeddings": False,
        "head_dim": base.get("head_dim") or base["hidden_size"] // base["num_attention_heads"],
        "attention_bias": run.model_type == "qwen2",
        "use_qk_norm": run.model_type == "qwen3",
        "rope_parameters": rope,
        "rope_theta": rope.get("rope_theta"),
        "partial_rotary_factor": 1.0,
        "first_k_dense_replace": run.base.layers - 1,
        "moe_intermediate_size": base["intermediate_size"] // (2 * ROUTED),
        "n_routed_experts": ROUTED,
        "n_shared_experts": 2,
        "num_experts_per_tok": ROUTED,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.0,
        "num_nextn_predict_layers": run.written,
        "dtype": dtype_name(run.dtype),
    }


# transformers names the MTP layers of the published sizes alone.
GENERATE = (
    'model = AutoModelForCausalLM.from_pretrained("{out}")\n'
    "first = model.config.num_hidden_layers\n"
    'model._keys_to_ignore_on_load_unexpected = [rf"model\\.layers\\.{{first + i}}\\." for i in range({n})]\n'
    "model.generate(**inputs, use_mtp=True)  # drafts {n} a round"
)

LAYOUT = Layout(
    "glm4moe",
    "base and heads written exactly as a GLM-4.5 model, which engines know with MTP",
    refused,
    write,
    {"vllm": VLLM, "transformers": GENERATE},
    rank=50,
    cut=".mlp.",
)
