"""The trunk's hidden states of training rows, kept so that the trunk runs over each row once.

The trunk is frozen, so h_t of a row never changes, and everything that training needs follows from it: h_t costs
2 D bytes a token in bfloat16, where logits would cost thirty times that. A store fills while it is used: a row that
it lacks is computed and kept (`with_hidden`), so that from the second epoch on the trunk does not run.

Stores are in memory (`MemoryStore`) or on the disk (`mtpd.data.disk_store`).

Legend: N rows, B rows of a batch, T positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

from mtpd.data.packing import PackedRows
from mtpd.errors import MtpdError
from mtpd.files import fingerprint_json, megabytes
from mtpd.trunk import Trunk


class HiddenStates(Protocol):
    """Keeps hidden states by the number of their row."""

    def __contains__(self, row: object) -> bool:
        """Whether it has a row, as far as is known without reading it."""

    def __getitem__(self, row: int) -> Tensor:
        """Hidden states [T, D] of a row.

        Raises:
            KeyError: it has none, or what it has is damaged.
        """

    def expect(self, row: int) -> None:
        """Says that a row will be read soon."""

    def put(self, rows: Sequence[int], hidden_BTD: Tensor) -> None:
        """Keeps the states of these rows."""

    def flush(self) -> None:
        """Makes what was kept durable."""


def store_key(
    trunk: str, tokenizer: Any, prompts: Sequence[str], rows: PackedRows, *, before_last: int = 0
) -> dict[str, str]:
    """Fingerprints of all that the hidden states of packed rows depend on, by name.

    Args:
        trunk: fingerprint of the trunk.
        prompts: fingerprints of the prompts.
        before_last: how many layers stand above the states.
    """
    words = [sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map, tokenizer.chat_template]
    return {
        **({"layers above (heads.shared_layers)": str(before_last)} if before_last else {}),
        "trunk": trunk,
        "tokenizer": fingerprint_json(words),
        "prompts": fingerprint_json(sorted(prompts)),
        "packed rows": rows.fingerprint,
    }


def bytes_needed(rows: int, row_length: int, trunk: Trunk) -> int:
    """Size of the states of so many rows."""
    return rows * row_length * trunk.hidden_size * trunk.dtype.itemsize


class MemoryStore:
    """Hidden states in the memory of the process, in the trunk's number format.

    Raises:
        MtpdError: the memory has no room for all rows; the message says how much is needed.
    """

    def __init__(self, trunk: Trunk, rows: PackedRows) -> None:
        needed, free = bytes_needed(len(rows), rows.row_length, trunk), psutil.virtual_memory().available
        if needed > free:
            raise MtpdError(
                f"data.hidden_states: memory needs {megabytes(needed)} for the hidden states, and "
                f"{megabytes(free)} are free; accepted then: disk or recompute"
            )
        self._states: dict[int, Tensor] = {}
        self._dtype = trunk.dtype

    def __contains__(self, row: object) -> bool:
        return row in self._states

    def __getitem__(self, row: int) -> Tensor:
        return self._states[row]

    def expect(self, row: int) -> None:
        """Nothing: memory needs no reading."""

    def put(self, rows: Sequence[int], hidden_BTD: Tensor) -> None:
        self._states |= zip(rows, hidden_BTD.to("cpu", self._dtype, copy=True), strict=True)

    def flush(self) -> None:
        """Nothing: memory is not durable."""


def with_hidden(
    batch: dict[str, Any], trunk: Trunk, store: HiddenStates | None, *, before_last: int = 0
) -> dict[str, Any]:
    """A batch with the trunk's states "hidden" [B, T, D] in place of the numbers of its rows, "row".

    The trunk runs over the rows that the store lacks, and the store keeps them.

    Args:
        before_last: how many layers stand above the states (`Trunk.hidden`); those of a store have to be of the same.
    """

    def hidden(missing: dict[str, Tensor]) -> Tensor:
        return trunk.hidden(missing["input_ids"], position_ids=missing["position_ids"], before_last=before_last)

    batch = {**batch, "hidden": stored_states(batch, store, hidden, device=trunk.device)}
    del batch["row"]
    return batch


def stored_states(
    batch: Mapping[str, Any],
    store: HiddenStates | None,
    compute: Callable[[dict[str, Tensor]], Tensor],
    *,
    device: torch.device,
) -> Tensor:
    """States [B, T, D] of the rows of a batch, from a store; what it lacks is computed and kept.

    Args:
        batch: tensors with one entry a row, and the numbers of the rows, "row".
        compute: states of a batch of the missing rows alone, on `device`.
    """
    numbers: list[int] = batch["row"]
    kept = {at: states for at, row in enumerate(numbers) if (states := _kept(store, row)) is not None}
    missing = [at for at in range(len(numbers)) if at not in kept]
    known = {at: states.to(device, non_blocking=True) for at, states in kept.items()}
    if missing:
        tensors = {name: tensor for name, tensor in batch.items() if name != "row"}
        if kept:
            chosen = torch.tensor(missing)
            tensors = {name: each[chosen.to(each.device, non_blocking=True)] for name, each in tensors.items()}
        computed = compute({name: tensor.to(device) for name, tensor in tensors.items()})
        if store is not None:
            store.put([numbers[at] for at in missing], computed)
        if not kept:
            return computed
        known |= zip(missing, computed, strict=True)
    return torch.stack([known[at] for at in range(len(numbers))])


def _kept(store: HiddenStates | None, row: int) -> Tensor | None:
    try:
        return None if store is None else store[row]
    except KeyError:
        return None
