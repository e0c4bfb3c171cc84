"""The draft vocabulary: the tokens that heads draft over. Verification stays over all of them."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtpd.alignment import IGNORED
from mtpd.data.packing import PackedRows
from mtpd.errors import UserError
from mtpd.files import write_whole

SCHEMA = 1


def count_tokens(rows: PackedRows, *, tokens: int) -> Tensor:
    """Counts each token in the responses, [tokens]."""
    labels = rows.labels[rows.labels != IGNORED].long()
    return torch.bincount(labels, minlength=tokens)[:tokens]


def draft_vocabulary(rows: PackedRows, size: int, *, tokens: int, always: Collection[int] = ()) -> Tensor | None:
    """The `size` tokens most frequent in the responses, in ascending order of id.

    If the responses have fewer distinct tokens, the lowest ids fill up: byte-pair vocabularies number
    their merges from the most frequent on.

    Args:
        size: how many; 0 means all tokens.
        tokens: how many tokens the tokenizer has.
        always: ids that are in whatever their count, such as end tokens and other special ones.

    Returns:
        Token ids [size], or None where heads draft over the whole vocabulary.

    Raises:
        UserError: `size` has no room for the ids that are always in.
    """
    if size == 0 or size >= tokens:
        return None
    always = {token for token in always if 0 <= token < tokens}
    if size < len(always):
        raise UserError(
            f"heads.vocabulary: {size} has no room for the special tokens; accepted: 0, or at least {len(always)}"
        )
    counts = count_tokens(rows, tokens=tokens).double()
    # Ties, zero counts among them, go to the lower id.
    order = counts - torch.arange(tokens, dtype=torch.float64) / (2 * tokens)
    order[list(always)] = torch.inf
    return order.topk(size).indices.sort().values


def coverage(rows: PackedRows, vocabulary: Tensor | None, *, tokens: int) -> float:
    """Share of the response tokens that the draft vocabulary has: no head drafts the others."""
    if vocabulary is None:
        return 1.0
    counts = count_tokens(rows, tokens=tokens)
    return float(counts[vocabulary].sum() / counts.sum())


def save_vocabulary(path: Path, vocabulary: Tensor, *, share: float) -> None:
    """Writes a draft vocabulary as JSON: `schema`, `coverage` and the token ids in `tokens`."""
    content = {"schema": SCHEMA, "coverage": share, "tokens": vocabulary.tolist()}
    write_whole(path, json.dumps(content) + "\n")


def load_vocabulary(path: str | Path, *, tokens: int | None = None) -> Tensor:
    """Token ids in ascending order, from a file that `save_vocabulary` wrote.

    Args:
        tokens: how many tokens the tokenizer has, if known.

    Raises:
        UserError: the file is missing or unreadable, or has ids that are no tokens of this model.
    """
    accepted = "accepted: a number, or a file that `mtpd data vocab` wrote"
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"heads.vocabulary: {path}: cannot be read ({error}); {accepted}") from error
    ids: Any = content.get("tokens") if isinstance(content, dict) and content.get("schema") == SCHEMA else None
    if not _are_ids(ids):
        raise UserError(f"heads.vocabulary: {path}: is no draft vocabulary; {accepted}")
    if tokens is not None and max(ids) >= tokens:
        raise UserError(
            f"heads.vocabulary: {path}: token {max(ids)} is none of this model; accepted: ids below {tokens}"
        )
    return torch.tensor(sorted(ids))


def _are_ids(ids: Any) -> bool:
    whole = isinstance(ids, Sequence) and len(ids) > 0 and all(type(token) is int and token >= 0 for token in ids)
    return whole and len(set(ids)) == len(ids)


def draft_size(vocabulary: int | str) -> int:
    """Gives the number of tokens that `heads.vocabulary` means, 0 for all."""
    return vocabulary if isinstance(vocabulary, int) else len(load_vocabulary(vocabulary))
