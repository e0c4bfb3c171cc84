"""Chain heads: K heads in DeepSeek-V3 form (arXiv 2412.19437, section 2.2), as MTP-D uses them.

    u_t^k = M_k [ norm(E(x_{t+k})) ; norm(h_t^{k-1}) ]      M_k: D x 2D,  h_t^0 = h_t
    h_t^k = norm( Block_k(u^k)_t )                          one decoder layer of the trunk's own kind

Embedding and unembedding are the trunk's, shared and frozen.

Shape legend: B rows, T positions, D hidden size.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from mtpd import alignment
from mtpd.heads.config import HeadsConfig
from mtpd.heads.norms import gain, set_gain
from mtpd.trunk import Trunk, Unembedding, crop


class ChainHead(nn.Module):
    """One head: two norms, the projection M of [embedding ; hidden], and a block with its final norm."""

    def __init__(self, trunk: Trunk, source_layer: int) -> None:
        super().__init__()
        size = trunk.hidden_size
        block: Any = trunk.block(source_layer)
        self.block = block
        self.embed_norm = _unit_norm(block.norm)
        self.hidden_norm = _unit_norm(block.norm)
        self.project = nn.Linear(2 * size, size, bias=False)

    def mix(self, embed_BTD: Tensor, hidden_BTD: Tensor) -> Tensor:
        """u = M [norm(embedding) ; norm(hidden)]. [B, T, D]"""
        return self.project(torch.cat([self.embed_norm(embed_BTD), self.hidden_norm(hidden_BTD)], dim=-1))

    def forward(
        self, embed_BTD: Tensor, hidden_BTD: Tensor, *, position_ids_BT: Tensor, cache: Cache | None = None
    ) -> Tensor:
        """Hidden states [B, T, D] of this depth from the embeddings of x_{t+k} and the states of depth k-1."""
        return self.block(
            inputs_embeds=self.mix(embed_BTD, hidden_BTD),
            position_ids=position_ids_BT,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state


class ChainHeads(nn.Module):
    """K chain heads.

    Args:
        trunk: gives the block factory; it is not kept.
        config: depth and, per head, the trunk layer whose kind the block has.
    """

    def __init__(self, trunk: Trunk, config: HeadsConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(ChainHead(trunk, layer) for layer in config.source_layers)
        assert len(self.layers) == (1 if config.shared else config.depth), "one source layer for each block"
        self.register_buffer("vocabulary", torch.zeros(config.vocabulary_size, dtype=torch.long))

    @property
    def depth(self) -> int:
        return self.config.depth

    def chain(self) -> list[ChainHead]:
        """The heads of depth 1..K; the same one K times where they share a block."""
        heads: list[Any] = list(self.layers)
        return heads * self.depth if self.config.shared else heads

    def shorten(self, depth: int) -> None:
        """Keeps the heads of depth 1..`depth` only: no later one changes what they draft."""
        assert 1 <= depth <= self.depth, "heads can only become fewer"
        blocks = 1 if self.config.shared else depth
        self.layers = self.layers[:blocks]
        kept = {"depth": depth, "source_layers": self.config.source_layers[:blocks]}
        self.config = self.config.model_copy(update=kept)

    def rows(self) -> Tensor | None:
        """Token ids of the draft vocabulary, or None when the heads draft over the whole of it."""
        vocabulary: Any = self.vocabulary
        return vocabulary if vocabulary.numel() else None

    def forward(
        self, trunk: Trunk, hidden_BTD: Tensor, input_ids_BT: Tensor, *, position_ids_BT: Tensor
    ) -> list[Tensor]:
        """Teacher-forced states h^1..h^K, each [B, T, D]: head k reads the true token x_{t+k}."""
        states, state = [], hidden_BTD
        for depth, head in enumerate(self.chain(), start=1):
            embed_BTD = trunk.embed(alignment.tokens_read(input_ids_BT, depth))
            state = head(embed_BTD, state, position_ids_BT=position_ids_BT)
            states.append(state)
        return states

    def drafter(self, trunk: Trunk) -> ChainDrafter:
        """A new drafting state for one sequence."""
        return ChainDrafter(self, trunk)


class ChainDrafter:
    """Drafts K tokens a round for one sequence, and keeps in the heads' caches only what training saw.

    With x_0..x_N known and the trunk run up to position N-1, head k's entry at position t is true
    when x_{t+k} is known, that is t <= N-k. Entries past that were computed from drafts: they are
    dropped after the round and computed again from the true tokens in the next one.
    """

    def __init__(self, heads: ChainHeads, trunk: Trunk) -> None:
        self.heads = heads
        self.trunk = trunk
        self.rows = heads.rows()
        self.unembedding: Unembedding = trunk.unembedding.select(self.rows)
        self.caches = [DynamicCache() for _ in range(heads.depth)]
        self.kept: list[Tensor | None] = [None] * heads.depth
        self.lengths = [0] * heads.depth

    @torch.no_grad()
    def draft(self, hidden_BTD: Tensor, tokens: Tensor) -> Tensor:
        """Drafts the tokens after x_N.

        Args:
            hidden_BTD: trunk states [1, n, D] of the n positions that were added since the last call.
            tokens: all known tokens x_0..x_N, [N + 1].

        Returns:
            Token ids [K].
        """
        newest = tokens.shape[0] - 1
        drafts = tokens.new_empty(0)
        state = hidden_BTD
        for k, head in enumerate(self.heads.chain(), start=1):
            index = k - 1
            kept = self.kept[index]
            if kept is not None:
                state = torch.cat([kept, state], dim=1)
            start = self.lengths[index]
            positions = torch.arange(start, newest, device=tokens.device)
            assert state.shape[1] == len(positions), "one state for each position that the head has yet to see"
            known = torch.cat([tokens, drafts])[positions + k]
            inputs, state = (
                state,
                head(
                    self.trunk.embed(known)[None],
                    state,
                    position_ids_BT=positions[None],
                    cache=self.caches[index],
                ),
            )
            choice = self.unembedding(state[0, -1]).argmax(-1)
            drafts = torch.cat([drafts, (choice if self.rows is None else self.rows[choice])[None]])
            valid = max(0, newest - k + 1)
            crop(self.caches[index], valid)
            # States of depth k-1 are true one position further than entries of head k.
            self.kept[index] = inputs[:, valid - start : newest - k + 2 - start]
            self.lengths[index] = valid
        return drafts


def _unit_norm(final_norm: nn.Module) -> nn.Module:
    """A norm of the trunk's own class with gain 1, whichever way the class stores its gain."""
    norm = copy.deepcopy(final_norm)
    set_gain(norm, torch.ones_like(gain(norm)))
    return norm
