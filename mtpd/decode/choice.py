"""How tokens are chosen from logits, and which drafts that accepts.

Shape legend: N rows, Q columns of a pass (see `mtpd.decode.drafts`), V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from mtpd.decode.drafts import Drafts
from mtpd.decode.text import Text


class Choice(Protocol):
    """Chooses drafts and tokens."""

    branches: bool
    """Whether it accepts drafts of which several are for one place."""

    def draft(self, logits: Tensor, texts: Sequence[Text], number: int) -> Tensor:
        """Columns [N] of the drafting logits [N, M]; `number` drafts were made in this round before."""

    def choose(self, logits: Tensor, texts: Sequence[Text], drafts: Drafts | None) -> list[list[int]]:
        """New tokens of each row: the accepted drafts, and one more.

        Args:
            logits: of the main head, [N, Q, V].
            texts: one a row.
            drafts: None where nothing was drafted.
        """


def agreed(chosen: Tensor, drafts: Drafts | None) -> list[list[int]]:
    """The path of drafts that equal what was chosen in their place, and the choice after them; sets `drafts.paths`.

    Args:
        chosen: [N, Q]; what each column would be followed by.
    """
    if drafts is None:
        return chosen.tolist()
    new = []
    drafts.paths = []
    for tokens, parents, row in drafts.rows(chosen):
        path, written = walk(row, children(tokens, parents))
        drafts.paths.append(path)
        new.append(written)
    return new


def children(tokens: Sequence[int], parents: Sequence[int]) -> dict[tuple[int, int], int]:
    """Columns of the nodes of one row, by the column before and the token."""
    return {place: column for column, place in enumerate(zip(parents, tokens, strict=True), start=1)}


def walk(chosen: Sequence[int], nodes: dict[tuple[int, int], int]) -> tuple[list[int], list[int]]:
    """Follows the chosen tokens from the root: the accepted columns, and the tokens written."""
    path: list[int] = []
    column = 0
    written = [chosen[0]]
    while (following := nodes.get((column, written[-1]))) is not None:
        column = following
        path.append(column)
        written.append(chosen[column])
    return path, written


class Greedy:
    """The most likely token, everywhere."""

    branches = True

    def draft(self, logits: Tensor, texts: Sequence[Text], number: int) -> Tensor:
        return logits.argmax(-1)

    def choose(self, logits: Tensor, texts: Sequence[Text], drafts: Drafts | None) -> list[list[int]]:
        return agreed(logits.argmax(-1), drafts)
