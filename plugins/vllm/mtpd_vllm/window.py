"""What the V1 proposer keeps of a request from one round to the next; without vLLM.

With x_0..x_n known and the base's states up to position n-1, head k's entry at position t is true when it has read
the true x_{t+k}, and so have the heads before it. A round leaves entries that read drafts, in the last K-1 positions.
Where those drafts were accepted the entries are true; the others are computed again in the next round, before the new
positions. They are what mtpd's own drafter holds, and what vLLM's V2 runner computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtpd_vllm.lookup import Lookup


@dataclass
class Window:
    """A request between two rounds.

    Attributes:
        text: the known tokens x_0..x_n.
        read: the tokens that heads read in the places behind them.
        states: the base's states of the last positions, up to n-1 [at most K-1, D].
        lookup: the index of the text; None where nothing is looked up.
    """

    depth: int
    text: list[int] = field(default_factory=list)
    read: list[int] = field(default_factory=list)
    states: Tensor | None = None
    lookup: Lookup | None = None

    def looked_up(self) -> list[int]:
        """Gives the tokens that followed the newest ones before, at most as many as there are heads."""
        return [] if self.lookup is None else self.lookup.after(self.text, self.depth)

    def extend(self, first: int, tokens: Sequence[int], states: Tensor, newest: int) -> tuple[list[int], Tensor, int]:
        """Adds the positions that the base has computed in a round.

        Args:
            first: the first of them; `text` reaches up to it.
            tokens: of these positions [Q].
            states: of these positions [Q, D].
            newest: the token behind them, whose state is not known yet.

        Returns:
            What the first head reads: tokens and states [R + Q], and the position that they begin at.
        """
        assert len(tokens) == len(states), "a state for each token"
        new = [*tokens[1:], newest]
        again = self._untrue(new) if self.states is not None else 0
        self.text[first:] = [*tokens, newest]
        rows = states if self.states is None or not again else torch.cat([self.states[-again:], states])
        kept = states if self.states is None else torch.cat([self.states, states])
        self.states = kept[-(self.depth - 1) :].clone() if self.depth > 1 else None
        return self.text[first + 1 - again :], rows, first - again

    def _untrue(self, new: Sequence[int]) -> int:
        """Counts the last positions with entries that have read what did not become the text."""
        true = 0
        while true < min(len(new), len(self.read)) and self.read[true] == new[true]:
            true += 1
        assert self.states is not None
        return min(max(0, self.depth - 1 - true), len(self.states))


def shifted(tokens: Tensor, last: Tensor, newest: Tensor) -> Tensor:
    """Moves what each request reads to the left by one place, and puts another token behind it.

    Args:
        tokens: of all requests, one behind the other [T].
        last: the last place of each request [B].
        newest: the token that comes into it [B].
    """
    moved = tokens.roll(-1)
    moved[last] = newest.to(moved.dtype)
    return moved
