"""Qwen3.5 and 3.6, dense and mixture of experts. The key is in the text config."""

from mtpd.formats.family import Family, qwen

FAMILY = Family(
    name="qwen3.5",
    title="Qwen3.5, 3.6 (dense and MoE)",
    model_types=("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
    counts=("mtp_num_hidden_layers",),
    names=qwen(),
    norm="one_plus",
    engines=("vLLM", "SGLang"),
    reference="vLLM qwen3_5_mtp.py",
)
