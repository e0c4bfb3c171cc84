"""EXAONE-MoE: Qwen's names with plain norms."""

from mtpd.formats.family import Family, qwen

FAMILY = Family(
    name="exaone-moe",
    title="EXAONE-MoE",
    model_types=("exaone_moe", "exaone4_5"),
    counts=("num_nextn_predict_layers",),
    names=qwen(),
    default_count=1,
    engines=("vLLM",),
    reference="vLLM exaone_moe_mtp.py",
)
