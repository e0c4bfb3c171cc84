"""What a kind of heads offers: a loss to train it, drafts along a known text, and a drafter for decoding.

Everything outside of `mtpd.heads` uses heads through these. A kind of which the logits come out of the trunk's own
frozen unembedding gives its states (`StateHeads`); one with logits of its own gives those
(`mtpd.heads.logit_heads.LogitHeads`).

Shape legend: B rows, T positions, P = B * T, D hidden size, K depths, M columns in use, V tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from mtpd import alignment
from mtpd.heads.config import HeadsConfig
from mtpd.losses.fused import multi_depth_loss
from mtpd.losses.settings import LossSettings, LossSums
from mtpd.packed_modules import forget
from mtpd.slots import Span
from mtpd.trunk import Trunk, Unembedding


@dataclass(frozen=True)
class Batch:
    """Packed rows with the trunk's states: ids, labels and positions [B, T], states [B, T, D].

    The states are those that heads read: after the final norm, or before their shared layers.

    Of rows that are split, this is a part. Ids, labels, positions and the teacher's states go on behind it, with A more
    [B, T + A] that belong to the next part: heads read and predict those tokens, and have no loss at their positions.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    hidden: Tensor
    teacher: Tensor | None = None
    """States of the teacher, where they are others than those that the heads read."""
    below: Tensor | None = None
    """States of depth `after`, which the next one reads."""
    after: int = 0
    """Depths up to this one are finished: they have no loss."""

    @property
    def own_positions(self) -> Tensor:
        """Positions [B, T] of what the heads compute."""
        return self.position_ids[:, : self.hidden.shape[1]]

    @property
    def teacher_PD(self) -> Tensor:
        """States [P, D] of the teacher rows."""
        return (self.hidden if self.teacher is None else self.teacher).flatten(0, 1)

    def flat(self, states_BTD: Tensor) -> Tensor:
        """States [P, D] at flat positions; those that belong to the next part are 0."""
        ahead = self.input_ids.shape[1] - states_BTD.shape[1]
        return (nn.functional.pad(states_BTD, (0, 0, 0, ahead)) if ahead else states_BTD).flatten(0, 1)

    def counted(self, depth: int) -> Tensor:
        """Which flat positions have loss at a depth, [P] bool."""
        mask = alignment.counted(self.labels, self.position_ids, depth)
        mask[:, self.hidden.shape[1] :] = False
        return mask.flatten()

    def tokens(self, depth: int) -> Tensor:
        """The token x_{t+depth+1} that this depth predicts at each flat position; 0 is the main head. [P]"""
        return alignment.target_tokens(self.input_ids, depth).flatten()


@dataclass(frozen=True)
class Readout:
    """The main head, and the columns of it that heads draft over."""

    main: Unembedding
    """Over all tokens, without rows that only pad the vocabulary."""
    draft: Unembedding
    """Over the columns in use."""
    rows: Tensor | None
    """Token of each column [M]; None where columns are tokens."""
    columns: Tensor
    """Column of each token, -1 where it has none."""
    teacher: Readout | None = None
    """The teacher's, where its main head is another one."""

    @property
    def judge(self) -> Readout:
        """The teacher's."""
        return self.teacher or self

    @classmethod
    def of(cls, trunk: Trunk, rows: Tensor | None) -> Readout:
        """Of a trunk, for a draft vocabulary or (None) for all tokens."""
        return cls.over(trunk.unembedding, rows)

    @classmethod
    def over(cls, unembedding: Unembedding, rows: Tensor | None, teacher: Readout | None = None) -> Readout:
        """Of a main head."""
        draft, device = unembedding.select(rows), unembedding.weight.device
        columns = torch.full((unembedding.weight.shape[0],), -1, dtype=torch.long, device=device)
        used = torch.arange(draft.weight.shape[0], device=device)
        columns[used if rows is None else rows] = used
        return cls(unembedding.select(None), draft, rows, columns, teacher)


class Along(Protocol):
    """What heads draft at the positions of texts whose tokens are known."""

    depth: int

    def logits(self, depth: int, at: Tensor) -> Tensor:
        """Logits [n, M] of a depth at flat positions [n], given the true tokens before."""

    def choice(self, depth: int, at: Tensor, logits: Tensor) -> Tensor:
        """The column [n] that greedy decoding drafts there, if it drafted the true tokens before it."""


@dataclass(frozen=True)
class Pick:
    """Chooses drafts.

    Attributes:
        choose: columns [N] from logits [N, M] and the number of drafts before in this round.
        joint: whether heads that choose the likeliest drafts together may do so, without asking.
    """

    choose: Callable[[Tensor, int], Tensor]
    joint: bool = False

    def __call__(self, logits: Tensor, number: int) -> Tensor:
        return self.choose(logits, number)


class Drafter(Protocol):
    """Drafting for texts that lie in slots. `mtpd.heads.chain.drafting.ChainDrafter` says what the arguments are."""

    @property
    def depth(self) -> int:
        """Drafts a round at most."""

    def begin(self, span: Span, hidden: Tensor, tokens: Tensor, lengths: Sequence[int]) -> None:
        """Reads new texts."""

    def read(self, span: Span, hidden: Tensor) -> None:
        """Takes trunk states of the newest positions."""

    def draft(
        self,
        tokens: Tensor,
        newest: Sequence[int],
        depth: int,
        pick: Pick,
        go_on: Callable[[Tensor, Tensor], bool] | None = None,
    ) -> int:
        """Writes drafts behind the newest tokens, and says how many each row has."""

    def ids(self, columns: Tensor) -> Tensor:
        """Token ids of columns of the logits."""

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Makes the first positions of one slot those of another."""


@runtime_checkable
class TreeDrafter(Protocol):
    """A drafter of which several paths can go on from one depth to the next."""

    def draft_tree(
        self,
        tokens: Tensor,
        newest: Sequence[int],
        depth: int,
        beam: int,
        level: Callable[[list[Any], list[Any], list[Any]], bool],
    ) -> None:
        """Drafts a tree, depth by depth. `mtpd.heads.chain.drafting.ChainDrafter` says what the arguments are."""


class Heads(nn.Module):
    """K heads of one kind."""

    config: HeadsConfig
    layers: nn.ModuleList
    independent = False
    """Whether what is drafted at a depth does not depend on the drafts before it."""

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("vocabulary", torch.zeros(config.vocabulary_size, dtype=torch.long))

    @property
    def depth(self) -> int:
        return self.config.depth

    @property
    def shared_layers(self) -> int:
        """How many of the trunk's last layers the states that these heads read have yet to go through.

        0: none, and they have been through the final norm.
        """
        return self.config.shared_layers

    def rows(self) -> Tensor | None:
        """Token ids of the draft vocabulary, or None when the heads draft over the whole of it."""
        vocabulary: Any = self.vocabulary
        return vocabulary if vocabulary.numel() else None

    def train(self, mode: bool = True) -> Self:
        """As modules do. What was made for decoding is made anew after training."""
        forget(self)
        return super().train(mode)

    def blocks(self) -> Iterable[nn.Module]:
        """Modules whose insides may be computed a second time in the backward pass instead of being kept."""
        return ()

    def shorten(self, depth: int) -> None:
        """Keeps the heads of depth 1..`depth` only: no later one changes what they draft."""
        raise NotImplementedError

    def loss(
        self, trunk: Trunk, batch: Batch, readout: Readout, settings: LossSettings, *, compiled: bool = False
    ) -> tuple[Tensor, LossSums]:
        """The summed loss, with gradient in the heads, and the sums behind it (`mtpd.losses.fused`)."""
        raise NotImplementedError

    def along(self, trunk: Trunk, hidden_BTD: Tensor, input_ids_BT: Tensor, *, position_ids_BT: Tensor) -> Along:
        """Drafts at every position of texts, whose trunk states are given."""
        raise NotImplementedError

    def drafter(self, trunk: Trunk, *, slots: int, capacity: int) -> Drafter:
        """A new drafting state for texts in slots."""
        raise NotImplementedError

    def piece_bytes(self) -> int:
        """What the loss takes at a time beside parameters and gradients, where the heads have logits of their own."""
        return 0


class StateHeads(Heads):
    """Heads that give states for the trunk's own unembedding."""

    def forward(
        self, trunk: Trunk, hidden_BTD: Tensor, input_ids_BT: Tensor, *, position_ids_BT: Tensor
    ) -> list[Tensor]:
        """Teacher-forced states of depth 1..K, each [B, T, D]; tokens may go on behind the T positions."""
        raise NotImplementedError

    def blocks(self) -> Iterable[nn.Module]:
        return self.layers

    def trained_states(self, trunk: Trunk, batch: Batch) -> list[Tensor]:
        """States of the depths that have loss."""
        assert not batch.after, "depths that do not read each other's states are trained together"
        return self(trunk, batch.hidden, batch.input_ids, position_ids_BT=batch.own_positions)

    def loss(
        self, trunk: Trunk, batch: Batch, readout: Readout, settings: LossSettings, *, compiled: bool = False
    ) -> tuple[Tensor, LossSums]:
        states = self.trained_states(trunk, batch)
        depths = range(batch.after + 1, batch.after + 1 + len(states))
        return multi_depth_loss(
            [batch.flat(state) for state in states],
            batch.teacher_PD,
            readout.draft,
            targets_P=[readout.columns[batch.tokens(k)] for k in depths],
            masks_P=[batch.counted(k) for k in depths],
            settings=settings,
            after=batch.after,
            teacher_head=readout.judge.draft,
            main_head=readout.judge.main,
            columns_M=readout.rows,
            compiled=compiled,
        )

    def along(self, trunk: Trunk, hidden_BTD: Tensor, input_ids_BT: Tensor, *, position_ids_BT: Tensor) -> Along:
        states = self(trunk, hidden_BTD, input_ids_BT, position_ids_BT=position_ids_BT)
        return AlongStates([state.flatten(0, 1) for state in states], trunk.unembedding.select(self.rows()))


class AlongStates:
    """Drafts from states [P, D] of each depth."""

    def __init__(self, states_PD: Sequence[Tensor], unembedding: Unembedding) -> None:
        self.states_PD = states_PD
        self.unembedding = unembedding
        self.depth = len(states_PD)

    def logits(self, depth: int, at: Tensor) -> Tensor:
        return self.unembedding(self.states_PD[depth - 1][at])

    def choice(self, depth: int, at: Tensor, logits: Tensor) -> Tensor:
        return logits.argmax(-1)


def exact(values: Tensor) -> Tensor:
    """In float32, or in float64 where they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
