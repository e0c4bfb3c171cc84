"""Texts as one stream of tokens, cut into rows: what a model is pretrained on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mtpd.data import stdlib
from mtpd.data.prompts import load_prompts
from mtpd.errors import UserError


def stream_rows(tokenizer: Any, source: str, *, row_length: int, limit: int | None = None) -> Tensor:
    """Rows [N, T] of int32; what does not fill a row at the end is left out.

    Args:
        source: `stdlib`, `stdlib-held-out`, or a .jsonl file of `text` rows.
        limit: rows at most, evenly spaced; None for all.

    Raises:
        UserError: no row is full.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for text in _texts(source):
        ids += _tokens(tokenizer, text) + end
    count = len(ids) // row_length
    if not count:
        raise UserError(f"data.row_length: {row_length} is more than the {len(ids)} tokens of {source}")
    rows = torch.tensor(ids[: count * row_length], dtype=torch.int32).view(count, row_length)
    if limit is not None and limit < count:
        rows = rows[torch.arange(limit) * count // limit]
    return rows


def _texts(source: str) -> Iterator[str]:
    if source in (stdlib.SOURCE, stdlib.HELD_OUT):
        yield from (text for _, text in stdlib.documents(source))
        return
    for row in load_prompts(source):
        if not isinstance(row.prompt, str):
            raise UserError(f"{source}: row {row.id} is a conversation; accepted: `text` rows")
        yield row.prompt + (row.response if isinstance(row.response, str) else "")


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
