"""Parallel heads: K heads on the same state h_t (Gloeckle et al., arXiv 2404.19737).

    h_t^k = f_k(h)_t        p_t^k = softmax(W h_t^k)        predicts x_{t+k+1}

f_k is one decoder layer of the trunk's own kind, a linear map, or a residual block (heads of block unembedding have a
W_k instead: `mtpd.heads.parallel.output_heads`). The trunk's last layer and the main head are the first of the paper's
n = K + 1 heads. h has been through the final norm: before a decoder layer it
passes a norm and a projection M_k, which bring it back to what a layer reads.

Embedding and unembedding W are the trunk's, shared and frozen.

Shape legend: B rows, T positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

from mtpd.heads.base import StateHeads
from mtpd.heads.config import HeadsConfig
from mtpd.heads.drafting import Drafter
from mtpd.heads.norms import unit_norm
from mtpd.heads.parallel.config import KIND, ParallelConfig
from mtpd.heads.parallel.drafting import BlockDrafter, StateDrafter
from mtpd.heads.parallel.output_heads import OutputHeads
from mtpd.trunk import Trunk, Unembedding


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
        """Computes the states [B, T, D] of this depth."""
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
        """Computes the states [..., D] of this depth."""
        return self.project(hidden_BTD)


class ResidualHead(nn.Module):
    """h^k = h + SiLU(W_k h + b_k), Medusa's block (arXiv 2401.10774)."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.project = nn.Linear(trunk.hidden_size, trunk.hidden_size)

    def forward(self, hidden_BTD: Tensor, **position: Any) -> Tensor:
        """Computes the states [..., D] of this depth."""
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
        form: ParallelConfig = config.own
        self.block = form.block
        if self.block == "decoder":
            self.layers = nn.ModuleList(DecoderHead(trunk, layer) for layer in config.source_layers)
        else:
            kind = LinearHead if self.block == "linear" else ResidualHead
            self.layers = nn.ModuleList(kind(trunk) for _ in range(config.depth))

    def forward(
        self, trunk: Trunk, hidden_BTD: Tensor, input_ids_BT: Tensor, *, position_ids_BT: Tensor
    ) -> list[Tensor]:
        """Computes states h^1..h^K, each [B, T, D], without the tokens behind t."""
        return [head(hidden_BTD, position_ids_BT=position_ids_BT) for head in self.layers]

    def logits(self, depth: int, hidden_BTD: Tensor, main: Unembedding, *, position_ids_BT: Tensor) -> Tensor:
        """Computes logits [B, T, M] of one depth with the main head."""
        return main(self.layers[depth - 1](hidden_BTD, position_ids_BT=position_ids_BT))

    def drafter(self, trunk: Trunk, *, slots: int, capacity: int) -> Drafter:
        kind = BlockDrafter if self.block == "decoder" else StateDrafter
        return kind(self, trunk, slots=slots, capacity=capacity)

    @classmethod
    def build(cls, trunk: Trunk, config: HeadsConfig) -> AnyParallel:
        return (OutputHeads if config.own.block == "unembedding" else ParallelHeads)(trunk, config)

    @classmethod
    def from_native(
        cls, tensors: Mapping[str, Any], *, source_layers: Sequence[int], depth: int, shared: bool, vocabulary: int
    ) -> dict[str, Any]:
        return {
            KIND.name: ParallelConfig(block="unembedding"),
            "columns": vocabulary or tensors["layers.0.weight"].shape[0],
        }

    @classmethod
    def native_rows(cls, tensors: Mapping[str, Tensor], vocabulary: Tensor) -> dict[str, Tensor]:
        return {name: tensor[vocabulary] for name, tensor in tensors.items()}


AnyParallel = ParallelHeads | OutputHeads
