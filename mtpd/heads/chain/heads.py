"""Chain heads: K heads in DeepSeek-V3 form (arXiv 2412.19437, section 2.2), as MTP-D uses them.

    u_t^k = M_k [ norm(E(x_{t+k})) ; norm(h_t^{k-1}) ]      M_k: D x 2D,  h_t^0 = h_t
    h_t^k = norm( Block_k(u^k)_t )                          one decoder layer of the trunk's own kind

Embedding and unembedding are the trunk's, shared and frozen. Depths may share blocks: one for all (FastMTP), or blocks
that are looped, depth after depth. A depth may then own a LoRA adapter on the block that it shares.

Shape legend: B rows, T positions, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from mtpd import alignment
from mtpd.errors import UserError
from mtpd.heads.adapters import adapted, saved_once, without_adapter
from mtpd.heads.base import Batch, StateHeads
from mtpd.heads.chain.drafting import ChainDrafter
from mtpd.heads.config import HeadsConfig
from mtpd.heads.norms import unit_norm
from mtpd.trunk import Trunk

Form = Literal["copies", "shared", "adapters"]


class ChainHead(nn.Module):
    """One head: two norms, the projection M of [embedding ; hidden], and a block with its final norm."""

    def __init__(self, trunk: Trunk, source_layer: int) -> None:
        super().__init__()
        size = trunk.hidden_size
        block: Any = trunk.block(source_layer)
        self.block = block
        self.embed_norm = unit_norm(block.norm)
        self.hidden_norm = unit_norm(block.norm)
        self.project = nn.Linear(2 * size, size, bias=False)

    def mix(self, embed_BTD: Tensor, hidden_BTD: Tensor) -> Tensor:
        """Computes u = M [norm(embedding) ; norm(hidden)]. [B, T, D]"""
        return self.project(torch.cat([self.embed_norm(embed_BTD), self.hidden_norm(hidden_BTD)], dim=-1))

    def forward(
        self,
        embed_BTD: Tensor,
        hidden_BTD: Tensor,
        *,
        position_ids_BT: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Computes the states [B, T, D] of this depth from the embeddings of x_{t+k} and the states of depth k-1."""
        return self.block(
            inputs_embeds=self.mix(embed_BTD, hidden_BTD),
            position_ids=position_ids_BT,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state


class ChainHeads(StateHeads):
    """K chain heads.

    Args:
        trunk: gives the block factory; it is not kept.
        config: depth and, per head, the trunk layer whose kind the block has.
    """

    def __init__(self, trunk: Trunk, config: HeadsConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(ChainHead(trunk, layer) for layer in config.source_layers)
        # By depth: heads around the same parameters, with an adapter in every linear layer.
        self.adapted = nn.ModuleDict()
        for depth, rank in enumerate(config.adapters, start=1):
            if rank:
                self.adapted[str(depth)] = adapted(self.layers[config.block_of[depth - 1]], rank)
        saved_once(self)

    def blocks(self) -> list[nn.Module]:
        return list(dict.fromkeys(self.chain()))

    def chain(self) -> list[ChainHead]:
        """Lists the heads of depth 1..K; the same one several times where they share a block."""
        heads: list[Any] = [
            self.adapted[str(depth)] if str(depth) in self.adapted else self.layers[block]
            for depth, block in enumerate(self.config.block_of, start=1)
        ]
        return heads

    def shorten(self, depth: int) -> None:
        assert 1 <= depth <= self.depth, "heads can only become fewer"
        config = self.config
        blocks = max(config.block_of[:depth]) + 1
        self.layers = self.layers[:blocks]
        self.adapted = nn.ModuleDict({key: head for key, head in self.adapted.items() if int(key) <= depth})
        kept = {
            "depth": depth,
            "source_layers": config.source_layers[:blocks],
            "blocks": config.blocks[:depth],
            "adapters": config.adapters[:depth],
        }
        self.config = config.model_copy(update=kept)

    def first(self, depth: int) -> ChainHeads:
        """Gives the heads of depth 1..`depth` around the same parameters: deeper ones are not run."""
        heads = copy.copy(self)
        heads.__dict__["_modules"] = dict(self._modules)
        heads.shorten(depth)
        return heads

    def merged(self) -> ChainHeads:
        """Gives the same heads a block for each depth: looped blocks are copied, adapters merged into the weights.

        What is drafted stays the same to rounding; every parameter is trainable.
        """
        merged = copy.deepcopy(self)
        merged.layers = nn.ModuleList(without_adapter(head) for head in self.chain())
        merged.adapted = nn.ModuleDict()
        merged.config = self.config.merged()
        return merged

    def forward(
        self, trunk: Trunk, hidden_BTD: Tensor, input_ids_BT: Tensor, *, position_ids_BT: Tensor, after: int = 0
    ) -> list[Tensor]:
        """Computes teacher-forced states h^{after+1}..h^K, each [B, T, D]: head k reads the true token x_{t+k}.

        Args:
            hidden_BTD: the trunk's states h^0; or h^after, to compute the depths past `after` alone.
            input_ids_BT: the tokens, which may go on behind the T positions.
        """
        states, state = [], hidden_BTD
        for depth, head in enumerate(self.chain()[after:], start=after + 1):
            embed_BTD = trunk.embed(alignment.tokens_read(input_ids_BT, depth)[:, : hidden_BTD.shape[1]])
            state = head(embed_BTD, state, position_ids_BT=position_ids_BT)
            states.append(state)
        return states

    def each_alone(
        self, trunk: Trunk, hidden_BTD: Tensor, input_ids_BT: Tensor, *, position_ids_BT: Tensor
    ) -> list[Tensor]:
        """Computes the states [B, T, D] of each head on the trunk's states, in place of those of the head before."""
        return [
            head(
                trunk.embed(alignment.tokens_read(input_ids_BT, depth)).to(hidden_BTD.dtype),
                hidden_BTD,
                position_ids_BT=position_ids_BT,
            )
            for depth, head in enumerate(self.chain(), start=1)
        ]

    def trained_states(self, trunk: Trunk, batch: Batch) -> list[Tensor]:
        state = batch.below if batch.after else batch.hidden
        assert state is not None, "the states that the first trained depth reads"
        return self(trunk, state, batch.input_ids, position_ids_BT=batch.own_positions, after=batch.after)

    def drafter(self, trunk: Trunk, *, slots: int, capacity: int) -> ChainDrafter:
        return ChainDrafter(self, self.chain(), trunk, slots=slots, capacity=capacity)

    def as_chain(self, *, what: str) -> ChainHeads:
        return self

    def extended(self, trunk: Trunk, *, depth: int, form: Form, rank: int = 0, seed: int = 0) -> ChainHeads:
        """Makes heads of K+m depths that draft as K heads do whose last m are looped; not trained yet.

        Of the new heads, the parameters that the new depths own are trainable; those of depths 1..K are frozen. With
        `shared`, where new depths own nothing, all are trainable.

        Args:
            depth: K+m, at most 2 K.
            rank: of adapters.
            seed: of the first half of new adapters; the other half is 0.

        Raises:
            UserError: adapters in a form that cannot have them.
        """
        config = looped(self.config, depth, form, rank)
        with torch.random.fork_rng(devices=[]), torch.device(trunk.device):
            torch.manual_seed(seed)
            wider = ChainHeads(trunk, config)
        wider.load_state_dict({**wider.state_dict(), **self.state_dict()})
        source, target = self.chain(), wider.chain()
        new = depth - self.depth
        for place in range(self.depth, depth):
            head = source[place - new]
            if form == "copies":
                target[place].load_state_dict(without_adapter(head).state_dict())
            elif str(place - new + 1) in self.adapted:
                target[place].load_state_dict(head.state_dict())
        if form != "shared":
            for head in target[: self.depth]:
                head.requires_grad_(False)
        return wider.train(self.training)

    @classmethod
    def from_native(
        cls, tensors: Mapping[str, Any], *, source_layers: Sequence[int], depth: int, shared: bool, vocabulary: int
    ) -> dict[str, Any]:
        return {"source_layers": list(source_layers[: 1 if shared else depth]), "shared": shared}


def looped(old: HeadsConfig, depth: int, form: Form, rank: int) -> HeadsConfig:
    """Works out the config of `depth` heads: these, and as many of the last ones again as are missing (MTP-D).

    The last m heads of a chain are looped to be heads K+1..K+m: head K+i starts as head K-m+i and reads the state of
    head K+i-1. What a new depth owns is one of

    - copies: a block of its own, as in the paper;
    - shared: nothing; it has the block of the head that it loops (with one block, FastMTP's form);
    - adapters: a LoRA adapter on that block.

    Args:
        rank: of adapters.

    Raises:
        UserError: adapters in a form that cannot have them.
    """
    assert old.depth < depth <= 2 * old.depth, "the last m of K heads are looped"
    again = old.adapters[old.depth - depth :]
    if form == "shared" and any(again):
        raise UserError(
            "extend.form: shared is not accepted for heads that have adapters of their own; accepted: copies, adapters"
        )
    if form == "adapters" and any(each not in (0, rank) for each in again):
        raise UserError(
            f"extend.rank: {rank} is not the rank of the adapters that are looped; accepted: {max(again)}, or "
            "extend.form: copies"
        )
    new = depth - old.depth
    sources, blocks = list(old.source_layers), list(old.block_of)
    ranks = list(old.adapters)
    if form == "copies":
        sources += [sources[block] for block in blocks[-new:]]
        blocks += range(max(blocks) + 1, max(blocks) + 1 + new)
    else:
        blocks += blocks[-new:]
    if ranks or form == "adapters":
        ranks = (ranks or [0] * old.depth) + [rank if form == "adapters" else 0] * new
    shared = depth > 1 and not any(blocks)
    own = blocks == list(range(depth))
    return HeadsConfig.model_validate(
        old.model_dump()
        | {
            "depth": depth,
            "shared": shared,
            "source_layers": sources,
            "blocks": [] if shared or own else blocks,
            "adapters": ranks,
        }
    )
