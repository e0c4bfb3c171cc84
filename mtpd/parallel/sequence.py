"""Rows that are split over processes: sequence parallelism through DeepSpeed's Ulysses (arXiv 2309.14509).

N neighbouring ranks share each row of T tokens; the one with part i has tokens i T/N to (i+1) T/N, and computes for
these all that a token does by itself. Two things look further:

- attention, of trunk and heads. DeepSpeed's `UlyssesSPAttentionHF` (ALST, arXiv 2506.13996) gives each rank the whole
  row for its share of the attention heads, and brings back what they attended to;
- heads, which read and predict tokens ahead and are compared with the teacher there. The tokens come with the part
  (`mtpd.train.rows`), the trunk's states from the next rank.

Each rank's loss is its share of the sum, and gradients pass through the exchange, so that their sum over ranks is that
of whole rows: to sharding, the parts are rows like others.

Legend: B rows, L positions of a part, A positions ahead, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mtpd.errors import UserError
from mtpd.parallel.document_attention import CORE, RowAttention, by_documents, served, shapes
from mtpd.parallel.partition import TIMEOUT, deepspeed_running
from mtpd.recipe import Recipe
from mtpd.trunk import Trunk


class SplitRows(RowAttention):
    """This rank's place among those that share rows, and their attention. All ranks make one.

    Args:
        parts: N.
        ahead: A, how many positions heads look ahead; at most L.
    """

    def __init__(self, parts: int, ahead: int) -> None:
        super().__init__()
        import deepspeed

        # DeepSpeed's own view of the processes, of which Ulysses asks; there is one as soon as an engine trains.
        deepspeed.init_distributed(verbose=False)
        world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        assert world % parts == 0, "each row has all of its parts"
        self.parts, self.ahead, self.part = parts, ahead, rank % parts
        for first in range(0, world, parts):
            group = torch.distributed.new_group(list(range(first, first + parts)), timeout=TIMEOUT)
            if first <= rank < first + parts:
                self.group: Any = group
        self._ulysses: dict[tuple[int, ...], Any] = {}

    def whole(self, states_BLD: Tensor) -> Tensor:
        """The states [B, T, D] of whole rows, from those of all their parts, without gradient."""
        own = states_BLD.detach().contiguous()
        found = [torch.empty_like(own) for _ in range(self.parts)]
        torch.distributed.all_gather(found, own, group=self.group)
        return torch.cat(found, dim=1)

    def following(self, states_BLD: Tensor) -> Tensor:
        """The first A states [B, A, D] of the next part, without gradient; 0 behind the last part."""
        first = states_BLD.detach()[:, : self.ahead].contiguous()
        found = [torch.empty_like(first) for _ in range(self.parts)]
        torch.distributed.all_gather(found, first, group=self.group)
        return found[self.part + 1] if self.part + 1 < self.parts else torch.zeros_like(first)

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Attention of this rank's part."""
        self._given = kwargs["position_ids"]
        # Where ranks outnumber the heads of keys and values, DeepSpeed repeats these and changes this number.
        groups = getattr(module, "num_key_value_groups", None)
        try:
            attended, _ = self._exchange(query, key)(module, query, key, value, None, **kwargs)
        finally:
            if groups is not None:
                module.num_key_value_groups = groups
        return attended.view(*attended.shape[:2], query.shape[1], -1), None

    def _lengths(self, position_ids_BT: Tensor, given: Tensor) -> list[list[int]]:
        # Positions of whole rows are gathered anew for each layer; those of this rank's part stay the same.
        return super()._lengths(position_ids_BT, self._given)

    def _exchange(self, query: Tensor, key: Tensor) -> Any:
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        rows, heads, _, size = query.shape
        shape = (rows, heads, key.shape[1], size)
        if shape not in self._ulysses:
            self._ulysses[shape] = UlyssesSPAttentionHF(
                attn=super().attend,
                batch_size=rows,
                attn_head_count=heads,
                attn_head_size=size,
                kv_head_count=key.shape[1],
                num_hidden_layers=1,
                process_group=self.group,
                seq_length_is_variable=True,
            )
        return self._ulysses[shape]


class SharedTrunk:
    """A trunk that the ranks of rows run together; each of them gets the states of whole rows."""

    def __init__(self, trunk: Trunk, split: SplitRows) -> None:
        self._trunk, self._split = trunk, split

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trunk, name)

    def hidden(self, input_ids: Tensor, *, position_ids: Tensor | None = None, before_last: int = 0) -> Tensor:
        """States [B, T, D]. All ranks of these rows call it with the same; each alone where there are no positions."""
        assert not before_last, "shared layers and split rows exclude each other"
        if position_ids is None:
            return self._trunk.hidden(input_ids)
        split = self._split
        ids, positions = (each.chunk(split.parts, dim=1)[split.part] for each in (input_ids, position_ids))
        with split.attending(self._trunk.decoder):
            return split.whole(self._trunk.hidden(ids, position_ids=positions))


@contextmanager
def shared_trunk(recipe: Recipe, trunk: Trunk) -> Iterator[Any]:
    """The trunk as training runs it over packed rows, by the ranks that share rows together. All ranks come here."""
    parts = recipe.train.sequence_parallel
    if parts == 1:
        attention = by_documents(trunk, recipe.data.row_length)
        with nullcontext() if attention is None else attention.attending(trunk.decoder):
            yield trunk
        return
    with deepspeed_running(trunk.device):
        yield SharedTrunk(trunk, SplitRows(parts, ahead=0))


def check_split(recipe: Recipe, trunk: Trunk, *, processes: int) -> None:
    """Proves on a few tokens that Ulysses can take the trunk's attention, and that there are processes for it.

    Raises:
        UserError: it cannot, with the reason and the accepted numbers of parts.
    """
    parts = recipe.train.sequence_parallel
    if parts == 1:
        return
    if processes % parts:
        there = f"{processes} process{'es' * (processes > 1)}"
        raise UserError(
            f"train.sequence_parallel: {parts} is not accepted with {there}; accepted: 1, or a number that divides "
            "theirs (torchrun, deepspeed or `mtpd distill --launcher` start more)"
        )
    refused = f"train.sequence_parallel: {parts} is not accepted for {trunk.name}, "
    if reason := served(trunk):
        raise UserError(f"{refused}{reason}; accepted: 1, or full and sliding attention by {CORE} in transformers")
    for heads, shared, width, wide, by_head in shapes(trunk):
        if width != wide or by_head:
            reason = f"have {by_head} of their own" if by_head else f"have keys of {width} and values of {wide} numbers"
            raise UserError(f"{refused}whose attention heads {reason}, which Ulysses cannot exchange; accepted: 1")
        possible = [n for n in range(1, heads + 1) if heads % n == 0 and (shared % n == 0 or n % shared == 0)]
        if parts not in possible:
            raise UserError(
                f"{refused}with {heads} attention heads and {shared} of keys and values; accepted: "
                + ", ".join(map(str, possible))
            )
