"""Which loss is trained, and what is logged beside it. Read by `reference.py` and `fused.py` alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Divergence = Literal["kl", "reverse_kl", "jsd", "tv", "lk", "end_to_end_tv"]
"""What is compared with the teacher row; `reference.py` has a function for each."""

TRUE_PROBABILITIES: frozenset[Divergence] = frozenset({"tv", "lk", "end_to_end_tv"})
"""Divergences made of Σ min(p, q), what rejection sampling accepts: with a draft vocabulary the teacher's
probabilities stay those among all tokens, and nothing is cut to a top n."""

ESTIMATE_ROWS = 128
"""Rows of a depth at most on which LK takes its mean acceptance, evenly spaced."""


@dataclass(frozen=True)
class LossSettings:
    """The loss Σ_k Σ_rows alpha_k CE + beta_k D, with D the divergence.

    `end_to_end_tv` joins the depths of a position: there beta_k is its weight among them, Σ_k beta_k being 1.

    Attributes:
        alpha, beta: weights of the cross-entropy and of the divergence, one each for every depth with a loss.
        divergence: D.
        top_n: D compares the teacher's n most likely columns, renormalised; 0 for all of them.
        teacher_temperature, student_temperature: divide the logits in D; the cross-entropy has none.
        mix: share of the teacher in the mixture that `jsd` compares with.
        eta: how fast `lk` goes from KL to TV as acceptance grows.
    """

    alpha: tuple[float, ...]
    beta: tuple[float, ...]
    divergence: Divergence = "kl"
    top_n: int = 0
    teacher_temperature: float = 1.0
    student_temperature: float = 1.0
    mix: float = 0.5
    eta: float = 3.0

    def __post_init__(self) -> None:
        assert len(self.alpha) == len(self.beta), "one alpha and one beta for each depth"
        assert not (self.top_n and self.true_probabilities), "Σ min(p, q) is over all columns"
        assert self.divergence != "end_to_end_tv" or not any(self.alpha), "it scales whole rows of the gradient"
        assert 0.0 < self.mix < 1.0, "the ends are the two KLs"

    @property
    def true_probabilities(self) -> bool:
        """Whether the teacher's probabilities are those among all tokens, a draft vocabulary or not."""
        return self.divergence in TRUE_PROBABILITIES

    @property
    def depth_weights(self) -> tuple[float, ...]:
        """Weight of D at each depth."""
        if self.divergence != "end_to_end_tv":
            return self.beta
        total = sum(self.beta) or 1.0
        return tuple(weight / total for weight in self.beta)


@dataclass(frozen=True)
class LossSums:
    """Sums over rows, per depth [K]: what is logged beside the loss. None of them holds a graph."""

    rows: Tensor
    cross_entropy: Tensor
    divergence: Tensor
    """D as it is in the loss, without beta; of `end_to_end_tv`, the TV of each depth by itself."""
    accepted: Tensor
    """Rows whose drafts up to depth k, from the first depth with a loss on, all equal the main head's own choice among
    the columns, teacher-forced."""
