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

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn

from mtpd.errors import UserError
from mtpd.heads.base import Batch, Drafter, Heads, Readout
from mtpd.heads.circuit.circuit import MAXIMUM, drawing, new_circuit
from mtpd.heads.circuit.leaves import TINY, FullLeaves, Leaves, SharedLeaves, TiltedLeaves
from mtpd.heads.config import CircuitShape, HeadsConfig
from mtpd.heads.logit_heads import LogitHeads
from mtpd.heads.parallel.heads import matching
from mtpd.heads.regression import shift_maps
from mtpd.losses.settings import LossSettings, LossSums
from mtpd.packed_modules import faster
from mtpd.trunk import Trunk, Unembedding

STARTS = ("regression", "identity")
TRAINING_COPIES = 4
"""Of each weight, in float32: itself, its gradient, and the two moments of Adam."""
KNOWN_ROWS = 1024
"""Positions of a piece, where leaves are not held: weights are read, and their gradients summed, once a piece."""


class CircuitHeads(LogitHeads):
    """A circuit over a window."""

    def __init__(self, trunk: Trunk, config: HeadsConfig) -> None:
        super().__init__(config)
        shape = config.circuit
        assert shape is not None
        places, size = config.depth + 1, config.hidden_size
        self.circuit = new_circuit(shape.structure, places, shape.components)
        self.leaves: Leaves
        if shape.leaves == "shared":
            self.leaves = SharedLeaves(places, shape.components, size, shape.rank)
        else:
            kind = FullLeaves if shape.leaves == "full" else TiltedLeaves
            self.leaves = kind(places, shape.components, config.columns, size)
            self.known_rows = KNOWN_ROWS
        self.sums = nn.Linear(size, self.circuit.sums) if self.circuit.sums else None
        self.joint = shape.greedy == "max_product"
        self.independent = shape.components == 1
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

    def logits_of_a_window(self) -> int:
        softmaxes = 1 if isinstance(self.leaves, TiltedLeaves) else self.circuit.components
        return self.circuit.places * softmaxes * self.config.columns

    def weights(self, hidden: Tensor) -> Tensor:
        """Sum weights [C, Z] before their softmax, linear in the states."""
        if self.sums is None:
            return hidden[:, :0]
        # Of the few rows of decoding.
        sums = faster(self.sums) if torch.is_inference_mode_enabled() else self.sums
        return sums(hidden.to(self.sums.weight.dtype))

    def leaf_logits(self, hidden: Tensor, *, first: int = 0, last: int | None = None) -> Tensor:
        """[C, n, r, M], or those of some places."""
        return self.leaves.logits(hidden, self._main, first=first, last=last)

    def evidence(self, hidden: Tensor, columns: Tensor) -> Tensor:
        """log φ_ij of the window's first tokens [C, p] in float32, [C, n, r]; 0 for those without a column."""
        found = self.leaves.evidence(hidden, columns, self._main)
        # Places behind the last that is drafted are summed out.
        return nn.functional.pad(found, (0, 0, 0, self.circuit.places - columns.shape[1]))

    def look(self, hidden: Tensor, columns: Tensor) -> Tensor:
        """log p(component of each place | tokens before it), [C, n, r]."""
        return self._prefix(self.evidence(hidden, columns), hidden)

    def _prefix(self, evidence: Tensor, hidden: Tensor) -> Tensor:
        weights = self.weights(hidden)
        # Products of small matrices: casting them takes longer than they do.
        with torch.autocast(hidden.device.type, enabled=False):
            return self.circuit.prefix(evidence, weights)

    def at(self, depth: int, hidden: Tensor, columns: Tensor, seen: Tensor) -> Tensor:
        """Logits [C, M] of place `depth` after the tokens before it: they are log-probabilities."""
        leaf = self.leaves.probabilities(hidden, self._main, first=depth, last=depth + 1)[:, 0]
        return _mixed(seen[:, depth], leaf)

    def known(self, hidden: Tensor, columns: Tensor) -> Tensor:
        evidence = self.evidence(hidden, columns)
        mixed = self._prefix(evidence, hidden)
        return (mixed + evidence).logsumexp(-1)[:, 1 : columns.shape[1]]

    def log_likelihood(self, hidden: Tensor, columns: Tensor) -> Tensor:
        """log p of windows [C, n], place 0 included; tokens without a column are summed out. [C]"""
        return self.circuit.log_marginal(self.evidence(hidden, columns), self.weights(hidden))

    def best(self, hidden: Tensor, columns: Tensor) -> Tensor:
        """Max-product, given place 0."""
        leaf, evidence = self._after_first(hidden, columns)
        evidence[:, 1:] = leaf[:, 1:].amax(-1).clamp_min(TINY).log()
        latents = self.circuit.latents(evidence, self.weights(hidden), MAXIMUM)
        return _chosen(leaf, latents).argmax(-1)[:, 1 : 1 + self.depth]

    def sample(self, hidden: Tensor, columns: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Ancestral sampling: columns [C, K] of places 1..K, given place 0 (`columns` [C, 1])."""
        way = drawing(generator)
        leaf, evidence = self._after_first(hidden, columns)
        latents = self.circuit.latents(evidence, self.weights(hidden), way)
        return way.choose(_chosen(leaf, latents).log())[:, 1 : 1 + self.depth]

    def _after_first(self, hidden: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities of all leaves [C, n, r, M], and the evidence of place 0 alone [C, n, r]."""
        leaf = self.leaves.probabilities(hidden, self._main)
        evidence = leaf.new_zeros(leaf.shape[:3])
        evidence[:, 0] = _known(leaf[:, 0], columns[:, 0])
        return leaf, evidence

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
        """Later places are not drafted; max-product still takes them in."""
        assert 1 <= depth <= self.depth, "heads can only become fewer"
        self.drafted = depth


def _mixed(log_p: Tensor, leaf: Tensor) -> Tensor:
    """Log-probabilities [C, M] of a mixture of leaves [C, r, M]."""
    with torch.autocast(leaf.device.type, enabled=False):
        return (log_p.exp()[:, None] @ leaf).squeeze(1).clamp_min(TINY).log()


def _known(leaf: Tensor, columns: Tensor) -> Tensor:
    """Evidence [C, r] of a place's token, from its leaves [C, r, M]; 0 where it has no column."""
    at = columns.clamp_min(0)[:, None, None].expand(-1, leaf.shape[1], -1)
    return torch.where(columns[:, None] >= 0, leaf.gather(2, at).squeeze(2).clamp_min(TINY).log(), 0.0)


def _chosen(leaf: Tensor, latents: Tensor) -> Tensor:
    """The leaf of one component of each place, [C, n, M]."""
    return leaf.gather(2, latents[:, :, None, None].expand(-1, -1, 1, leaf.shape[-1])).squeeze(2)


def configure(settings: Mapping[str, Any], trunk: Trunk) -> dict[str, Any]:
    """The part of `HeadsConfig` that is circuit heads' own, from the `heads` section of a recipe.

    Raises:
        UserError: full leaves that memory does not hold while they are trained.
    """
    given = {key: value for key, value in settings["circuit"].items() if value is not None}
    if given.get("structure") == "ff" and given.setdefault("components", 1) != 1:
        raise UserError(
            f"heads.circuit.components: {given['components']} is not accepted for structure: ff; accepted: 1, or null"
        )
    if given.get("leaves", "shared") != "shared" and "rank" in given:
        raise UserError(
            f"heads.circuit.rank: {given['rank']} does nothing with leaves: {given['leaves']}; accepted: null, or "
            "leaves: shared"
        )
    shape = CircuitShape.model_validate(given)
    if settings["init"] not in (None, *STARTS):
        raise UserError(
            f"heads.init: {settings['init']} is not accepted for circuit heads; accepted: {', '.join(STARTS)}"
        )
    places, columns = settings["depth"] + 1, settings["columns"]
    if shape.leaves != "full":
        return {"circuit": shape, "columns": columns}
    needed = 4 * TRAINING_COPIES * places * shape.components * columns * trunk.hidden_size
    room = psutil.virtual_memory().available
    if needed > room:
        raise UserError(
            f"heads.circuit.leaves: full needs {needed / 1e9:,.1f} GB for {places} x {shape.components} unembeddings "
            f"of {columns:,} x {trunk.hidden_size:,} with gradients and optimizer, and {room / 1e9:,.1f} GB are free; "
            "accepted: shared, tilted, or fewer components, or a draft vocabulary (heads.vocabulary)"
        )
    return {"circuit": shape, "columns": columns}


@torch.no_grad()
def initialise(heads: CircuitHeads, trunk: Trunk, start: str | None, *, seed: int = 0) -> bool:
    """Gives new heads their first weights. Returns whether `fit` has to follow.

    All components of a place start alike; what parts them is the random part of the sum weights, which therefore
    must not be zero.
    """
    random = torch.Generator().manual_seed(seed)
    _start_leaves(heads, trunk, [torch.eye(trunk.hidden_size)] * (heads.depth + 1), random)
    if heads.sums is not None:
        size = heads.sums.weight.shape
        heads.sums.weight.copy_(torch.randn(size, generator=random) * size[1] ** -0.5)
        heads.sums.bias.copy_(heads.circuit.start())
    return start in (None, "regression")


@torch.no_grad()
def fit(heads: CircuitHeads, trunk: Trunk, batches: Iterable[dict[str, Tensor]]) -> None:
    """Makes place k the main head behind the ridge regression of the trunk's state k positions further on."""
    maps = [torch.eye(trunk.hidden_size), *shift_maps(trunk, batches, depth=heads.depth)]
    _start_leaves(heads, trunk, maps, torch.Generator().manual_seed(0))


def _start_leaves(heads: CircuitHeads, trunk: Trunk, maps: list[Tensor], random: torch.Generator) -> None:
    heads.leaves.start(maps, trunk.unembedding.select(heads.rows()), random)


@torch.no_grad()
def adopt(heads: CircuitHeads, trunk: Trunk, source: Heads, *, seed: int = 0) -> None:
    """Starts every component of place k as the k-th linear head of `source`.

    Raises:
        UserError: those are others, or too few.
    """
    initialise(heads, trunk, "identity", seed=seed)
    maps = [each.project.weight.float() for each in matching(source, "linear", heads.depth)]
    _start_leaves(heads, trunk, [torch.eye(trunk.hidden_size), *maps], torch.Generator().manual_seed(seed))
