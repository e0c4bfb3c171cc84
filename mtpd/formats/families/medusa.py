"""Medusa in the layout of the published Vicuna heads: `medusa_lm_head.safetensors` beside a config of its own."""

from mtpd.formats.family import Family
from mtpd.heads.medusa.config import KIND

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
    kind=KIND.name,
    whole=(
        frozenset({"residual.project.weight", "residual.project.bias", "unembed.weight"}),
        "single residual block with a bias and an output head",
    ),
    engines=("vLLM",),
    reference="arXiv 2401.10774; github.com/FasterDecoding/Medusa; vLLM medusa.py",
)
