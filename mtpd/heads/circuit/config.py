"""Circuit heads as recipes know them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mtpd.heads.kinds import Kind
from mtpd.section import LARGEST, Section

MOST_COMPONENTS = 256
COMPONENTS, RANK = 8, 16


class CircuitConfig(Section):
    """Form of circuit heads."""

    structure: Literal["ff", "cp", "hmm", "btree"] = "cp"
    """How the tokens of a window depend on each other. ff: not at all; cp: a mixture; hmm: a chain of latent
    variables; btree: a binary tree of them."""
    components: int | None = Field(default=None, ge=1, le=MOST_COMPONENTS)
    """r, the values of each latent variable; null: 8, or 1 for ff, which has no more."""
    leaves: Literal["full", "shared", "tilted"] = "shared"
    """full: an unembedding for each place of the window and component, for small vocabularies such as bytes.
    shared: the trunk's unembedding, behind an expander for each. tilted: an unembedding for each place, whose logits a
    component shifts, also for small vocabularies: one softmax a place in place of one for each component."""
    rank: int | None = Field(default=None, ge=1, le=LARGEST)
    """Rank of what tells the expanders of one place apart, where leaves are shared; null: 16."""

    @property
    def latent_values(self) -> int:
        """r."""
        return self.components or (1 if self.structure == "ff" else COMPONENTS)

    @property
    def expander_rank(self) -> int:
        return self.rank or RANK

    def resolved(self) -> CircuitConfig:
        """Fills in the numbers that null stands for."""
        return self.model_copy(update={"components": self.latent_values, "rank": self.expander_rank})


def _blocks(config: Any) -> int:
    form = config.circuit
    if form is not None and form.structure == "ff" and form.latent_values != 1:
        raise ValueError(f"circuit: components: {form.components} for ff, which has 1")
    return 0


KIND = Kind(
    name="circuit",
    about="the joint distribution of the window of K + 1 tokens as a probabilistic circuit",
    heads="mtpd.heads.circuit.heads:CircuitHeads",
    start="mtpd.heads.circuit.start",
    section=CircuitConfig,
    blocks=_blocks,
)
