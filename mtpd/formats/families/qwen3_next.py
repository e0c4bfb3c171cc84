"""Qwen3-Next."""

from mtpd.formats.family import Family, qwen

FAMILY = Family(
    name="qwen3-next",
    title="Qwen3-Next",
    model_types=("qwen3_next",),
    counts=("num_nextn_predict_layers",),
    names=qwen(),
    default_count=1,
    norm="one_plus",
    engines=("vLLM", "SGLang"),
    reference="vLLM qwen3_next_mtp.py",
)
