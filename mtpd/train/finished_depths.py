"""The depths that a stage of an extension does not train: what the first trained one reads of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtpd.data.store import HiddenStates, stored_states
from mtpd.heads import Heads, copy_heads
from mtpd.trunk import Trunk


class FinishedDepths:
    """States of depth K of finished heads, computed once for each row, or in each epoch without a store.

    Args:
        heads: of depth K. A copy in the trunk's number format computes the states, as decoding does.
        store: keeps the states by the number of their row.
    """

    def __init__(self, trunk: Trunk, heads: Heads, store: HiddenStates | None) -> None:
        self.trunk, self.store = trunk, store
        self.heads = copy_heads(heads, trunk.dtype).eval().requires_grad_(False)

    @property
    def depth(self) -> int:
        return self.heads.depth

    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """States [B, T, D] for a batch with `input_ids`, `position_ids`, `hidden` and the numbers of its rows.

        Parts of rows come with what follows them, `ahead`.
        """
        return stored_states(batch, self.store, self._states, device=self.trunk.device)

    @torch.no_grad()
    def _states(self, batch: dict[str, Tensor]) -> Tensor:
        tokens = batch["input_ids"]
        if "ahead" in batch:
            tokens = torch.cat([tokens, batch["ahead"][:, 0]], dim=1)
        states = self.heads(self.trunk, batch["hidden"], tokens, position_ids_BT=batch["position_ids"])
        return states[-1].to(self.trunk.dtype)

    def flush(self) -> None:
        """Makes what was kept durable."""
        if self.store is not None:
            self.store.flush()
