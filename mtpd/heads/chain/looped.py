"""Looped extension (MTP-D, arXiv 2603.23911): deeper heads out of the heads there are.

The last m heads of a chain are looped to be heads K+1..K+m: head K+i starts as head K-m+i and reads the state of
head K+i-1. What a new depth owns is one of

- copies: a block of its own, as in the paper;
- shared: nothing; it has the block of the head that it loops (with one block, FastMTP's form);
- adapters: a LoRA adapter on that block.
"""

from __future__ import annotations

from typing import Literal

from mtpd.errors import UserError
from mtpd.heads.config import HeadsConfig

Form = Literal["copies", "shared", "adapters"]


def looped(old: HeadsConfig, depth: int, form: Form, rank: int) -> HeadsConfig:
    """Works out the config of `depth` heads: these, and as many of the last ones again as are missing.

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
