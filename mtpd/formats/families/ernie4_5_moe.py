"""ERNIE-4.5 MoE. There is no norm between a head's layer and the output head."""

from mtpd.formats.family import EMBED, HIDDEN, LAYER, PROJECT, Family

FAMILY = Family(
    name="ernie4.5-moe",
    title="ERNIE-4.5 MoE",
    model_types=("ernie4_5_moe",),
    counts=("num_nextn_predict_layers",),
    names=(
        ("model.mtp_emb_norm.{i}.weight", EMBED),
        ("model.mtp_hidden_norm.{i}.weight", HIDDEN),
        ("model.mtp_linear_proj.{i}.weight", PROJECT),
        ("model.mtp_block.{i}.{rest}", LAYER),
    ),
    recycled="raw",
    zeroes_first=True,
    cannot_run="it has no norm before the output head, and chain heads end in one",
    engines=("vLLM", "SGLang"),
    reference="vLLM ernie_mtp.py",
)
