"""EvaByte: further output heads, stacked below the main one in one matrix."""

from mtpd.checkpoints.families.table import Family

FAMILY = Family(
    name="evabyte",
    title="EvaByte multi-byte prediction",
    model_types=("evabyte",),
    counts=("num_pred_heads",),
    names=(("lm_head.weight", "outputs.weight"),),
    cannot_run="its heads are rows of the output matrix, without layers",
    reference="github.com/OpenEvaByte/evabyte, modeling_evabyte.py",
)
