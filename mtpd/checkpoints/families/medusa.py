"""Medusa in the layout of the published Vicuna heads: `medusa_lm_head.safetensors` beside a config of its own."""

from mtpd.checkpoints.families.table import Family

FAMILY = Family(
    name="medusa",
    title="Medusa (Vicuna layout)",
    model_types=("medusa",),
    counts=("medusa_num_heads", "num_heads"),
    names=(
        ("{i}.{m}.linear.{rest}", "heads.{i}.layers.{m}.{rest}"),
        ("{i}.{m}.weight", "heads.{i}.output.{m}.weight"),
    ),
    separate=True,
    cannot_run="its heads read no drafted tokens, so they are no chain",
    engines=("vLLM",),
    reference="arXiv 2401.10774; github.com/FasterDecoding/Medusa; vLLM medusa.py",
)
