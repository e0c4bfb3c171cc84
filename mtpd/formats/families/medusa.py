"""Medusa in the layout of the published Vicuna heads: `medusa_lm_head.safetensors` beside a config of its own."""

from mtpd.formats.families.table import Family

FAMILY = Family(
    name="medusa",
    title="Medusa (Vicuna layout)",
    model_types=("medusa",),
    counts=("medusa_num_heads", "num_heads"),
    names=(
        ("{i}.0.linear.{rest}", "layers.{i}.residual.project.{rest}"),
        ("{i}.1.weight", "layers.{i}.unembed.weight"),
        # Published heads have one residual block each; more of them mtpd has no place for.
        ("{i}.{m}.linear.{rest}", "layers.{i}.residual.{m}.{rest}"),
        ("{i}.{m}.weight", "layers.{i}.unembed.{m}.weight"),
    ),
    separate=True,
    kind="medusa",
    engines=("vLLM",),
    reference="arXiv 2401.10774; github.com/FasterDecoding/Medusa; vLLM medusa.py",
)
