"""Samples packed into rows of one length, with the borders between documents kept.

A row holds whole documents one after another. `position_ids` start again at 0 at each document:
attention and every shift stop there. The padding at the end of a row is a document of its own,
without response tokens. Labels are the tokens themselves (nothing is shifted here), and -100
wherever a token is not part of a response.

    documents p q | a b c  and  r | d, row_length 8:
    input_ids      p    q    a    b    c    r    d    pad
    labels        -100 -100  a    b    c   -100  d   -100
    position_ids   0    1    2    3    4    0    1    0

Shape legend: N rows, B rows of a batch, T positions.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from mtpd.alignment import IGNORED
from mtpd.errors import UserError
from mtpd.files import fingerprint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One document: its tokens, and which of them are response (the same length)."""

    id: str
    ids: list[int]
    response_mask: list[bool]
    family: str = ""

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.response_mask)

    @classmethod
    def of(cls, id: str, prompt_ids: Sequence[int], response_ids: Sequence[int], family: str = "") -> Sample:
        """A prompt followed by one response."""
        mask = [False] * len(prompt_ids) + [True] * len(response_ids)
        return cls(id, [*prompt_ids, *response_ids], mask, family)

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens before the first response token."""
        first = self.response_mask.index(True) if True in self.response_mask else len(self.ids)
        return self.ids[:first]

    @property
    def response_ids(self) -> list[int]:
        """The response tokens (of all turns)."""
        return [token for token, response in zip(self.ids, self.response_mask, strict=True) if response]


class PackedRows(TorchDataset[dict[str, Tensor]]):
    """N rows of T positions; item i is {"input_ids", "labels", "position_ids"}, each a long tensor [T].

    Attributes:
        documents: how many documents the rows hold.
        cut: how many of them lost their tail because they were longer than a row.
        dropped: documents left out because no response token of theirs fits into a row.
    """

    def __init__(
        self,
        input_ids_NT: Tensor,
        labels_NT: Tensor,
        position_ids_NT: Tensor,
        *,
        documents: int,
        cut: int,
        dropped: int,
    ) -> None:
        # Kept as int32: half the memory, and no vocabulary is larger.
        self.input_ids, self.labels, self.position_ids = (
            tensor.to(torch.int32) for tensor in (input_ids_NT, labels_NT, position_ids_NT)
        )
        self.documents, self.cut, self.dropped = documents, cut, dropped

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "input_ids": self.input_ids[index].long(),
            "labels": self.labels[index].long(),
            "position_ids": self.position_ids[index].long(),
        }

    @property
    def row_length(self) -> int:
        return self.input_ids.shape[1]

    @property
    def response_tokens(self) -> int:
        """Tokens that carry a label."""
        return int((self.labels != IGNORED).sum())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all three tensors: what was trained on, and the key of a hidden-state store."""
        parts = (self.input_ids, self.labels, self.position_ids)
        shape = f"{len(self)}x{self.row_length}"
        return fingerprint(shape.encode() + b"".join(part.contiguous().numpy().tobytes() for part in parts))


def _packed(columns: dict[str, Any], row_length: int) -> Any:
    """Rows of several documents each, with their lengths."""
    # Imported here because it takes seconds, and most commands never pack.
    from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from trl import pack_dataset

    quiet = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        # One batch, because documents are only packed with others of their batch.
        return pack_dataset(
            Dataset.from_dict(columns),
            row_length,
            strategy="bfd",
            map_kwargs={"batch_size": len(columns["input_ids"])},
        )
    finally:
        if not quiet:
            enable_progress_bars()


def pack(samples: Iterable[Sample], *, row_length: int, pad_token_id: int = 0, alone: bool = False) -> PackedRows:
    """Packs samples into rows, best fit first, longest documents first (TRL's `pack_dataset`).

    A document longer than a row is cut at `row_length`; what is left out is counted and warned of.

    Args:
        row_length: T, at least 2.
        pad_token_id: fills the end of a row; any valid token id, it carries no loss.
        alone: gives each document a row, for trunks that would carry a state from one to the next.

    Raises:
        UserError: no response token is left to train on.
    """
    kept: list[Sample] = []
    cut = dropped = lost = total = 0
    for sample in samples:
        total += 1
        # The first token of a document is never predicted, so a response there is none.
        if not any(sample.response_mask[1:row_length]):
            dropped += 1
            continue
        if len(sample.ids) > row_length:
            cut += 1
            lost += sum(sample.response_mask[row_length:])
        kept.append(sample)
    if not kept:
        raise UserError(
            f"data: no response token to train on in {total} documents"
            + (f" of at most data.row_length={row_length} tokens" if total else "")
        )
    if cut:
        logger.warning(
            "%d of %d documents are longer than data.row_length=%d: %d response tokens are left out",
            cut,
            total,
            row_length,
            lost,
        )
    if dropped:
        logger.warning(
            "%d of %d documents have no response token within data.row_length=%d and are left out",
            dropped,
            total,
            row_length,
        )

    columns: dict[str, Any] = {
        "input_ids": [sample.ids for sample in kept],
        "labels": [
            [token if response else IGNORED for token, response in zip(sample.ids, sample.response_mask, strict=True)]
            for sample in kept
        ],
    }
    packed: Any
    if alone:
        packed = [
            {"input_ids": ids[:row_length], "labels": labels[:row_length], "seq_lengths": [min(len(ids), row_length)]}
            for ids, labels in zip(columns["input_ids"], columns["labels"], strict=True)
        ]
    else:
        packed = _packed(columns, row_length)

    shape = (len(packed), row_length)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int32)
    labels = torch.full(shape, IGNORED, dtype=torch.int32)
    position_ids = torch.empty(shape, dtype=torch.int32)
    for row, packed_row in enumerate(packed):
        filled = len(packed_row["input_ids"])
        input_ids[row, :filled] = torch.tensor(packed_row["input_ids"])
        labels[row, :filled] = torch.tensor(packed_row["labels"])
        lengths = [*packed_row["seq_lengths"], row_length - filled]
        position_ids[row] = torch.cat([torch.arange(length) for length in lengths])
    return PackedRows(input_ids, labels, position_ids, documents=len(kept), cut=cut, dropped=dropped)


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows stacked into a batch {"input_ids", "labels", "position_ids"}, each long [B, T].

    Numbers, such as that of a row, make a list: no device gets what only the host reads.
    """
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    return {key: torch.stack(each) if isinstance(each[0], Tensor) else each for key, each in columns.items()}


def response_texts(rows: PackedRows) -> list[list[int]]:
    """The response tokens of each document of packed rows."""
    texts: list[list[int]] = []
    for ids, labels, positions in zip(rows.input_ids, rows.labels, rows.position_ids, strict=True):
        for token, label, position in zip(ids.tolist(), labels.tolist(), positions.tolist(), strict=True):
            if position == 0:
                texts.append([])
            if label != IGNORED:
                texts[-1].append(token)
    return [text for text in texts if text]
