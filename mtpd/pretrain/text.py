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
from mtpd.data.rows.left_out import LeftOut, Unusable
from mtpd.data.rows.read_row import read_row
from mtpd.data.sources import read
from mtpd.errors import UserError
from mtpd.progress import Bar

TOGETHER = 64
"""Texts that are tokenised at a time."""


def texts_of(
    source: str, *, split: str = "train", subset: str | None = None, left_out: LeftOut | None = None
) -> Iterator[str]:
    """Yields the texts of a source. Rows without text (conversations, empty ones) are left out.

    Args:
        source: `stdlib`, `stdlib-held-out`, a file or folder of `text` rows, or a datasets id.
        split, subset: of a datasets id.
        left_out: counts the rows that cannot be used.

    Raises:
        UserError: no row has text.
    """
    if source in (stdlib.SOURCE, stdlib.HELD_OUT):
        yield from (text for _, text in stdlib.documents(source))
        return
    left_out, usable = LeftOut() if left_out is None else left_out, False
    for place, row in read(source, split=split, subset=subset):
        try:
            text = _text(row, place)
        except Unusable as error:
            left_out.add(error)
        else:
            usable = True
            yield text
    if not usable:
        left_out.check(left_out.total, source=source, what="texts")


def _text(row: Any, place: str) -> str:
    read = read_row(row, place=place, default_id="")
    if not isinstance(read.prompt, str):
        raise Unusable("conversations", f"{place}: is a conversation; accepted: `text` rows")
    text = read.prompt + (read.response if isinstance(read.response, str) else "")
    if not text.strip():
        raise Unusable("empty", f"{place}: it has no text")
    return text


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
        UserError: no row is full, or no row of the source has text.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids, left_out, texts = array("i"), LeftOut(most=1.0), 0
    with Bar(desc="tokens", unit="token", unit_scale=True, disable=not progress) as bar:
        left = texts_of(source, split=split, subset=subset, left_out=left_out)
        while some := list(islice(left, TOGETHER)):
            for each in tokenizer(some, add_special_tokens=False)["input_ids"]:
                ids.extend([*each, *end])
            texts += len(some)
            bar.update(len(ids) - bar.n)
            if tokens is not None and len(ids) >= tokens:
                break
    left_out.check(texts + left_out.total, source=source, what="texts")
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
