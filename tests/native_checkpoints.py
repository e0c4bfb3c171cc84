"""Tiny checkpoints of every family, with random weights: from transformers' own classes where they have the family."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

Tensors = dict[str, Tensor]

D, V, L = 32, 264, 3
SMALL = architectures.SIZES | {"vocab_size": V}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
GROUPS = {"n_group": 1, "topk_group": 1, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
FULL = ["linear_attention", "full_attention", "full_attention"]
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": FULL,
}

CONFIGS: dict[str, tuple[Callable[..., PretrainedConfig], dict[str, Any]]] = {
    "deepseek-v3": (
        transformers.DeepseekV3Config,
        {
            **SMALL, **EXPERTS, **GROUPS, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4, "rope_parameters": ROPE,
        },
    ),
    "glm4moe": (transformers.Glm4MoeConfig, {**SMALL, **EXPERTS, **GROUPS, "head_dim": 8, "use_qk_norm": True}),
    "qwen3-next": (
        transformers.Qwen3NextConfig,
        {**SMALL, **EXPERTS, **LINEAR, "head_dim": 8, "num_experts": 4, "shared_expert_intermediate_size": 16},
    ),
    "qwen3.5": (transformers.Qwen3_5TextConfig, {**SMALL, **LINEAR, "head_dim": 8}),
    "qwen3.5-moe": (
        transformers.Qwen3_5MoeTextConfig,
        {**SMALL, **EXPERTS, **LINEAR, "head_dim": 8, "num_experts": 4, "shared_expert_intermediate_size": 16},
    ),
    "exaone-moe": (
        transformers.ExaoneMoeConfig,
        {
            **SMALL, **EXPERTS, "head_dim": 8, "num_experts": 4, "num_shared_experts": 1, "n_group": 1, "topk_group": 1,
            "layer_types": ["full_attention"] * L, "mlp_layer_types": ["dense", "sparse", "sparse"],
            "first_k_dense_replace": 1,
        },
    ),
    "transformers": (transformers.LlamaConfig, {**SMALL, "tie_word_embeddings": False}),
}  # fmt: skip
"""Families whose base transformers builds: the heads' layer is one of its layers."""

RUNNING = tuple(CONFIGS)


def base_model(name: str) -> PreTrainedModel:
    """A tiny random base of a family."""
    torch.manual_seed(1)
    build, sizes = CONFIGS[name]
    model = AutoModelForCausalLM.from_config(build(**copy.deepcopy(sizes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
            else:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))
    return model


def random_like(shapes: dict[str, tuple[int, ...]], *, seed: int = 7, dtype: torch.dtype = torch.float32) -> Tensors:
    """Random tensors; gains are near 1, or near 0 for norms that store a gain less 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    return {name: (tensor + (tensor.ndim == 1)).to(dtype) for name, tensor in tensors.items()}


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """As transformers saves it, with a tokenizer and its chat template."""
    model.save_pretrained(folder)
    from mtpd.data.builtin_models import tiny_tokenizer

    tiny_tokenizer().save_pretrained(folder)


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes, indent=2))


def add_tensors(folder: Path, tensors: Tensors, *, file: str = "model-mtp.safetensors") -> None:
    """A further shard of a checkpoint, with the index that it then needs."""
    with safe_open(folder / "model.safetensors", "pt") as opened:
        names = sorted(opened.keys())
    (folder / "model.safetensors").rename(folder / "model-base.safetensors")
    save_file(tensors, folder / file, metadata={"format": "pt"})
    weights = dict.fromkeys(names, "model-base.safetensors") | dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))


def in_blocks(weight: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Numbers in FP8 and a scale for each block, element by element."""
    high, wide = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
    numbers, scales = torch.zeros(weight.shape, dtype=torch.float8_e4m3fn), torch.zeros(high, wide)
    for a in range(high):
        for b in range(wide):
            part = weight[a * rows : (a + 1) * rows, b * columns : (b + 1) * columns]
            scales[a, b] = part.abs().max() / 448
            numbers[a * rows : (a + 1) * rows, b * columns : (b + 1) * columns] = (part / scales[a, b]).to(
                torch.float8_e4m3fn
            )
    return numbers, scales


def layer_of(folder: Path, number: int = L - 1) -> dict[str, tuple[int, ...]]:
    """Names behind the prefix, and shapes, of a layer of a saved base."""
    with safe_open(folder / "model.safetensors", "pt") as opened:
        prefix = f"model.layers.{number}."
        return {
            name.removeprefix(prefix): tuple(opened.get_slice(name).get_shape())
            for name in sorted(opened.keys())
            if name.startswith(prefix)
        }


MIXING = {"enorm.weight": (D,), "hnorm.weight": (D,), "eh_proj.weight": (D, 2 * D), "shared_head.norm.weight": (D,)}
QWEN = {
    "pre_fc_norm_embedding.weight": (D,),
    "pre_fc_norm_hidden.weight": (D,),
    "fc.weight": (D, 2 * D),
    "norm.weight": (D,),
}


def head_shapes(name: str, layer: dict[str, tuple[int, ...]], count: int) -> dict[str, tuple[int, ...]]:
    """Tensors of the heads of a family that transformers builds bases of, written out name by name."""
    if name in ("deepseek-v3", "glm4moe", "transformers"):
        return {
            f"model.layers.{L + i}.{part}": shape for i in range(count) for part, shape in {**MIXING, **layer}.items()
        }
    layers = {f"mtp.layers.{i}.{part}": shape for i in range(count) for part, shape in layer.items()}
    return {f"mtp.{part}": shape for part, shape in QWEN.items()} | layers


KEYS = {
    "deepseek-v3": "num_nextn_predict_layers",
    "glm4moe": "num_nextn_predict_layers",
    "qwen3-next": "num_nextn_predict_layers",
    "qwen3.5": "mtp_num_hidden_layers",
    "qwen3.5-moe": "mtp_num_hidden_layers",
    "exaone-moe": "num_nextn_predict_layers",
    "transformers": "num_mtp_layers",
}


def native_checkpoint(name: str, folder: Path, *, count: int = 1, dtype: torch.dtype = torch.float32) -> Tensors:
    """Writes a tiny checkpoint of a family with heads. Gives the heads' tensors."""
    save_model(base_model(name), folder)
    tensors = random_like(head_shapes(name, layer_of(folder), count), dtype=dtype)
    if name == "deepseek-v3":
        # Published checkpoints repeat the embedding and the output head in the head's layer.
        with safe_open(folder / "model.safetensors", "pt") as opened:
            tensors |= {
                f"model.layers.{L}.embed_tokens.weight": opened.get_tensor("model.embed_tokens.weight"),
                f"model.layers.{L}.shared_head.head.weight": opened.get_tensor("lm_head.weight"),
            }
    add_tensors(folder, tensors)
    edit_config(folder, **{KEYS[name]: count})
    return tensors


ATTENTION = {f"self_attn.{part}_proj.weight": (D, D) for part in "qkvo"}
MLP = {"mlp.gate_proj.weight": (48, D), "mlp.up_proj.weight": (48, D), "mlp.down_proj.weight": (D, 48)}
NORMS = {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}
LAYER = {**ATTENTION, **MLP, **NORMS}
MIMO = {
    "token_layernorm.weight": (D,),
    "hidden_layernorm.weight": (D,),
    "input_proj.weight": (D, 2 * D),
    "final_layernorm.weight": (D,),
}
MIXED = {"enorm.weight": (D,), "hnorm.weight": (D,), "eh_proj.weight": (D, 2 * D), "final_layernorm.weight": (D,)}
EXPERT_MLP = {f"mlp.experts.{e}.{name.removeprefix('mlp.')}": shape for e in range(4) for name, shape in MLP.items()}

Shapes = dict[str, tuple[int, ...]]


def _each(prefix: str, parts: Shapes, count: int = 1) -> Shapes:
    return {prefix.format(i=i, n=L + i) + name: shape for i in range(count) for name, shape in parts.items()}


BY_NAME: dict[str, tuple[dict[str, Any], Shapes]] = {
    "mimo": (
        {"model_type": "mimo", "architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1},
        _each("model.mtp_layers.{i}.", {**MIMO, **LAYER}),
    ),
    "mimo-v2": (
        {"model_type": "mimo_v2_flash"},
        _each(
            "model.mtp.layers.{i}.",
            {**MIXED, **ATTENTION, **MLP, "input_layernorm.weight": (D,), "pre_mlp_layernorm.weight": (D,)},
            2,
        ),
    ),
    "ernie4.5-moe": (
        {"model_type": "ernie4_5_moe", "num_nextn_predict_layers": 1},
        {
            "model.mtp_emb_norm.0.weight": (D,),
            "model.mtp_hidden_norm.0.weight": (D,),
            "model.mtp_linear_proj.0.weight": (D, 2 * D),
            **_each("model.mtp_block.0.", LAYER),
        },
    ),
    "hy-v3": (
        {"model_type": "hy_v3", "architectures": ["HYV3ForCausalLM"], "num_nextn_predict_layers": 2},
        _each("model.layers.{n}.", {**MIXED, **LAYER}, 2),
    ),
    "step3.5": (
        {"model_type": "step3p5", "num_nextn_predict_layers": 3},
        _each(
            "model.layers.{n}.",
            {
                "enorm.weight": (D,),
                "hnorm.weight": (D,),
                "eh_proj.weight": (D, 2 * D),
                "transformer.shared_head.norm.weight": (D,),
                "transformer.shared_head.output.weight": (V, D),
                **LAYER,
            },
            3,
        ),
    ),
    "nemotron-h": (
        {"model_type": "nemotron_h", "num_nextn_predict_layers": 2, "mtp_layers_block_type": ["attention", "moe"]},
        {
            f"mtp.layers.{sub}.{name}": shape
            for sub in range(4)
            for name, shape in (
                {
                    "enorm.weight": (D,),
                    "hnorm.weight": (D,),
                    "eh_proj.weight": (D, 2 * D),
                    "mixer.q_proj.weight": (D, D),
                }
                if sub % 2 == 0
                else {"mixer.experts.0.up_proj.weight": (16, D), "final_layernorm.weight": (D,)}
            ).items()
        },
    ),
    "inkling": (
        {"model_type": "inkling", "mtp_config": {"num_nextn_predict_layers": 2}},
        {
            "model.mtp.chain_norm.weight": (D,),
            **_each(
                "model.mtp.layers.{i}.",
                {"embed_norm.weight": (D,), "hidden_norm.weight": (D,), "input_proj.weight": (D, 2 * D)},
                2,
            ),
            **_each("model.mtp.layers.{i}.transformer_block.", LAYER, 2),
        },
    ),
    "speculators": (
        {"architectures": ["MTPDraftModel"], "num_nextn_predict_layers": 1},
        _each("mtp_layers.{i}.", {**MIMO, **LAYER}),
    ),
    "fastmtp": ({"num_nextn_predict_layers": 1}, _each("model.mtp_layers.{i}.", {**MIMO, **LAYER})),
    "medusa": (
        {"model_type": "medusa", "medusa_num_heads": 3},
        {
            f"{i}.{name}": shape
            for i in range(3)
            for name, shape in {"0.linear.weight": (D, D), "0.linear.bias": (D,), "1.weight": (V, D)}.items()
        },
    ),
    "evabyte": ({"model_type": "evabyte", "num_pred_heads": 8}, {}),
}
"""Families that transformers has no class for, or whose heads' layer is no layer of the base: config and tensors."""


CLASSES: dict[str, tuple[Callable[..., PretrainedConfig], dict[str, Any]]] = {
    "ernie4.5-moe": (
        transformers.Ernie4_5_MoeConfig,
        {**SMALL, "moe_intermediate_size": 16, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    ),
    "mimo-v2": (
        transformers.MiMoV2FlashConfig,
        {
            **SMALL, **EXPERTS, "head_dim": 8, "v_head_dim": 8, "swa_head_dim": 8, "n_routed_experts": 4,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "nemotron-h": (
        transformers.NemotronHConfig,
        {
            **EXPERTS, "vocab_size": V, "hidden_size": D, "intermediate_size": 48, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "n_routed_experts": 4,
            "layers_block_type": ["attention", "moe", "mlp"], "moe_shared_expert_intermediate_size": 16,
        },
    ),
    "inkling": (transformers.InklingTextConfig, {**SMALL, **EXPERTS, "head_dim": 8, "num_experts": 4}),
}  # fmt: skip
"""Families of those whose base transformers builds: only their heads are by names and shapes."""


def named_checkpoint(name: str, folder: Path) -> Tensors:
    """Writes a checkpoint whose heads are by names and shapes, on a base of transformers or on Llama's tensors."""
    changes, shapes = BY_NAME[name]
    if name in CLASSES:
        build, sizes = CLASSES[name]
        save_model(AutoModelForCausalLM.from_config(build(**copy.deepcopy(sizes))), folder)
        heads = random_like(shapes, seed=8, dtype=torch.bfloat16)
        add_tensors(folder, heads)
        edit_config(folder, **{key: value for key, value in changes.items() if key != "model_type"})
        return heads
    folder.mkdir(parents=True)
    base: Shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    base |= {f"model.layers.{number}.{part}": shape for number in range(L) for part, shape in LAYER.items()}
    if name == "evabyte":
        base["lm_head.weight"] = (8 * V, D)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SMALL, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    if name in ("speculators", "medusa"):
        heads = random_like(shapes)
        save_file(heads, folder / "model.safetensors", metadata={"format": "pt"})
        return heads
    save_file(random_like(base), folder / "model.safetensors", metadata={"format": "pt"})
    heads = random_like(shapes, seed=8, dtype=torch.bfloat16)
    if name == "evabyte":
        return {"lm_head.weight": random_like(base)["lm_head.weight"]}
    add_tensors(folder, heads)
    return heads
