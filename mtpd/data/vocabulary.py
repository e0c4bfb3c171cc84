"""The draft vocabulary: the tokens that heads draft over. Verification stays over all of them."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from mtpd.alignment import IGNORED
from mtpd.data.packing import PackedRows


def draft_vocabulary(rows: PackedRows, size: int, *, tokens: int, always: Collection[int] = ()) -> Tensor | None:
    """The `size` tokens most frequent in the responses, in ascending order of id.

    If the responses have fewer distinct tokens, the lowest ids fill up: byte-pair vocabularies number
    their merges from the most frequent on.

    Args:
        size: how many; 0 means all tokens.
        tokens: how many tokens the tokenizer has.
        always: ids that are in whatever their count, such as end tokens.

    Returns:
        Token ids [size], or None where heads draft over the whole vocabulary.
    """
    if size == 0 or size >= tokens:
        return None
    labels = rows.labels[rows.labels != IGNORED].long()
    counts = torch.bincount(labels, minlength=tokens)[:tokens].double()
    # Ties, zero counts among them, go to the lower id.
    order = counts - torch.arange(tokens, dtype=torch.float64) / (2 * tokens)
    order[list(always)] = torch.inf
    return order.topk(size).indices.sort().values
