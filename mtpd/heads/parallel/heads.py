"""Parallel heads: K heads on the same state h_t (Gloeckle et al., arXiv 2404.19737).

    h_t^k = f_k(h)_t        p_t^k = softmax(W h_t^k)        predicts x_{t+k+1}

f_k is one decoder layer of the trunk's own kind, a linear map, or a residual block (heads of block unembedding have a
W_k instead: `mtpd.heads.parallel.output_heads`). The trunk's last layer and the
main head are the first of the paper's n = K + 1 heads. h has been through the final norm: before a decoder layer it
passes a norm and a projection M_k, which bring it back to what a layer reads.

Embedding and unembedding W are the trunk's, shared and frozen.

Shape legend: B rows, T positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from mtpd.errors import UserError
from mtpd.heads.base import Drafter, Heads, StateHeads
from mtpd.heads.chain.start import _inverse, _silence, source_layers
from mtpd.heads.config import HeadsConfig, ParallelShape
from mtpd.heads.norms import gain, set_gain, unit_norm
from mtpd.heads.parallel import output_heads
from mtpd.heads.parallel.drafting import BlockDrafter, StateDrafter
from mtpd.heads.parallel.output_heads import UnembeddedHeads
from mtpd.heads.regression import shift_maps
from mtpd.trunk import Trunk, Unembedding

STARTS = {
    "decoder": ("regression", "identity", "copy_last", "copy_last_k", "random"),
    "linear": ("regression", "identity", "random"),
    "residual": ("identity", "random"),
    "unembedding": output_heads.STARTS,
}
"""By block, the accepted starts; the first is the one of a recipe that names none."""


class DecoderHead(nn.Module):
    """A norm, a projection, and a decoder layer with its final norm."""

    def __init__(self, trunk: Trunk, source_layer: int) -> None:
        super().__init__()
        block: Any = trunk.block(source_layer)
        self.block = block
        self.hidden_norm = unit_norm(block.norm)
        self.project = nn.Linear(trunk.hidden_size, trunk.hidden_size, bias=False)

    def forward(
        self,
        hidden_BTD: Tensor,
        *,
        position_ids_BT: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """States [B, T, D] of this depth."""
        return self.block(
            inputs_embeds=self.project(self.hidden_norm(hidden_BTD)),
            position_ids=position_ids_BT,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state


class LinearHead(nn.Module):
    """h^k = M_k h."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.project = nn.Linear(trunk.hidden_size, trunk.hidden_size, bias=False)

    def forward(self, hidden_BTD: Tensor, **position: Any) -> Tensor:
        """States [..., D] of this depth."""
        return self.project(hidden_BTD)


class ResidualHead(nn.Module):
    """h^k = h + SiLU(W_k h + b_k), Medusa's block (arXiv 2401.10774)."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.project = nn.Linear(trunk.hidden_size, trunk.hidden_size)

    def forward(self, hidden_BTD: Tensor, **position: Any) -> Tensor:
        """States [..., D] of this depth."""
        return hidden_BTD + nn.functional.silu(self.project(hidden_BTD))


class ParallelHeads(StateHeads):
    """K parallel heads.

    Args:
        trunk: gives the block factory; it is not kept.
        config: depth, the form of the heads, and of decoder layers their kinds.
    """

    independent = True

    def __init__(self, trunk: Trunk, config: HeadsConfig) -> None:
        super().__init__(config)
        assert config.parallel is not None
        self.block = config.parallel.block
        if self.block == "decoder":
            self.layers = nn.ModuleList(DecoderHead(trunk, layer) for layer in config.source_layers)
        else:
            kind = LinearHead if self.block == "linear" else ResidualHead
            self.layers = nn.ModuleList(kind(trunk) for _ in range(config.depth))

    def forward(
        self, trunk: Trunk, hidden_BTD: Tensor, input_ids_BT: Tensor, *, position_ids_BT: Tensor
    ) -> list[Tensor]:
        """States h^1..h^K, each [B, T, D]; the tokens behind t are not read."""
        return [head(hidden_BTD, position_ids_BT=position_ids_BT) for head in self.layers]

    def logits(self, depth: int, hidden_BTD: Tensor, main: Unembedding, *, position_ids_BT: Tensor) -> Tensor:
        """Logits [B, T, M] of one depth, by way of the main head."""
        return main(self.layers[depth - 1](hidden_BTD, position_ids_BT=position_ids_BT))

    def shorten(self, depth: int) -> None:
        assert 1 <= depth <= self.depth, "heads can only become fewer"
        self.layers = self.layers[:depth]
        kept = {"depth": depth, "source_layers": self.config.source_layers[:depth]}
        self.config = self.config.model_copy(update=kept)

    def drafter(self, trunk: Trunk, *, slots: int, capacity: int) -> Drafter:
        kind = BlockDrafter if self.block == "decoder" else StateDrafter
        return kind(self, trunk, slots=slots, capacity=capacity)


AnyParallel = ParallelHeads | UnembeddedHeads


def configure(settings: Mapping[str, Any], trunk: Trunk) -> dict[str, Any]:
    """The part of `HeadsConfig` that is parallel heads' own, from the `heads` section of a recipe."""
    shape = ParallelShape.model_validate(settings["parallel"])
    start: Any = settings["init"] or STARTS[shape.block][0]
    if start not in STARTS[shape.block]:
        raise UserError(
            f"heads.init: {start} is not accepted for parallel heads of block {shape.block}; accepted: "
            f"{', '.join(STARTS[shape.block])}"
        )
    layers = source_layers(start, settings["depth"], trunk.depth) if shape.block == "decoder" else []
    own = {"columns": settings["columns"]} if shape.block == "unembedding" else {}
    return {"parallel": shape, "source_layers": layers, **own}


def build(trunk: Trunk, config: HeadsConfig) -> AnyParallel:
    """Heads of the block that the config names."""
    assert config.parallel is not None
    return (UnembeddedHeads if config.parallel.block == "unembedding" else ParallelHeads)(trunk, config)


@torch.no_grad()
def initialise(heads: AnyParallel, trunk: Trunk, start: str | None, *, seed: int = 0) -> bool:
    """Gives new heads their first weights. Returns whether `fit` has to follow."""
    if isinstance(heads, UnembeddedHeads):
        return output_heads.initialise(heads, trunk, start, seed=seed)
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
            set_gain(head.hidden_norm, _inverse(gain(head.block.norm).float()))
        if start in ("copy_last", "copy_last_k"):
            source = heads.config.source_layers[index]
            head.block.layers[0].load_state_dict(trunk.decoder.layers[source].state_dict())
        elif start != "random":
            _silence(head.block.layers[0], trunk.name)
    return start == "regression"


@torch.no_grad()
def fit(heads: AnyParallel, trunk: Trunk, batches: Iterable[dict[str, Tensor]]) -> None:
    """Makes M_k the ridge regression of the trunk's state k positions further on what head k reads."""
    if isinstance(heads, UnembeddedHeads):
        output_heads.fit(heads, trunk, batches)
        return
    first: Any = heads.layers[0]
    if heads.block == "linear":
        maps = shift_maps(trunk, batches, depth=heads.depth)
    else:
        # The layer passes on what it is given, and its final norm brings in the gain.
        inverse = _inverse(gain(first.block.norm).float())
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
    """The heads of depth 1..`depth` of parallel heads with this block.

    Raises:
        UserError: others, or too few.
    """
    shape = source.config.parallel
    if shape is None or shape.block != block or source.depth < depth:
        found = f"{source.depth} of kind {source.config.kind}"
        found += f" and block {shape.block}" if shape is not None else ""
        raise UserError(f"heads.source: holds {found}; accepted: at least {depth} parallel heads of block {block}")
    return list(source.layers[:depth])
