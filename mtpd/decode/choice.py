"""How tokens are chosen from logits, and which drafts that accepts.

A pass reads, in each row, the newest token (column 0), a chain of drafts (columns 1..d) and, where there
are any, siblings: other candidates for one of the chain's places, each with nothing behind it. Column i of
the chain and the siblings of depth i are alternatives behind column i - 1.

Shape legend: N rows, Q columns of a pass, d drafts of the chain, S siblings, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mtpd.decode.engine import Text


@dataclass
class Drafts:
    """What a round offers to the main head."""

    chain: Tensor
    """[N, d]"""
    siblings: Tensor | None = None
    """[N, S]"""
    depths: Tensor | None = None
    """[N, S]; depth k stands where draft k of the chain stands."""
    taken: list[int] = field(default_factory=list)
    """Set when tokens are chosen: by row, the column behind which the last new token stands."""


class Choice(Protocol):
    """Chooses drafts and tokens."""

    siblings: bool
    """Whether it accepts siblings."""
    likeliest: bool
    """Whether drafts are the heads' likeliest tokens; if not, they are drawn."""

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
    """The drafts that equal what was chosen in their place, from the first on, and the choice after them.

    Args:
        chosen: [N, Q]; what each column would be followed by.
    """
    if drafts is None:
        return chosen.tolist()
    # One transfer from the device for all.
    offers = [part for part in (drafts.chain, drafts.siblings, drafts.depths) if part is not None]
    packed: list[list[int]] = torch.cat([chosen, *offers], dim=1).tolist()
    width, depth = chosen.shape[1], drafts.chain.shape[1]
    count = width - 1 - depth
    new = []
    drafts.taken = []
    for row in packed:
        chain, siblings, depths = row[width : width + depth], row[width + depth :][:count], row[width + depth + count :]
        accepted = 0
        while accepted < depth and row[accepted] == chain[accepted]:
            accepted += 1
        column = accepted
        token = row[accepted]
        for number, (sibling, at) in enumerate(zip(siblings, depths, strict=True)):
            if at == accepted + 1 and sibling == token:
                column = 1 + depth + number
        drafts.taken.append(column)
        new.append([*row[: accepted + 1], row[column]] if column > depth else row[: accepted + 1])
    return new


class Greedy:
    """The most likely token, everywhere."""

    siblings = True
    likeliest = True

    def draft(self, logits: Tensor, texts: Sequence[Text], number: int) -> Tensor:
        return logits.argmax(-1)

    def choose(self, logits: Tensor, texts: Sequence[Text], drafts: Drafts | None) -> list[list[int]]:
        return agreed(logits.argmax(-1), drafts)
