"""DeepSeek-V3, V3.1, V3.2 and checkpoints in their form."""

from mtpd.formats.family import Family, layered

FAMILY = Family(
    name="deepseek-v3",
    title="DeepSeek-V3, V3.1, V3.2",
    model_types=("deepseek_v3", "deepseek_v32", "glm_moe_dsa"),
    counts=("num_nextn_predict_layers", "num_mtp_layers"),
    names=layered("model.layers.{n}"),
    zeroes_first=True,
    engines=("vLLM", "SGLang", "transformers"),
    reference="arXiv 2412.19437, section 2.2; vLLM deepseek_mtp.py",
)
