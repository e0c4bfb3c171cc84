"""FastMTP: MiMo's names, one head that is used at every depth. Its checkpoints look like MiMo-7B's."""

from mtpd.formats.family import Family, mimo

FAMILY = Family(
    name="fastmtp",
    title="FastMTP",
    model_types=(),
    counts=("num_nextn_predict_layers",),
    names=mimo("model.mtp_layers.{i}"),
    default_count=1,
    order="hidden",
    zeroes_first=True,
    engines=("SGLang",),
    reference="arXiv 2509.18362; github.com/Tencent-BAC/FastMTP",
)
