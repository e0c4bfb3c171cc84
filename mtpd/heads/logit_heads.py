"""Heads that have logits of their own instead of states for the trunk's unembedding.

Their losses are those of `mtpd.losses.reference`, with autograd, over a few hundred positions at a time: forward and
backward of a chunk run one after the other, so that memory does not grow with the rows of a batch.

Shape legend: P flat positions, C positions of a chunk, D hidden size, K depths, n = K + 1 places of a window, M columns
in use, V tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mtpd import alignment
from mtpd.errors import UserError
from mtpd.heads.base import Along, Batch, Heads, Readout, exact
from mtpd.heads.drafting import Drafter, NewestStates, Pick
from mtpd.losses import reference
from mtpd.losses.chunked import in_chunks
from mtpd.losses.settings import LossSettings, LossSums
from mtpd.slots import Newest
from mtpd.trunk import Trunk

CHUNK = 512
"""Positions of a chunk whose logits are all held."""
LOGGED_ROWS = 32
"""Rows of a batch at most from which the logged acceptance is estimated."""


class LogitHeads(Heads):
    """Heads with logits [C, M] for each depth, which may depend on the tokens before.

    A window is the n tokens behind a position, given as columns, -1 for a token without one. Place 0 is the token that
    the main head writes itself; place k is what depth k drafts.
    """

    ce_chunk = CHUNK
    """Positions of a chunk of a loss that needs `target_log_probs` alone."""

    def depth_logits(self, depth: int, hidden: Tensor, columns: Tensor, window: Any) -> Tensor:
        """Computes logits [C, M] of a depth, after the true tokens before it.

        Args:
            hidden: [C, D].
            columns: of the window's tokens, [C, n]; those of depth `depth` and later are not read.
            window: what `encode_window` gave for these.
        """
        raise NotImplementedError

    def encode_window(self, hidden: Tensor, columns: Tensor) -> Any:
        """Computes once what all depths need of a window: a tensor with C rows, or None."""
        return None

    def target_log_probs(self, hidden: Tensor, columns: Tensor) -> Tensor | None:
        """Computes log p of the true token of depths 1..K [C, K], where that is cheaper than by way of logits."""
        return None

    def logits_per_position(self) -> int:
        """Counts the logits that the loss holds of each position."""
        return self.depth * self.config.columns

    def chunk_bytes(self) -> int:
        # Logits, their softmax and its gradient, in two and four bytes.
        return CHUNK * self.logits_per_position() * (2 + 4 + 4)

    def stepwise(self, hidden: Tensor, first: Tensor) -> Callable[[int, Tensor], Tensor]:
        """Makes a function that computes the logits of one draft after the other.

        It takes the number of drafts before and the column of the newest; of the first draft, that of place 0, which
        `first` [C, 1] holds too.
        """
        columns = first.repeat(1, self.depth + 1)

        def step(index: int, before: Tensor) -> Tensor:
            columns[:, index] = before
            return self.depth_logits(index + 1, hidden, columns, self.encode_window(hidden, columns))

        return step

    def loss(
        self, trunk: Trunk, batch: Batch, readout: Readout, settings: LossSettings, *, compiled: bool = False
    ) -> tuple[Tensor, LossSums]:
        """As `StateHeads.loss`, except: the λ of a mixture of divergences is per chunk, and acceptance is estimated.

        Raises:
            UserError: `compiled`, for which there is no code here.
        """
        if compiled:
            raise UserError(f"train.compile: true does nothing for heads of kind {self.config.kind}; accepted: false")
        hidden_PD = batch.flat(batch.hidden)
        masks_PK = torch.stack([batch.counted(k) for k in range(1, self.depth + 1)], dim=1)
        columns_Pn = torch.stack([readout.columns[batch.tokens(k)] for k in range(self.depth + 1)], dim=1)
        at = masks_PK[:, 0].nonzero().squeeze(1)
        only_ce = not any(settings.beta)
        chunks = at.split(self.ce_chunk if only_ce else CHUNK) if len(at) else [at]

        def chunk(number: int, state: Tensor) -> tuple[Tensor, Tensor]:
            rows = chunks[number]
            hidden, columns, masks = exact(state[rows]), columns_Pn[rows], masks_PK[rows]
            if only_ce:
                return self._cross_entropy(hidden, columns, masks, settings)
            return self._distilled(hidden, columns, masks, rows, batch.teacher_PD, readout, settings)

        main = (readout.draft.weight, readout.draft.bias)
        trained = [each for each in main if each is not None and each.requires_grad]
        loss, sums = in_chunks(chunk, len(chunks), hidden_PD, [*self.parameters(), *trained])
        ce, divergence = sums.sum(0)
        counted = masks_PK.sum(0).double()
        few = at[:: max(1, -(-len(at) // LOGGED_ROWS))]
        accepted = self._accepted(batch, columns_Pn[few], masks_PK[few], few, readout)
        return loss, LossSums(counted, ce, divergence, accepted * (len(at) / max(1, len(few))))

    def _cross_entropy(
        self, hidden: Tensor, columns: Tensor, masks: Tensor, settings: LossSettings
    ) -> tuple[Tensor, Tensor]:
        known = self.target_log_probs(hidden, columns)
        if known is None:
            window = self.encode_window(hidden, columns)
            terms = [
                -reference.cross_entropy(exact(self.depth_logits(k, hidden, columns, window)), columns[:, k])
                for k in range(1, self.depth + 1)
            ]
            known = torch.stack(terms, dim=1)
        ce = -torch.where(masks & (columns[:, 1:] >= 0), known, 0.0).sum(0)
        loss = (ce * ce.new_tensor(settings.alpha)).sum()
        logged = ce.detach().double()
        return loss, torch.stack([logged, torch.zeros_like(logged)])

    def _distilled(
        self,
        hidden: Tensor,
        columns: Tensor,
        masks: Tensor,
        rows: Tensor,
        teacher_PD: Tensor,
        readout: Readout,
        settings: LossSettings,
    ) -> tuple[Tensor, Tensor]:
        """Computes the loss of these rows from all logits of a depth at once."""
        window = self.encode_window(hidden, columns)
        head = readout.teacher.main if settings.true_probabilities else readout.teacher.draft
        return reference.loss_of_logits(
            lambda k, at: exact(self.depth_logits(k + 1, hidden, columns, window))[at],
            lambda k, at: exact(head(teacher_PD[alignment.teacher_row(rows[at], k + 1)])),
            targets_P=columns.T[1:].unbind(),
            masks_P=masks.T.unbind(),
            settings=settings,
            columns_M=readout.rows,
        )

    @torch.no_grad()
    def _accepted(self, batch: Batch, columns: Tensor, masks: Tensor, rows: Tensor, readout: Readout) -> Tensor:
        """Counts the rows of which the first k drafts are the teacher's choice, by depth [K]."""
        teacher_PD = batch.teacher_PD
        hidden = exact(batch.flat(batch.hidden)[rows])
        window = self.encode_window(hidden, columns)
        agree = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        found = []
        for k in range(1, self.depth + 1):
            at = alignment.teacher_row(rows, k).clamp_max(len(teacher_PD) - 1)
            y = self.depth_logits(k, hidden, columns, window)
            agree = agree & (y.argmax(-1) == readout.teacher.draft(teacher_PD[at]).argmax(-1)) & masks[:, k - 1]
            found.append(agree.sum().double())
        return torch.stack(found)

    @torch.no_grad()
    def along(self, trunk: Trunk, hidden_BTD: Tensor, input_ids_BT: Tensor, *, position_ids_BT: Tensor) -> Along:
        columns = Readout.of(trunk, self.rows()).columns
        shifted = [alignment.target_tokens(input_ids_BT, k).flatten() for k in range(self.depth + 1)]
        return AlongLogits(self, hidden_BTD.flatten(0, 1), columns[torch.stack(shifted, dim=1)])

    def drafter(self, trunk: Trunk, *, slots: int, capacity: int) -> Drafter:
        return LogitDrafter(self, trunk, slots=slots, capacity=capacity)


class AlongLogits:
    """Drafts at flat positions of texts, given their tokens."""

    def __init__(self, heads: LogitHeads, hidden_PD: Tensor, columns_Pn: Tensor) -> None:
        self.heads, self.hidden_PD, self.columns_Pn = heads, hidden_PD, columns_Pn
        self.depth = heads.depth
        self.window = self._in_parts(heads.encode_window, columns_Pn)

    def _in_parts(self, function: Callable[[Tensor, Tensor], Any], columns: Tensor) -> Any:
        parts = zip(self.hidden_PD.split(CHUNK), columns.split(CHUNK), strict=True)
        found = [function(hidden, each) for hidden, each in parts]
        return None if found[0] is None else torch.cat(found)

    def logits(self, depth: int, at: Tensor) -> Tensor:
        window = None if self.window is None else self.window[at]
        return self.heads.depth_logits(depth, self.hidden_PD[at], self.columns_Pn[at], window)


class LogitDrafter(NewestStates):
    """Drafts from h_{N-1} and the tokens before, each after its draft before."""

    def __init__(self, heads: LogitHeads, trunk: Trunk, *, slots: int, capacity: int) -> None:
        super().__init__(trunk, slots=slots, capacity=capacity)
        self.heads = heads
        self.rows = heads.rows()
        self.columns = Readout.of(trunk, self.rows).columns

    @property
    def depth(self) -> int:
        return self.heads.depth

    def drafts(self, tokens: Tensor, newest: Sequence[int], depth: int, pick: Pick) -> Iterator[tuple[Tensor, Tensor]]:
        hidden = self.newest_states(newest)
        known = self.columns[Newest.of(newest, tokens.device).span(1).read(tokens)]
        step = self.heads.stepwise(hidden, known)
        columns = known[:, 0]
        for index in range(depth):
            logits = step(index, columns)
            columns = pick(logits, index)
            yield logits, columns
