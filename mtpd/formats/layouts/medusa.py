"""Medusa heads as vLLM reads them (`blocks.{i}.layers.0`, `lm_heads.{i}`), beside an unchanged base."""

from __future__ import annotations

from pathlib import Path

from mtpd.formats.directory import CONFIG, write_json, write_sharded
from mtpd.formats.exported_run import Run
from mtpd.formats.families.medusa import FAMILY
from mtpd.formats.layout import VLLM, Layout
from mtpd.formats.tensors import dtype_name
from mtpd.formats.to_family import as_family
from mtpd.heads.medusa.config import KIND


def refused(run: Run) -> str | None:
    if run.config.vocabulary_size:
        return (
            f"the heads have an output head over a draft vocabulary of {run.config.vocabulary_size} tokens; accepted: "
            "Medusa heads trained with heads.vocabulary=0"
        )
    return None


def write(run: Run, folder: Path) -> None:
    tensors = run.heads(run.depth)
    # vLLM takes the names of the published checkpoints as they are.
    write_sharded(folder, as_family(tensors, FAMILY, heads=run.depth, layers=0))
    vocabulary = tensors["layers.0.unembed.weight"].shape[0]
    config = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": run.hidden_size,
        "vocab_size": vocabulary,
        "truncated_vocab_size": vocabulary,
        "num_heads": run.depth,
        "num_hidden_layers": 1,
        "medusa_num_heads": run.depth,
        "medusa_num_layers": 1,
        "medusa_fc_bias": True,
        "dtype": dtype_name(run.dtype),
    }
    write_json(folder / CONFIG, config)


LAYOUT = Layout(
    FAMILY.name,
    "Medusa heads beside an unchanged base",
    refused,
    write,
    {"vllm": VLLM},
    rank=60,
    kind=KIND.name,
    family=FAMILY,
    apart=True,
    method="medusa",
)
