"""speculators' "mtp" form (github.com/vllm-project/speculators): one block in a directory of its own."""

from __future__ import annotations

from pathlib import Path

from mtpd.formats.directory import CONFIG, write_json, write_sharded
from mtpd.formats.exported_run import Run
from mtpd.formats.families.speculators import FAMILY
from mtpd.formats.layout import Layout
from mtpd.formats.tensors import dtype_name
from mtpd.formats.to_family import as_family

BASES = ("qwen3", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
"""Bases that speculators has a layer for."""


def refused(run: Run) -> str | None:
    if not run.recycles:
        return (
            f"the layout has one block, and the run has {run.blocks} different ones; accepted: heads trained with "
            "heads.shared=true, or --depth 1"
        )
    if run.model_type not in BASES:
        return f"the base is {run.model_type}, and speculators has layers for {', '.join(BASES)}; accepted: hf-mtp"
    return None


def write(run: Run, folder: Path) -> None:
    tensors = as_family(run.heads(1), FAMILY, heads=1, layers=run.base.layers, model_type=run.model_type)
    write_sharded(folder, tensors)
    verifier = {"name_or_path": run.model, "architectures": run.base.config.get("architectures") or []}
    config = {
        "architectures": ["MTPDraftModel"],
        "speculators_model_type": "mtp",
        "num_nextn_predict_layers": 1,
        "transformer_layer_config": run.base.text_config,
        "speculators_config": {
            "algorithm": "mtp",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": run.depth}],
            "verifier": verifier,
        },
        "dtype": dtype_name(run.dtype),
    }
    write_json(folder / CONFIG, config)


LAYOUT = Layout(
    "speculators",
    'one block as a speculators "mtp" model: for exchange, no engine loads it for these bases',
    refused,
    write,
    {},
    rank=55,
    apart=True,
)
