"""Drafting behind adapted layers of the trunk, for texts that lie in slots.

Shape legend: N rows, Q positions of a forward, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtpd.heads.drafting import Drafter, Pick
from mtpd.packed_modules import faster
from mtpd.slots import Bounded, Newest, SlotCache, Span, Tensors
from mtpd.trunk import Trunk


class SharedLayerDrafter(Drafter):
    """Runs the adapted layers over the tokens accepted since they ran last, and hands the states to another drafter."""

    def __init__(self, layers: nn.Module, inner: Drafter, trunk: Trunk, *, slots: int, capacity: int) -> None:
        self.inner, self.rows = inner, inner.rows
        self.layers: Any = faster(layers)
        device, dtype = trunk.device, trunk.dtype
        self.cache = SlotCache(self.layers.config, slots=slots, capacity=capacity, dtype=dtype, device=device)
        # One place more for what belongs to no position.
        self.states = torch.zeros(slots, capacity + 1, trunk.hidden_size, dtype=dtype, device=device)
        # By slot, how many positions are in the cache.
        self.held = [0] * slots

    @property
    def depth(self) -> int:
        return self.inner.depth

    def begin(self, span: Span, hidden: Tensor, tokens: Tensor, lengths: Sequence[int]) -> None:
        self.read(span, hidden)
        self.cache.begin(span)
        self.inner.begin(span, self._forward(span, hidden, None), tokens, lengths)
        for row, length in enumerate(lengths, start=span.rows.start):
            self.held[row] = length - 1

    def read(self, span: Span, hidden: Tensor) -> None:
        span.write(self.states, hidden)

    def drafts(self, tokens: Tensor, newest: Sequence[int], depth: int, pick: Pick) -> Iterator[tuple[Tensor, Tensor]]:
        newest = Newest.of(newest, tokens.device)
        width = newest.width(max(1, *(end - self.held[row] for row, end in enumerate(newest))))

        def catch_up(at: Newest | Bounded) -> Tensors:
            span = at.span(width, -width)
            self.inner.read(span, self._forward(span, span.read(self.states), self.cache.go_on(span)))
            return ()

        newest.run(("shared layers", width), catch_up)
        self.held[: len(newest)] = newest
        yield from self.inner.drafts(tokens, newest, depth, pick)

    def copy_row(self, source: int, target: int, length: int) -> None:
        self.inner.copy_row(source, target, length)
        self.cache.copy_row(source, target, length)
        self.states[target, :length] = self.states[source, :length]
        self.held[target] = self.held[source]

    def _forward(self, span: Span, below: Tensor, mask: Tensor | dict[str, Tensor] | None) -> Tensor:
        return self.layers(
            inputs_embeds=below,
            position_ids=span.positions,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
