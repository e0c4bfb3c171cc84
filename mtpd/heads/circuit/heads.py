"""Circuit heads: the joint distribution of the n = K + 1 tokens behind h_t (MTPC, arXiv 2511.11346).

Place 0 is the token that the main head writes itself, which is known when heads draft: what decides is the
distribution of the other places given it. The loss is Σ_k γ^{k-1} -log p(x_{t+k+1} | h_t, x_{t+1}, .., x_{t+k}) over
overlapping windows (`train.loss: ce`, `train.decay: 0.9`), or any distillation loss over the same conditionals.

A token that verification rejects is replaced by one drawn from what is left of the main head's distribution. That
token is place 0 of the next window. (The published shortcut drops it and drafts its place again, which changes the
distribution of the text.)

Shape legend: C positions, D hidden size, n places, r components, M columns in use, Z sum weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mtpd.heads.base import Batch, Readout
from mtpd.heads.circuit.circuit import new_circuit
from mtpd.heads.circuit.config import CircuitConfig
from mtpd.heads.circuit.leaves import TINY, FullLeaves, Leaves, SharedLeaves, TiltedLeaves
from mtpd.heads.config import HeadsConfig
from mtpd.heads.drafting import Drafter
from mtpd.heads.logit_heads import LogitHeads
from mtpd.losses.settings import LossSettings, LossSums
from mtpd.packed_modules import faster
from mtpd.trunk import Trunk, Unembedding

CE_CHUNK = 1024
"""Positions of a chunk, where leaves are not held: weights are read, and their gradients summed, once a chunk."""


class CircuitHeads(LogitHeads):
    """A circuit over a window of K + 1 tokens."""

    def __init__(self, trunk: Trunk, config: HeadsConfig) -> None:
        super().__init__(config)
        shape: CircuitConfig = config.own
        places, size = config.depth + 1, config.hidden_size
        self.circuit = new_circuit(shape.structure, places, shape.latent_values)
        self.leaves: Leaves
        if shape.leaves == "shared":
            self.leaves = SharedLeaves(places, shape.latent_values, size, shape.expander_rank)
        else:
            kind = FullLeaves if shape.leaves == "full" else TiltedLeaves
            self.leaves = kind(places, shape.latent_values, config.columns, size)
            self.ce_chunk = CE_CHUNK
        self.sums = nn.Linear(size, self.circuit.sums) if self.circuit.sums else None
        self.independent = shape.latent_values == 1
        self.drafted = config.depth
        # The trunk's own, and frozen: no part of these heads.
        self._main: Unembedding | None = None

    @property
    def depth(self) -> int:
        return self.drafted

    def attach(self, trunk: Trunk) -> None:
        """Takes the trunk's unembedding, which shared leaves stand before; `along` and `drafter` do so."""
        self._main = trunk.unembedding.select(self.rows())
        self.leaves.hold()

    def logits_per_position(self) -> int:
        softmaxes = 1 if isinstance(self.leaves, TiltedLeaves) else self.circuit.components
        return self.circuit.places * softmaxes * self.config.columns

    def weights(self, hidden: Tensor) -> Tensor:
        """Computes the sum weights [C, Z] before their softmax, linear in the states."""
        if self.sums is None:
            return hidden[:, :0]
        # Of the few rows of decoding.
        sums = faster(self.sums) if torch.is_inference_mode_enabled() else self.sums
        return sums(hidden.to(self.sums.weight.dtype))

    def evidence(self, hidden: Tensor, columns: Tensor) -> Tensor:
        """Computes log φ_ij of the window's first tokens [C, p] in float32, [C, n, r]; 0 for those without a column."""
        found = self.leaves.evidence(hidden, columns, self._main)
        # Places behind the last that is drafted are summed out.
        return nn.functional.pad(found, (0, 0, 0, self.circuit.places - columns.shape[1]))

    def encode_window(self, hidden: Tensor, columns: Tensor) -> Tensor:
        """Computes log p(component of each place | tokens before it), [C, n, r]."""
        return self._prefix(self.evidence(hidden, columns), hidden)

    def _prefix(self, evidence: Tensor, hidden: Tensor) -> Tensor:
        weights = self.weights(hidden)
        # Products of small matrices: casting them takes longer than they do.
        with torch.autocast(hidden.device.type, enabled=False):
            return self.circuit.prefix(evidence, weights)

    def depth_logits(self, depth: int, hidden: Tensor, columns: Tensor, window: Tensor) -> Tensor:
        """Computes logits [C, M] of place `depth` after the tokens before it: they are log-probabilities."""
        leaf = self.leaves.probabilities(hidden, self._main, first=depth, last=depth + 1)[:, 0]
        return _mixed(window[:, depth], leaf)

    def target_log_probs(self, hidden: Tensor, columns: Tensor) -> Tensor:
        evidence = self.evidence(hidden, columns)
        mixed = self._prefix(evidence, hidden)
        return (mixed + evidence).logsumexp(-1)[:, 1 : columns.shape[1]]

    def stepwise(self, hidden: Tensor, first: Tensor) -> Callable[[int, Tensor], Tensor]:
        leaf = self.leaves.probabilities(hidden, self._main, last=self.depth + 1)
        places = self.circuit.follow(self.weights(hidden))
        next(places)

        def step(index: int, before: Tensor) -> Tensor:
            return _mixed(places.send(_known(leaf[:, index], before)), leaf[:, index + 1])

        return step

    def loss(
        self, trunk: Trunk, batch: Batch, readout: Readout, settings: LossSettings, *, compiled: bool = False
    ) -> tuple[Tensor, LossSums]:
        self._main = readout.draft
        return super().loss(trunk, batch, readout, settings, compiled=compiled)

    def along(self, trunk: Trunk, hidden_BTD: Tensor, input_ids_BT: Tensor, *, position_ids_BT: Tensor) -> Any:
        self.attach(trunk)
        return super().along(trunk, hidden_BTD, input_ids_BT, position_ids_BT=position_ids_BT)

    def drafter(self, trunk: Trunk, *, slots: int, capacity: int) -> Drafter:
        self.attach(trunk)
        return super().drafter(trunk, slots=slots, capacity=capacity)

    def shorten(self, depth: int) -> None:
        """Drafts fewer places."""
        assert 1 <= depth <= self.depth, "heads can only become fewer"
        self.drafted = depth


def _mixed(log_p: Tensor, leaf: Tensor) -> Tensor:
    """Computes log-probabilities [C, M] of a mixture of leaves [C, r, M]."""
    with torch.autocast(leaf.device.type, enabled=False):
        return (log_p.exp()[:, None] @ leaf).squeeze(1).clamp_min(TINY).log()


def _known(leaf: Tensor, columns: Tensor) -> Tensor:
    """Reads the evidence [C, r] of a place's token from its leaves [C, r, M]; 0 where it has no column."""
    at = columns.clamp_min(0)[:, None, None].expand(-1, leaf.shape[1], -1)
    return torch.where(columns[:, None] >= 0, leaf.gather(2, at).squeeze(2).clamp_min(TINY).log(), 0.0)
