"""The text of a pretraining run, as rows of one stream of tokens."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from mtpd.data import stdlib
from mtpd.data.packing import PackedRows
from mtpd.data.prompts import read_row
from mtpd.data.sources import read
from mtpd.errors import UserError
from mtpd.progress import Bar

TOGETHER = 64
"""Texts that are tokenised at a time."""


def texts_of(source: str, *, split: str = "train", subset: str | None = None) -> Iterator[str]:
    """Yields the texts of a source.

    Args:
        source: `stdlib`, `stdlib-held-out`, a .jsonl file of `text` rows, or a datasets id.
        split, subset: of a datasets id.

    Raises:
        UserError: a row is a conversation.
    """
    if source in (stdlib.SOURCE, stdlib.HELD_OUT):
        yield from (text for _, text in stdlib.documents(source))
        return
    for place, row in read(source, split=split, subset=subset):
        text = read_row(row, place=place, default_id="")
        if not isinstance(text.prompt, str):
            raise UserError(f"{place}: is a conversation; accepted: `text` rows")
        yield text.prompt + (text.response if isinstance(text.response, str) else "")


def stream_rows(
    tokenizer: Any,
    source: str,
    *,
    row_length: int,
    limit: int | None = None,
    tokens: int | None = None,
    split: str = "train",
    subset: str | None = None,
    progress: bool = False,
) -> Tensor:
    """Texts as one stream of tokens, cut into rows [N, T] of int32; what does not fill a row at the end is left out.

    Args:
        source, split, subset: as `texts_of` takes them.
        limit: rows at most, evenly spaced; None for all.
        tokens: tokens at most, from the beginning; None for all.

    Raises:
        UserError: no row is full.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = array("i")
    with Bar(desc="tokens", unit="token", unit_scale=True, disable=not progress) as bar:
        left = texts_of(source, split=split, subset=subset)
        while some := list(islice(left, TOGETHER)):
            for each in tokenizer(some, add_special_tokens=False)["input_ids"]:
                ids.extend([*each, *end])
            bar.update(len(ids) - bar.n)
            if tokens is not None and len(ids) >= tokens:
                break
    count = min(len(ids), tokens or len(ids)) // row_length
    if not count:
        raise UserError(f"data.row_length: {row_length} is more than the {len(ids)} tokens of {source}")
    rows = torch.frombuffer(ids, dtype=torch.int32)[: count * row_length].view(count, row_length).clone()
    if limit is not None and limit < count:
        rows = rows[torch.arange(limit) * count // limit]
    return rows


def as_packed(rows_NT: Tensor) -> PackedRows:
    """Rows as documents of their own, all of which is trained on."""
    positions = torch.arange(rows_NT.shape[1]).expand_as(rows_NT)
    return PackedRows(rows_NT, rows_NT, positions, documents=len(rows_NT), cut=0, dropped=0)
