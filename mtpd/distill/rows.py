"""The rows that are trained on, and their order, which is the same for any number of processes.

A step reads the next rows of the epoch's order, whoever computes them: batch after batch goes to process after
process. Where the last round of an epoch has not enough rows for all, it is filled with rows without response tokens,
which add nothing to the loss and to the number of tokens that it is divided by. accelerate would fill it with rows
from the beginning, which would count twice.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from mtpd.alignment import IGNORED
from mtpd.data.packing import PackedRows


class TrainingRows(Dataset[dict[str, Tensor]]):
    """Packed rows, each with its number "row", by which its hidden states are kept.

    Args:
        multiple: fills up to a multiple of so many rows. What is filled in is a row that there is, so that its states
            are where those of all rows are, without its labels.
    """

    def __init__(self, rows: PackedRows, *, multiple: int = 1) -> None:
        self.rows = rows
        self.filling = -len(rows) % multiple

    def __len__(self) -> int:
        return len(self.rows) + self.filling

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = index % len(self.rows)
        item = {**self.rows[row], "row": torch.tensor(row)}
        if index >= len(self.rows):
            item["labels"] = torch.full_like(item["labels"], IGNORED)
        return item


class RowOrder(Sampler[int]):
    """All rows in random order, another one in each epoch, and behind them what fills the last round.

    For one process this is the order of accelerate's seeded sampler.
    """

    def __init__(self, rows: TrainingRows, *, seed: int) -> None:
        self.rows, self.seed, self.epoch = rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        count = len(self.rows.rows)
        yield from torch.randperm(count, generator=generator).tolist()
        yield from range(count, len(self.rows))

    def __len__(self) -> int:
        return len(self.rows)
