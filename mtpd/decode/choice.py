"""How tokens are chosen from logits, and which drafts that accepts.

Shape legend: N rows, Q positions of a pass (the newest token and Q - 1 drafts), V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mtpd.decode.engine import Text


class Choice(Protocol):
    """Chooses drafts and tokens."""

    def draft(self, logits: Tensor, texts: Sequence[Text], number: int) -> Tensor:
        """Columns [N] of the drafting logits [N, M]; `number` drafts were made in this round before."""

    def choose(self, logits: Tensor, texts: Sequence[Text], drafts: Tensor | None) -> list[list[int]]:
        """New tokens of each row: the accepted drafts, and one more.

        Args:
            logits: of the main head, [N, Q, V].
            texts: one a row.
            drafts: [N, Q - 1], or None where nothing was drafted.
        """


def agreed(chosen: Tensor, drafts: Tensor | None) -> list[list[int]]:
    """The drafts that equal what was chosen in their place, from the first on, and the choice after them.

    Args:
        chosen: [N, Q]; what each position would write.
        drafts: [N, Q - 1].
    """
    if drafts is None:
        return chosen.tolist()
    # One transfer from the device for both.
    both: list[list[int]] = torch.cat([chosen, drafts], dim=1).tolist()
    width = chosen.shape[1]
    new = []
    for row in both:
        accepted = 0
        while accepted < width - 1 and row[accepted] == row[width + accepted]:
            accepted += 1
        new.append(row[: accepted + 1])
    return new


class Greedy:
    """The most likely token, everywhere."""

    def draft(self, logits: Tensor, texts: Sequence[Text], number: int) -> Tensor:
        return logits.argmax(-1)

    def choose(self, logits: Tensor, texts: Sequence[Text], drafts: Tensor | None) -> list[list[int]]:
        return agreed(logits.argmax(-1), drafts)
