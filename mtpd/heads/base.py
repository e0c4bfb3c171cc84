"""The interface of all kinds of heads: a loss to train them, drafts along a known text, and a drafter for decoding.

Everything outside of `mtpd.heads` uses heads through it. A kind whose logits come out of the trunk's own frozen
unembedding gives states (`StateHeads`); a kind with logits of its own gives those
(`mtpd.heads.logit_heads.LogitHeads`).

Shape legend: B rows, T positions, P = B * T, D hidden size, K depths, M columns in use, V tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from mtpd import alignment
from mtpd.errors import UserError
from mtpd.heads.config import HeadsConfig
from mtpd.heads.drafting import Drafter
from mtpd.heads.kinds import KINDS
from mtpd.losses.fused import multi_depth_loss
from mtpd.losses.settings import LossSettings, LossSums
from mtpd.packed_modules import forget
from mtpd.trunk import Trunk, Unembedding


@dataclass(frozen=True)
class Batch:
    """Packed rows with the trunk's states: ids, labels and positions [B, T], states [B, T, D].

    The states are those that heads read: after the final norm, or before their shared layers.

    Under sequence parallelism: one shard of each row, with A positions of lookahead that carry no loss. Ids, labels,
    positions and the teacher's states are [B, T + A] then.
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
        """Positions [B, T] that the heads compute."""
        return self.position_ids[:, : self.hidden.shape[1]]

    @property
    def teacher_PD(self) -> Tensor:
        """States [P, D] of the teacher rows."""
        return (self.hidden if self.teacher is None else self.teacher).flatten(0, 1)

    def flat(self, states_BTD: Tensor) -> Tensor:
        """Flattens states to [P, D]; those of lookahead positions are 0."""
        ahead = self.input_ids.shape[1] - states_BTD.shape[1]
        return (nn.functional.pad(states_BTD, (0, 0, 0, ahead)) if ahead else states_BTD).flatten(0, 1)

    def counted(self, depth: int) -> Tensor:
        """Marks the flat positions that have loss at a depth, [P] bool."""
        mask = alignment.counted(self.labels, self.position_ids, depth)
        mask[:, self.hidden.shape[1] :] = False
        return mask.flatten()

    def tokens(self, depth: int) -> Tensor:
        """Gives the token x_{t+depth+1} that this depth predicts at each flat position; 0 is the main head. [P]"""
        return alignment.target_tokens(self.input_ids, depth).flatten()


@dataclass(frozen=True)
class Readout:
    """The main head, and the columns (tokens) of it that heads draft over."""

    main: Unembedding
    """Over all tokens, without rows that only pad the vocabulary."""
    draft: Unembedding
    """Over the columns in use."""
    rows: Tensor | None
    """Token of each column [M]; None where columns are tokens."""
    columns: Tensor
    """Column of each token, -1 where it has none."""
    other_teacher: Readout | None = None
    """The teacher's, where its main head is another one."""

    @property
    def teacher(self) -> Readout:
        """The one that the heads are compared with."""
        return self.other_teacher or self

    @classmethod
    def of(cls, trunk: Trunk, rows: Tensor | None) -> Readout:
        """Selects a draft vocabulary, or (None) all tokens, of a trunk's main head."""
        return cls.over(trunk.unembedding, rows)

    @classmethod
    def over(cls, unembedding: Unembedding, rows: Tensor | None, teacher: Readout | None = None) -> Readout:
        """Selects a draft vocabulary, or (None) all tokens, of a main head."""
        draft, device = unembedding.select(rows), unembedding.weight.device
        columns = torch.full((unembedding.weight.shape[0],), -1, dtype=torch.long, device=device)
        used = torch.arange(draft.weight.shape[0], device=device)
        columns[used if rows is None else rows] = used
        return cls(unembedding.select(None), draft, rows, columns, teacher)


class Along(Protocol):
    """Drafts at the positions of texts whose tokens are known."""

    depth: int

    def logits(self, depth: int, at: Tensor) -> Tensor:
        """Logits [n, M] of a depth at flat positions [n], given the true tokens before."""


class Heads(nn.Module):
    """K heads of one kind."""

    config: HeadsConfig
    layers: nn.ModuleList
    independent = False
    """Whether what is drafted at a depth does not depend on the drafts before it."""
    own_logits = True
    """Whether logits come from parameters of the heads, which are then read outside of the forward calls of modules."""

    @classmethod
    def build(cls, trunk: Trunk, config: HeadsConfig) -> Heads:
        """Makes heads with weights yet to be set."""
        make: Any = cls
        found: Heads = make(trunk, config)
        return found

    @classmethod
    def from_native(
        cls, tensors: Mapping[str, Any], *, source_layers: Sequence[int], depth: int, shared: bool, vocabulary: int
    ) -> dict[str, Any]:
        """Works out what the kind adds to `HeadsConfig` for heads that a checkpoint has.

        Args:
            tensors: their tensors, by their names here; only shapes are read.
            source_layers: for each of them, the trunk's layer that its block is like.
            depth: how many are used, or how often the one is.
            shared: whether one block serves all depths.
            vocabulary: tokens of a draft vocabulary, 0 for all.
        """
        raise NotImplementedError(f"no checkpoint has heads of this kind ({cls.__name__})")

    @classmethod
    def native_rows(cls, tensors: Mapping[str, Tensor], vocabulary: Tensor) -> dict[str, Tensor]:
        """Restricts a checkpoint's tensors to a draft vocabulary, where they have a row for each token."""
        return dict(tensors)

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("vocabulary", torch.zeros(config.vocabulary_size, dtype=torch.long))

    @property
    def depth(self) -> int:
        return self.config.depth

    @property
    def shared_layers(self) -> int:
        """Number of top trunk layers that the heads apply themselves; 0 if they read final states."""
        return self.config.shared_layers

    @property
    def experts(self) -> bool:
        """Whether tokens choose among parameters."""
        return any(".experts." in name for name, _ in self.named_parameters())

    def rows(self) -> Tensor | None:
        """Gives the token ids of the draft vocabulary, or None where heads draft over all tokens."""
        vocabulary: Any = self.vocabulary
        return vocabulary if vocabulary.numel() else None

    def train(self, mode: bool = True) -> Self:
        """Also drops cached decoding copies, which training makes stale."""
        forget(self)
        return super().train(mode)

    def blocks(self) -> Iterable[nn.Module]:
        """Lists the modules that gradient checkpointing may recompute in the backward pass."""
        return ()

    def shorten(self, depth: int) -> None:
        """Keeps the heads of depth 1..`depth` only: no later one changes what they draft."""
        assert 1 <= depth <= self.depth, "heads can only become fewer"
        self.layers = self.layers[:depth]
        kept = {"depth": depth, "source_layers": self.config.source_layers[:depth]}
        self.config = self.config.model_copy(update=kept)

    def first(self, depth: int) -> Heads:
        """Gives heads that draft `depth` tokens for no more work than those take; by default, all of these."""
        return self

    def as_chain(self, *, what: str) -> Any:
        """Gives these heads where only a chain is served, as `mtpd.heads.chain.heads.ChainHeads`.

        Args:
            what: begins the message, such as the name of a command.

        Raises:
            UserError: they are of another kind.
        """
        accepted = ", ".join(kind.name for kind in KINDS.values() if kind.loops)
        raise UserError(f"{what}: heads of kind {self.config.kind} are not accepted; accepted: {accepted}")

    def extended(self, trunk: Trunk, *, depth: int, form: Any, rank: int = 0, seed: int = 0) -> Heads:
        """Loops the last heads to be deeper ones, where each reads the state of the one before."""
        raise NotImplementedError("`as_chain` refuses these heads")

    def loss(
        self, trunk: Trunk, batch: Batch, readout: Readout, settings: LossSettings, *, compiled: bool = False
    ) -> tuple[Tensor, LossSums]:
        """Sums the loss, with gradient in the heads, and gives the sums behind it (`mtpd.losses.fused`)."""
        raise NotImplementedError

    def along(self, trunk: Trunk, hidden_BTD: Tensor, input_ids_BT: Tensor, *, position_ids_BT: Tensor) -> Along:
        """Drafts at every position of texts whose trunk states are given."""
        raise NotImplementedError

    def each_alone(
        self, trunk: Trunk, hidden_BTD: Tensor, input_ids_BT: Tensor, *, position_ids_BT: Tensor
    ) -> list[Tensor]:
        """Computes what each head gives on the trunk's states, whatever the heads before it give: logits [B, T, M]."""
        along = self.along(trunk, hidden_BTD, input_ids_BT, position_ids_BT=position_ids_BT)
        at = torch.arange(input_ids_BT.numel(), device=input_ids_BT.device)
        return [along.logits(depth, at).unflatten(0, input_ids_BT.shape) for depth in range(1, self.depth + 1)]

    def drafter(self, trunk: Trunk, *, slots: int, capacity: int) -> Drafter:
        """Makes a new drafting state for texts in slots."""
        raise NotImplementedError

    def chunk_bytes(self) -> int:
        """Counts the bytes of logits that the loss holds at a time, where the heads have logits of their own."""
        return 0


class StateHeads(Heads):
    """Heads that give states for the trunk's own unembedding."""

    own_logits = False

    def forward(
        self, trunk: Trunk, hidden_BTD: Tensor, input_ids_BT: Tensor, *, position_ids_BT: Tensor
    ) -> list[Tensor]:
        """Computes teacher-forced states of depth 1..K, each [B, T, D]; tokens may go on behind the T positions."""
        raise NotImplementedError

    def blocks(self) -> Iterable[nn.Module]:
        return self.layers

    def trained_states(self, trunk: Trunk, batch: Batch) -> list[Tensor]:
        """Computes the states of the depths that have loss."""
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
            teacher_head=readout.teacher.draft,
            main_head=readout.teacher.main,
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


def exact(values: Tensor) -> Tensor:
    """Casts to float32; float64 stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
