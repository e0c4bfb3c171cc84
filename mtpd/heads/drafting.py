"""Drafting for texts that lie in slots: the round that all kinds of heads share, and what they keep between rounds.

Shape legend: S slots, C positions of a slot, N rows, Q positions of a forward, D hidden size, M columns of the draft
vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mtpd.slots import Bounded, Newest, Span
from mtpd.trunk import Trunk

Pick = Callable[[Tensor, int], Tensor]
"""Gives columns [N] for logits [N, M], and the number of drafts before in this round."""


GoOn = Callable[[Tensor, Tensor], bool]
"""Decides from the logits and columns of the newest drafts whether the round goes on."""


Level = Callable[[list[list[float]], list[list[int]], list[list[int]]], bool]
"""Takes, by row, log-probabilities, token ids and parents of the candidates of a depth; False ends the drafting. A
parent is a place among the candidates of the depth before."""


def packed(values: Tensor, *ids: Tensor) -> Tensor:
    """Numbers [N, m] and ids [N, m] in one tensor."""
    # Every id below 2 ** 24 is whole in float32.
    return torch.stack([values.float(), *(each.float() for each in ids)], dim=1)


def to_lists(both: Tensor) -> list[list[list[Any]]]:
    """Values, and each of the ids, that `packed` put together; in one transfer, for which the host waits."""
    first, *rest = zip(*both.tolist(), strict=True)
    return [list(first), *([[int(number) for number in row] for row in each] for each in rest)]


class Drafter(ABC):
    """Drafts with heads of one kind, and keeps what they need of each slot."""

    rows: Tensor | None = None
    """Token of each column [M]; None where columns are tokens."""
    independent = False
    """Whether no draft depends on the drafts before it."""

    @property
    @abstractmethod
    def depth(self) -> int:
        """Drafts a round at most."""

    @abstractmethod
    def begin(self, span: Span, hidden: Tensor, tokens: Tensor, lengths: Sequence[int]) -> None:
        """Reads new texts.

        Args:
            span: the prompts' positions, from 0 on, padded on the right.
            hidden: trunk states [N, Q, D].
            tokens: all tokens by slot [S, C]; those behind the known ones are any ids.
            lengths: known tokens of each row, its first new one included.
        """

    @abstractmethod
    def read(self, span: Span, hidden: Tensor) -> None:
        """Takes trunk states [N, Q, D] of the newest positions; later ones may replace those of rejected drafts."""

    @abstractmethod
    def copy_row(self, source: int, target: int, length: int) -> None:
        """Makes the first `length` positions of one slot those of another."""

    @abstractmethod
    def drafts(self, tokens: Tensor, newest: Sequence[int], depth: int, pick: Pick) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the logits [N, M] and the chosen columns [N] of one depth after the other.

        The drafts of a depth stand in `tokens` before the next depth is asked for. The arguments are those of `draft`.
        """

    def draft(self, tokens: Tensor, newest: Sequence[int], depth: int, pick: Pick, go_on: GoOn | None = None) -> int:
        """Drafts the tokens after the newest one of each row, into `tokens`.

        Args:
            tokens: all tokens by slot [S, C]; drafts are written behind the known ones.
            newest: position of the newest known token of each row.
            depth: how many drafts at most.
            pick: chooses columns.
            go_on: asked after each draft but the last; False ends the round.

        Returns:
            How many drafts each row has.
        """
        newest = Newest.of(newest, tokens.device)
        rows = torch.arange(len(newest), device=tokens.device)
        for drafted, (logits, columns) in enumerate(self.drafts(tokens, newest, depth, pick), start=1):
            tokens[rows, newest.on_device + drafted] = self.ids(columns)
            if go_on is not None and drafted < depth and not go_on(logits, columns):
                return drafted
        return depth

    def draft_tree(self, tokens: Tensor, newest: Sequence[int], depth: int, beam: int, level: Level) -> None:
        """Drafts a tree, depth by depth.

        Where drafts do not depend on each other, the candidates of a depth stand behind each of the likeliest paths.
        Where they do, the likeliest token goes on, and the others stand beside it.

        Args:
            depth: how deep at most.
            beam: candidates of each path that goes on, and paths that go on.
            level: is given the candidates of each depth.
        """
        goes_on = True
        # By row, the paths that go on: log-probability, and place among the candidates of the depth before.
        going = [[(0.0, 0)] for _ in newest]

        def choose(logits: Tensor, number: int) -> Tensor:
            nonlocal goes_on, going
            best, columns = logits.float().log_softmax(-1).topk(min(beam, logits.shape[-1]), dim=-1)
            values, ids = to_lists(packed(best, self.ids(columns)))
            reached = [
                [
                    (before + value, value, token, place)
                    for before, place in paths
                    for value, token in zip(*row, strict=True)
                ]
                for paths, *row in zip(going, values, ids, strict=True)
            ]
            going = [
                [(row[at][0], at) for at in sorted(range(len(row)), key=lambda at: -row[at][0])][
                    : beam if self.independent else 1
                ]
                for row in reached
            ]
            goes_on = level(*([[each[part] for each in row] for row in reached] for part in (1, 2, 3)))
            return columns[:, 0]

        self.draft(tokens, newest, depth, choose, lambda logits, columns: goes_on)

    def ids(self, columns: Tensor) -> Tensor:
        """Translates columns of the logits to token ids."""
        return columns if self.rows is None else self.rows[columns]


class NewestStates(Drafter):
    """A drafter that keeps the trunk's states by slot.

    Args:
        slots: texts at most.
        capacity: positions of each.
    """

    def __init__(self, trunk: Trunk, *, slots: int, capacity: int) -> None:
        # One place more for what belongs to no position.
        self.states = torch.zeros(slots, capacity + 1, trunk.hidden_size, dtype=trunk.dtype, device=trunk.device)

    def begin(self, span: Span, hidden: Tensor, tokens: Tensor, lengths: Sequence[int]) -> None:
        self.read(span, hidden)

    def read(self, span: Span, hidden: Tensor) -> None:
        span.write(self.states, hidden)

    def copy_row(self, source: int, target: int, length: int) -> None:
        self.states[target, :length] = self.states[source, :length]

    def newest_states(self, newest: Sequence[int] | Bounded) -> Tensor:
        """h_{N-1} [N, D], for the position N of the newest token of each row."""
        at = newest if isinstance(newest, Bounded) else Newest.of(newest, self.states.device)
        return at.span(1, -1).read(self.states)[:, 0]
