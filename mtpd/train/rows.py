"""The rows that are trained on, and their order, which is the same for any number of processes.

A step reads the next rows of the epoch's order, whoever computes them: batch after batch goes to process after
process. Where the last round of an epoch has not enough rows for all, it is filled with rows without response tokens,
which add nothing to the loss and to the number of tokens that it is divided by. accelerate would fill it with rows
from the beginning, which would count twice.

Where neighbouring processes share each row (`mtpd.parallel.sequence`), a part of a row takes the place of a row: a
batch has one part of its rows, and the next process gets the next part of the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from mtpd.alignment import IGNORED
from mtpd.data.packing import PackedRows
from mtpd.data.store import HiddenStates
from mtpd.parallel.sequence import SplitRows


class TrainingRows(Dataset[dict[str, Any]]):
    """Packed rows, each with its number "row", by which its hidden states are kept.

    Args:
        multiple: fills up to a multiple of so many rows. What is filled in is a row that there is, so that its states
            are where those of all rows are, without its labels, and with 0 as its number of "tokens".
        parts: of each row, one after the other: item i is part i % parts of row i // parts.
        ahead: how many ids, labels and positions that follow a part come with it, as "ahead" [3, ahead].
        stores: have states of the rows, and are told of each row that is loaded: a batch is, while the one before it is
            computed.
    """

    def __init__(
        self,
        rows: PackedRows,
        *,
        multiple: int = 1,
        parts: int = 1,
        ahead: int = 0,
        stores: Sequence[HiddenStates] = (),
    ) -> None:
        self.rows, self.parts, self.ahead, self.stores = rows, parts, ahead, stores
        self.places = len(rows) + -len(rows) % multiple
        """Rows, with those that fill a round."""

    def __len__(self) -> int:
        return self.places * self.parts

    def __getstate__(self) -> dict[str, Any]:
        """For processes that load rows, if a recipe has such: they do not read states."""
        return {**self.__dict__, "stores": ()}

    def __getitem__(self, index: int) -> dict[str, Any]:
        place, part = divmod(index, self.parts)
        row = place % len(self.rows)
        if get_worker_info() is None:
            for store in self.stores:
                store.expect(row)
        item = self.rows[row]
        if place >= len(self.rows):
            item["labels"] = torch.full_like(item["labels"], IGNORED)
        if self.parts > 1:
            item = self._part(item, part)
        counted = len(item["input_ids"]) if place < len(self.rows) else 0
        return {**item, "row": row, "tokens": torch.tensor(counted)}

    def _part(self, item: dict[str, Tensor], part: int) -> dict[str, Tensor]:
        size = self.rows.row_length // self.parts
        # Behind the last part comes what is of no document that there is.
        whole = [
            torch.nn.functional.pad(item[name], (0, self.ahead), value=fill)
            for name, fill in (("input_ids", 0), ("labels", IGNORED), ("position_ids", 0))
        ]
        found = torch.stack(whole)[:, part * size : (part + 1) * size + self.ahead]
        ids, labels, positions = found[:, :size]
        return {"input_ids": ids, "labels": labels, "position_ids": positions, "ahead": found[:, size:]}


class RowOrder(Sampler[int]):
    """All rows in random order, another one in each epoch, and behind them what fills the last round.

    For one process this is the order of accelerate's seeded sampler.

    Args:
        batch: rows of a batch; first come their first parts, then their second ones, and so on.
    """

    def __init__(self, rows: TrainingRows, *, seed: int, batch: int = 1) -> None:
        self.rows, self.seed, self.batch, self.epoch = rows, seed, batch, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        count, places, parts = len(self.rows.rows), self.rows.places, self.rows.parts
        order = [*torch.randperm(count, generator=generator).tolist(), *range(count, places)]
        for first in range(0, places, self.batch):
            for part in range(parts):
                yield from (parts * place + part for place in order[first : first + self.batch])

    def __len__(self) -> int:
        return len(self.rows)


class PartOfStates:
    """The chunk of this process of states that are kept for whole rows."""

    def __init__(self, whole: HiddenStates, split: SplitRows) -> None:
        self.whole, self.split = whole, split

    def __contains__(self, row: object) -> bool:
        return row in self.whole

    def __getitem__(self, row: int) -> Tensor:
        return self.whole[row].chunk(self.split.parts)[self.split.part]

    def expect(self, row: int) -> None:
        self.whole.expect(row)

    def put(self, rows: Sequence[int], hidden_BTD: Tensor) -> None:
        """Nothing is missing."""
        raise AssertionError("a part of a row is not kept")

    def flush(self) -> None:
        self.whole.flush()
