"""HY-V3. Heads that are no part of it lie alone in this form beside another base, as a draft model for vLLM."""

from mtpd.formats.family import EMBED, HIDDEN, LAYER, NORM, PROJECT, UNEMBEDDING, Family

LAYER_OF = "model.layers.{n}"

FAMILY = Family(
    name="hy-v3",
    title="HY-V3",
    model_types=("hy_v3",),
    counts=("num_nextn_predict_layers",),
    names=(
        (f"{LAYER_OF}.enorm.weight", EMBED),
        (f"{LAYER_OF}.hnorm.weight", HIDDEN),
        (f"{LAYER_OF}.eh_proj.weight", PROJECT),
        (f"{LAYER_OF}.final_layernorm.weight", NORM),
        (f"{LAYER_OF}.shared_head.weight", UNEMBEDDING),
        (f"{LAYER_OF}.{{rest}}", LAYER),
    ),
    zeroes_first=True,
    engines=("vLLM",),
    reference="vLLM hy_v3_mtp.py",
)
