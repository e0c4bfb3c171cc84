"""Losses, their register, and the settings of the one that is trained.

Recipes read this file and `kinds.py`: neither imports torch.

Legend: N rows, S rows of a tile, M columns in use, V tokens, K depths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

ESTIMATE_ROWS = 128
"""Rows of a depth at most on which LK takes its mean acceptance, evenly spaced."""


class Teacher(NamedTuple):
    """Teacher rows of a tile; computed once, compared with every depth."""

    z: Tensor | None
    """Logits over the temperature, [S, M], for divergences with log q in their gradient."""
    q: Tensor
    """softmax(z) over the columns compared, 0 in the others, [S, M]."""
    lse: Tensor
    """log Σ exp z over the columns compared, [S]."""
    negative_entropy: Tensor
    """Σ q log q, [S]."""
    outside: Tensor | None
    """Added to logits to leave out columns: 0 or the lowest number, [S, M]. None where all are compared."""
    mass: Tensor | None
    """The true probability of all columns together, [S]. None where it is 1."""

    def rows(self, count: int) -> Teacher:
        """The first rows of the tile."""
        parts: Any = (None if part is None else part[:count] for part in self)
        return Teacher(*parts)


class Student(NamedTuple):
    """Rows of one depth beside their teacher rows, both [S, M]; log-sum-exp [S]."""

    y: Tensor
    p: Tensor
    lse: Tensor


Reference = Callable[..., "Tensor"]
"""(student logits [N, M], teacher logits [N, V], further arguments by name) -> D of each row [N]."""
Twin = Callable[[Student, Teacher, "LossSettings", "Tensor"], "tuple[Tensor, Tensor]"]
"""(student, teacher, settings, λ of the depth) -> D [S] and dD/dy [S, M], which is the caller's to overwrite."""


@dataclass(frozen=True)
class Loss:
    """One loss, Σ_k Σ_rows alpha_k CE + beta_k D: all that recipes, the reference and the fused loss ask about it.

    Attributes:
        name: value of the recipe key `train.loss`.
        about: what it is, for the description of that key.
        reads: keys of `train` that mean something to it, among those that not all losses read. One that reads `top_n`
            gets it as `n` of `reference`.
        terms: weights of CE and of D for heads of K depths, which `train.weights` and `train.decay` multiply.
        reference: D of each row, as in the paper; None for a loss that is CE alone.
        twin: D and its gradient on a tile of logits, for the fused loss; None for a loss that is CE alone.
        true_probabilities: whether D reads the teacher's probabilities among all tokens. With a draft vocabulary they
            are not renormalised over it, nothing is cut to a top n, and `reference` takes `columns_M`.
        log_q: whether `twin` reads the teacher's logits `z`.
        mixture: λ of a depth, which `twin` gets, from the acceptance of a few of its rows.
        join: joins 1 - D of all depths of a position: (1 - D [K, P], which count [K, P], weights) -> loss [P].
        logged: name of D in the metrics; empty for the name of the loss.
    """

    name: str
    about: str
    reads: frozenset[str] = frozenset()
    terms: Callable[[int], tuple[float, float]] = lambda depth: (0.0, 1.0)
    reference: Reference | None = None
    twin: Twin | None = None
    true_probabilities: bool = False
    log_q: bool = False
    mixture: Callable[[Tensor], Tensor] | None = None
    join: Callable[[Tensor, Tensor, Sequence[float]], Tensor] | None = None
    logged: str = ""

    def __post_init__(self) -> None:
        assert (self.reference is None) == (self.twin is None), "a reference and its twin come together"


LOSSES: dict[str, Loss] = {}
"""Every loss by its name, in the order in which messages list them."""


def register(loss: Loss) -> Loss:
    """Makes a loss known to recipes, training and plans.

    Raises:
        ValueError: another loss has its name.
    """
    if loss.name in LOSSES:
        raise ValueError(f"a loss of the name {loss.name} is registered already")
    LOSSES[loss.name] = loss
    return loss


@dataclass(frozen=True)
class LossSettings:
    """The loss Σ_k Σ_rows alpha_k CE + beta_k D, with D the divergence of the loss.

    A loss that joins the depths of a position has beta_k as their weights, which are scaled to sum 1.

    Attributes:
        alpha, beta: weights of the cross-entropy and of the divergence, one each for every depth with a loss.
        loss: its registered name.
        top_n: D compares the teacher's n most likely columns, renormalised; 0 for all of them.
        teacher_temperature: divides the teacher's logits in D.
    """

    alpha: tuple[float, ...]
    beta: tuple[float, ...]
    loss: str = "kl"
    top_n: int = 0
    teacher_temperature: float = 1.0

    def __post_init__(self) -> None:
        assert len(self.alpha) == len(self.beta), "one alpha and one beta for each depth"
        assert self.entry.reference is not None or not any(self.beta), "no divergence to weigh"
        assert not (self.top_n and self.true_probabilities), "Σ min(p, q) is over all columns"
        assert self.entry.join is None or not any(self.alpha), "it scales whole rows of the gradient"

    @property
    def entry(self) -> Loss:
        return LOSSES[self.loss]

    @property
    def true_probabilities(self) -> bool:
        """Whether the teacher's probabilities are those among all tokens, a draft vocabulary or not."""
        return self.entry.true_probabilities

    @property
    def depth_weights(self) -> tuple[float, ...]:
        """Weight of D at each depth."""
        if self.entry.join is None:
            return self.beta
        total = sum(self.beta) or 1.0
        return tuple(weight / total for weight in self.beta)


@dataclass(frozen=True)
class LossSums:
    """Sums over rows, per depth [K]: what is logged beside the loss. None of them holds a graph."""

    rows: Tensor
    cross_entropy: Tensor
    divergence: Tensor
    """D as it is in the loss, without beta; where depths are joined, the D of each by itself."""
    accepted: Tensor
    """Rows whose drafts up to depth k, from the first depth with a loss on, all equal the main head's own choice among
    the columns, teacher-forced."""
