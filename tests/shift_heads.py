"""A kind of heads that is no part of mtpd: one matrix for all depths, applied k times at depth k."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtpd.heads import HeadsConfig, Kind
from mtpd.heads.base import StateHeads
from mtpd.heads.drafting import Drafter, NewestStates, Pick
from mtpd.trunk import Trunk

KIND = Kind(
    name="shift",
    about="one matrix for all depths",
    heads="shift_heads:ShiftHeads",
    start="shift_heads",
)


class ShiftHeads(StateHeads):
    independent = True

    def __init__(self, trunk: Trunk, config: HeadsConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList([nn.Linear(trunk.hidden_size, trunk.hidden_size, bias=False)])

    def forward(
        self, trunk: Trunk, hidden_BTD: Tensor, input_ids_BT: Tensor, *, position_ids_BT: Tensor
    ) -> list[Tensor]:
        states = [hidden_BTD]
        for _ in range(self.depth):
            states.append(self.layers[0](states[-1]))
        return states[1:]

    def drafter(self, trunk: Trunk, *, slots: int, capacity: int) -> Drafter:
        return ShiftDrafter(self, trunk, slots=slots, capacity=capacity)


class ShiftDrafter(NewestStates):
    def __init__(self, heads: ShiftHeads, trunk: Trunk, *, slots: int, capacity: int) -> None:
        super().__init__(trunk, slots=slots, capacity=capacity)
        self.heads, self.trunk, self.rows = heads, trunk, heads.rows()

    @property
    def depth(self) -> int:
        return self.heads.depth

    def drafts(
        self, tokens: Tensor, newest: Sequence[int], depth: int, pick: Pick
    ) -> Iterator[tuple[Tensor | None, Tensor]]:
        state = self.newest_states(newest)
        for index in range(depth):
            state = self.heads.layers[0](state)
            logits = self.trunk.unembedding.select(self.rows)(state)
            yield logits, pick(logits, index)


def configure(settings: Mapping[str, Any], trunk: Trunk) -> dict[str, Any]:
    return {}


@torch.no_grad()
def initialise(heads: ShiftHeads, trunk: Trunk, start: str | None, *, seed: int = 0) -> bool:
    matrix: Any = heads.layers[0]
    matrix.weight.copy_(torch.eye(trunk.hidden_size))
    return False


def fit(heads: ShiftHeads, trunk: Trunk, batches: Iterable[dict[str, Tensor]]) -> None:
    raise AssertionError("initialise asks for no fit")
