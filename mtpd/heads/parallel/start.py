"""Starts parallel heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mtpd.errors import UserError
from mtpd.heads.base import Heads
from mtpd.heads.first_weights import inverse_gain, shift_maps, silence, source_layers
from mtpd.heads.norms import gain, set_gain
from mtpd.heads.parallel.config import KIND, ParallelConfig
from mtpd.heads.parallel.heads import AnyParallel, DecoderHead
from mtpd.heads.parallel.output_heads import OutputHeads
from mtpd.trunk import Trunk

STARTS = {
    "decoder": ("regression", "identity", "copy_last", "copy_last_k", "random"),
    "linear": ("regression", "identity", "random"),
    "residual": ("identity", "random"),
    "unembedding": ("regression", "identity", "random"),
}
"""By block, the accepted starts; the first is the one of a recipe that names none."""


def configure(settings: Mapping[str, Any], trunk: Trunk) -> dict[str, Any]:
    """Works out what parallel heads add to `HeadsConfig`, from the `heads` section of a recipe."""
    shape = ParallelConfig.model_validate(settings[KIND.name])
    start: Any = settings["init"] or STARTS[shape.block][0]
    if start not in STARTS[shape.block]:
        raise UserError(
            f"heads.init: {start} is not accepted for parallel heads of block {shape.block}; accepted: "
            f"{', '.join(STARTS[shape.block])}"
        )
    layers = source_layers(start, settings["depth"], trunk.depth) if shape.block == "decoder" else []
    own = {"columns": settings["columns"]} if shape.block == "unembedding" else {}
    return {KIND.name: shape, "source_layers": layers, **own}


@torch.no_grad()
def initialise(heads: AnyParallel, trunk: Trunk, start: str | None, *, seed: int = 0) -> bool:
    """Gives new heads their first weights, and says whether `fit` has to follow."""
    if isinstance(heads, OutputHeads):
        return _initialise_output_heads(heads, trunk, start, seed=seed)
    start = start or STARTS[heads.block][0]
    random = torch.Generator().manual_seed(seed)
    size = trunk.hidden_size
    std = float(getattr(trunk.config, "initializer_range", 0.02))
    for index, each in enumerate(heads.layers):
        head: Any = each
        project = torch.randn(size, size, generator=random) * std if start == "random" else torch.eye(size)
        if heads.block == "residual" and start != "random":
            project.zero_()
        head.project.weight.copy_(project)
        if head.project.bias is not None:
            head.project.bias.zero_()
        if not isinstance(head, DecoderHead):
            continue
        head.block.norm.load_state_dict(trunk.decoder.norm.state_dict())
        for parameter in head.block.layers[0].parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=random) * std)
        if start != "random":
            set_gain(head.hidden_norm, inverse_gain(gain(head.block.norm).float()))
        if start in ("copy_last", "copy_last_k"):
            source = heads.config.source_layers[index]
            trunk.copy_layer(source, head.block)
        elif start != "random":
            silence(head.block.layers[0], trunk.name)
    return start == "regression"


@torch.no_grad()
def fit(heads: AnyParallel, trunk: Trunk, batches: Iterable[dict[str, Tensor]]) -> None:
    """Makes M_k the ridge regression of the trunk's state k positions further on what head k reads."""
    if isinstance(heads, OutputHeads):
        _fit_output_heads(heads, trunk, batches)
        return
    first: Any = heads.layers[0]
    if heads.block == "linear":
        maps = shift_maps(trunk, batches, depth=heads.depth)
    else:
        # The layer passes on what it is given, and its final norm brings in the gain.
        inverse = inverse_gain(gain(first.block.norm).float())
        maps = shift_maps(trunk, batches, depth=heads.depth, read=first.hidden_norm, undo=inverse)
    for each, matrix in zip(heads.layers, maps, strict=True):
        head: Any = each
        head.project.weight.copy_(matrix)


@torch.no_grad()
def adopt(heads: AnyParallel, trunk: Trunk, source: Heads, *, seed: int = 0) -> None:
    """Takes the weights of the first heads of `source`, which are of the same form.

    Raises:
        UserError: they are not, or too few.
    """
    for each, other in zip(heads.layers, matching(source, heads.block, heads.depth), strict=True):
        each.load_state_dict(other.state_dict())


def matching(source: Heads, block: str, depth: int) -> list[Any]:
    """Gives the heads of depth 1..`depth` of parallel heads with this block.

    Raises:
        UserError: others, or too few.
    """
    shape: ParallelConfig | None = source.config.own if source.config.kind == KIND.name else None
    if shape is None or shape.block != block or source.depth < depth:
        found = f"{source.depth} of kind {source.config.kind}"
        found += f" and block {shape.block}" if shape is not None else ""
        raise UserError(f"heads.source: holds {found}; accepted: at least {depth} parallel heads of block {block}")
    return list(source.layers[:depth])


@torch.no_grad()
def _initialise_output_heads(heads: OutputHeads, trunk: Trunk, start: str | None, *, seed: int = 0) -> bool:
    start = start or STARTS["unembedding"][0]
    random = torch.Generator().manual_seed(seed)
    std = float(getattr(trunk.config, "initializer_range", 0.02))
    matrix = _main_matrix(heads, trunk)
    for each in heads.layers:
        head: Any = each
        head.weight.copy_(torch.randn(matrix.shape, generator=random) * std if start == "random" else matrix)
    return start == "regression"


@torch.no_grad()
def _fit_output_heads(heads: OutputHeads, trunk: Trunk, batches: Iterable[dict[str, Tensor]]) -> None:
    """Makes W_k the main head behind the ridge regression of the trunk's state k positions further on."""
    matrix = _main_matrix(heads, trunk)
    for each, shift in zip(heads.layers, shift_maps(trunk, batches, depth=heads.depth), strict=True):
        head: Any = each
        head.weight.copy_(matrix @ shift)


def _main_matrix(heads: OutputHeads, trunk: Trunk) -> Tensor:
    """Gives the main head's matrix over the heads' columns, with its scale, [M, D] in float32."""
    main = trunk.unembedding.select(heads.rows())
    return main.weight.float() * main.scale
