"""Inkling: up to 8 heads, one norm after all of them, and embeddings that the base has normed already."""

from mtpd.formats.family import EMBED, HIDDEN, LAYER, NORM, PROJECT, Family

FAMILY = Family(
    name="inkling",
    title="Inkling",
    model_types=("inkling", "inkling_text"),
    counts=("mtp_config.num_nextn_predict_layers", "num_mtp_layers"),
    names=(
        ("model.mtp.layers.{i}.embed_norm.weight", EMBED),
        ("model.mtp.layers.{i}.hidden_norm.weight", HIDDEN),
        ("model.mtp.layers.{i}.input_proj.weight", PROJECT),
        ("model.mtp.chain_norm.weight", NORM),
        ("model.mtp.layers.{i}.transformer_block.{rest}", LAYER),
    ),
    order="hidden",
    cannot_run="its decoder has no rotary positions, and its heads read embeddings that the base has normed",
    engines=("vLLM", "transformers"),
    reference="vLLM models/inkling; transformers MtpModel",
)
