"""Parallel heads as recipes know them."""

from __future__ import annotations

from typing import Any, Literal

from mtpd.heads.kinds import Kind
from mtpd.section import Section

Block = Literal["decoder", "linear", "residual", "unembedding"]


class ParallelConfig(Section):
    """Form of parallel heads."""

    block: Block = "decoder"
    """What stands between the trunk's state and the unembedding. decoder: a layer of the trunk's own kind; linear:
    one matrix; residual: Medusa's block; unembedding: nothing, but each head has an unembedding of its own, for small
    vocabularies such as bytes."""


def _blocks(config: Any) -> int:
    form = config.parallel
    return config.depth if form is not None and form.block == "decoder" else 0


KIND = Kind(
    name="parallel",
    about="K heads on the same state",
    heads="mtpd.heads.parallel.heads:ParallelHeads",
    start="mtpd.heads.parallel.start",
    section=ParallelConfig,
    blocks=_blocks,
    native={"parallel": {"block": "unembedding"}},
)
