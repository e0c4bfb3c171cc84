"""MiMo-7B. The base's state comes before its final norm, and before the embedding."""

from mtpd.formats.family import Family, mimo

FAMILY = Family(
    name="mimo",
    title="MiMo-7B",
    model_types=("mimo",),
    architectures=("MiMoForCausalLM",),
    counts=("num_nextn_predict_layers",),
    names=mimo("model.mtp_layers.{i}"),
    order="hidden",
    hidden="before",
    zeroes_first=True,
    cannot_run="its first head reads the base's state before the final norm, and chain heads read it after",
    engines=("vLLM", "SGLang"),
    reference="vLLM mimo_mtp.py and mimo.py",
)
