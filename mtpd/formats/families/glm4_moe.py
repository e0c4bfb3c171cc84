"""GLM-4.5, 4.6 and 4.7: DeepSeek's names around GLM's layer."""

from mtpd.formats.family import Family, layered

FAMILY = Family(
    name="glm4moe",
    title="GLM-4.5, 4.6, 4.7",
    model_types=("glm4_moe", "glm4_moe_lite"),
    counts=("num_nextn_predict_layers", "num_mtp_layers"),
    names=layered("model.layers.{n}"),
    zeroes_first=True,
    engines=("vLLM", "SGLang", "transformers", "llama.cpp"),
    reference="vLLM glm4_moe_mtp.py; transformers MtpModel",
)
