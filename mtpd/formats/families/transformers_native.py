"""transformers' own: `num_mtp_layers`, and DeepSeek's names around a layer of any architecture."""

from mtpd.formats.family import Family, layered

FAMILY = Family(
    name="transformers",
    title="transformers' own (any architecture)",
    model_types=(),
    counts=("num_mtp_layers",),
    names=layered("model.layers.{n}"),
    engines=("transformers",),
    any_base=True,
    reference="transformers modeling_layers.MtpModel",
)
