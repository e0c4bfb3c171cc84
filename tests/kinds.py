"""Heads of every kind but the chain, in which all that they read has weight. A new form joins by its line."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtpd.heads import Heads, build_heads, configure_heads
from mtpd.trunk import Trunk

FORMS: dict[str, dict[str, Any]] = {
    "decoder": {"kind": "parallel", "parallel": {"block": "decoder"}},
    "linear": {"kind": "parallel", "parallel": {"block": "linear"}},
    "residual": {"kind": "parallel", "parallel": {"block": "residual"}},
    "unembedding": {"kind": "parallel", "parallel": {"block": "unembedding"}},
    "medusa": {"kind": "medusa"},
    "ff": {"kind": "circuit", "circuit": {"structure": "ff", "leaves": "full"}},
    "cp": {"kind": "circuit", "circuit": {"structure": "cp", "components": 3, "leaves": "full"}},
    "cp-shared": {"kind": "circuit", "circuit": {"structure": "cp", "components": 3, "rank": 4}},
    "hmm": {"kind": "circuit", "circuit": {"structure": "hmm", "components": 3, "leaves": "full"}},
    "btree": {"kind": "circuit", "circuit": {"structure": "btree", "components": 2, "rank": 4}},
    "hmm-tilted": {"kind": "circuit", "circuit": {"structure": "hmm", "components": 3, "leaves": "tilted"}},
    "btree-full": {"kind": "circuit", "circuit": {"structure": "btree", "components": 2, "leaves": "full"}},
}


def settings(form: str, *, depth: int = 3, init: str | None = None) -> dict[str, Any]:
    """The `heads` section of a recipe."""
    empty = {"shared": False, "source": None, "parallel": {}, "circuit": {}, "vocabulary": 0}
    return {**empty, **FORMS[form], "depth": depth, "init": init}


def random_kind(
    trunk: Trunk, form: str, *, depth: int = 3, vocabulary: Tensor | None = None, std: float = 0.25
) -> Heads:
    """Heads with random weights, in eval mode."""
    size = 0 if vocabulary is None else len(vocabulary)
    heads = build_heads(trunk, configure_heads(settings(form, depth=depth), trunk, vocabulary=size, fingerprint=""))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in heads.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=std, generator=generator)
            elif "norm" not in name:
                parameter.zero_()
    if vocabulary is not None:
        heads.get_buffer("vocabulary").copy_(vocabulary)
    return heads.eval()
