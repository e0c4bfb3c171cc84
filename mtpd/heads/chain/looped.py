"""Looped extension (MTP-D, arXiv 2603.23911): deeper heads out of the heads there are.

The last m heads of a chain are looped to be heads K+1..K+m: head K+i starts as head K-m+i and reads the state of
head K+i-1. What a new depth owns is one of

- copies: a block of its own, as in the paper;
- shared: nothing; it has the block of the head that it loops (with one block, FastMTP's form);
- adapters: a LoRA adapter on that block.
"""

from __future__ import annotations

from typing import Literal

import torch

from mtpd.errors import UserError
from mtpd.heads.adapters import without_adapter
from mtpd.heads.chain.heads import ChainHeads
from mtpd.heads.config import HeadsConfig
from mtpd.trunk import Trunk

Form = Literal["copies", "shared", "adapters"]


def extended(heads: ChainHeads, trunk: Trunk, *, depth: int, form: Form, rank: int = 0, seed: int = 0) -> ChainHeads:
    """New heads of K+m depths that draft as K heads do whose last m are looped; not trained yet.

    Of the new heads, the parameters that the new depths own are trainable; those of depths 1..K are frozen. With
    `shared`, where new depths own nothing, all are trainable.

    Args:
        heads: of K depths; left as they are.
        depth: K+m, at most 2 K.
        rank: of adapters.
        seed: of the first half of new adapters; the other half is 0.

    Raises:
        UserError: adapters in a form that cannot have them.
    """
    old = heads.config
    new = depth - old.depth
    assert 0 < new <= old.depth, "the last m of K heads are looped"
    ranks = old.adapters or [0] * old.depth
    looped = ranks[-new:]
    if form == "shared" and any(looped):
        raise UserError(
            "extend.form: shared is not accepted for heads that have adapters of their own; accepted: copies, adapters"
        )
    if form == "adapters" and any(each not in (0, rank) for each in looped):
        raise UserError(
            f"extend.rank: {rank} is not the rank of the adapters that are looped; accepted: {max(looped)}, or "
            "extend.form: copies"
        )
    with torch.random.fork_rng(devices=[]), torch.device(trunk.device):
        torch.manual_seed(seed)
        wider = ChainHeads(trunk, _config(old, depth, form, rank))
    source, target = heads.chain(), wider.chain()
    state = {**wider.state_dict(), **heads.state_dict()}
    wider.load_state_dict(state)
    for place in range(old.depth, depth):
        looped_head = source[place - new]
        if form == "copies":
            target[place].load_state_dict(without_adapter(looped_head).state_dict())
        elif ranks[place - new]:
            target[place].load_state_dict(looped_head.state_dict())
    if form != "shared":
        for head in target[: old.depth]:
            head.requires_grad_(False)
    return wider.train(heads.training)


def _config(old: HeadsConfig, depth: int, form: Form, rank: int) -> HeadsConfig:
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
