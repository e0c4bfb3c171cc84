"""The only place that shifts: tokens, teacher rows, labels and masks.

The rule. Head k at position t reads the trunk's state h_t and the tokens x_{t+1}..x_{t+k}, and
predicts x_{t+k+1}. The main head at position t+k has read the same prefix and predicts the same
token, so it is the teacher row. A position counts at depth k only if the tokens x_{t+1}..x_{t+k+1}
all belong to the response and to the document of t: then t is a place where decoding drafts.

Example, K = 2, one document `p q | a b c` (prompt p q, response a b c):

    t   x_t   depth 1 reads, predicts, teacher   depth 2 reads, predicts, teacher
    0   p     -   (x_1 = q is prompt)            -
    1   q     a       b       row 2              a b     c       row 3
    2   a     b       c       row 3              -   (x_5 lies outside)
    3   b     -   (x_5 lies outside)             -
    4   c     -                                  -

Documents in a row are told apart by `position_ids`, which start again at 0 in each of them.
Padding is a document without response tokens.

Shape legend: B rows, T positions, K depths.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

IGNORED = -100
"""Label of a token that carries no loss (transformers' convention)."""


def shift(values_BT: Tensor, steps: int, *, fill: int | bool) -> Tensor:
    """`shift(x, s)[b, t] = x[b, t + s]`, and `fill` where t + s leaves the row. [B, T] -> [B, T]"""
    if steps == 0:
        return values_BT
    shifted = torch.full_like(values_BT, fill)
    if steps < values_BT.shape[1]:
        shifted[:, :-steps] = values_BT[:, steps:]
    return shifted


def document_ids(position_ids_BT: Tensor) -> Tensor:
    """Numbers the documents of each row from 0: a new one starts where positions do not go up by one. [B, T]"""
    first = torch.zeros_like(position_ids_BT[:, :1])
    borders = position_ids_BT[:, 1:] != position_ids_BT[:, :-1] + 1
    return torch.cat([first, borders.long().cumsum(1)], dim=1)


def tokens_read(input_ids_BT: Tensor, depth: int) -> Tensor:
    """x_{t+depth}: the token that head `depth` reads at t (0 where the row ends; no loss there). [B, T]"""
    return shift(input_ids_BT, depth, fill=0)


def target_tokens(input_ids_BT: Tensor, depth: int) -> Tensor:
    """x_{t+depth+1}: the token that head `depth` predicts at t. [B, T]"""
    return shift(input_ids_BT, depth + 1, fill=0)


def counted(labels_BT: Tensor, position_ids_BT: Tensor, depth: int) -> Tensor:
    """Marks where head `depth` has loss: x_{t+1}..x_{t+depth+1} are response tokens of t's document. [B, T] bool"""
    response = labels_BT != IGNORED
    documents = document_ids(position_ids_BT)
    mask = shift(documents, depth + 1, fill=-1) == documents
    for step in range(1, depth + 2):
        mask &= shift(response, step, fill=False)
    return mask


Positions = TypeVar("Positions", Tensor, int)


def teacher_row(positions: Positions, depth: int) -> Positions:
    """Row of the main head that has the same prefix as head `depth` at these positions (flat, or of one row)."""
    return positions + depth
