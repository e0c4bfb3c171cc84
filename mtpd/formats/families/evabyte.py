"""EvaByte: further output heads, stacked below the main one in one matrix.

The logits are read as [heads, tokens], and those of the main head come first: it counts as one of `num_pred_heads`.
The heads read the same state as the main one, after the final norm.
"""

from mtpd.formats.family import Family
from mtpd.heads.parallel.config import KIND

FAMILY = Family(
    name="evabyte",
    title="EvaByte multi-byte prediction",
    model_types=("evabyte",),
    counts=("num_pred_heads",),
    names=(("lm_head.weight", "outputs.weight"),),
    stacked="outputs.weight",
    kind=KIND.name,
    reference="github.com/OpenEvaByte/evabyte, modeling_evabyte.py",
)
