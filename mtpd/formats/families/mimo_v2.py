"""MiMo-V2. The block is sliding attention with a dense MLP, a kind of layer that the base does not have."""

from mtpd.formats.family import EMBED, HIDDEN, LAYER, NORM, PROJECT, Family

FAMILY = Family(
    name="mimo-v2",
    title="MiMo-V2",
    model_types=("mimo_v2_flash", "mimo_v2"),
    counts=("num_nextn_predict_layers",),
    names=(
        ("model.mtp.layers.{i}.enorm.weight", EMBED),
        ("model.mtp.layers.{i}.hnorm.weight", HIDDEN),
        ("model.mtp.layers.{i}.eh_proj.weight", PROJECT),
        ("model.mtp.layers.{i}.final_layernorm.weight", NORM),
        ("model.mtp.layers.{i}.pre_mlp_layernorm.weight", "layers.{i}.block.layers.0.post_attention_layernorm.weight"),
        ("model.mtp.layers.{i}.{rest}", LAYER),
    ),
    default_count=1,
    engines=("vLLM", "SGLang"),
    reference="vLLM mimo_v2_mtp.py",
)
