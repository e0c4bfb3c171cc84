"""speculators "mtp": one head in a directory of its own."""

from mtpd.formats.family import Family, mimo

FAMILY = Family(
    name="speculators",
    title='speculators "mtp"',
    model_types=(),
    architectures=("MTPDraftModel",),
    counts=("num_nextn_predict_layers",),
    names=mimo("mtp_layers.{i}"),
    default_count=1,
    separate=True,
    reference="github.com/vllm-project/speculators, models/mtp",
)
