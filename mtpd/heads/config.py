"""What a saved set of heads says about itself."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_COMPONENTS = 256


class ParallelShape(BaseModel):
    """What parallel heads add to `HeadsConfig`."""

    model_config = ConfigDict(extra="forbid")

    block: Literal["decoder", "linear", "residual", "unembedding"] = "decoder"
    """decoder: a norm, a projection and a decoder layer; linear: a projection; residual: h + SiLU(W h + b);
    unembedding: nothing, and an output matrix of its own instead of the shared one."""


class CircuitShape(BaseModel):
    """What circuit heads add to `HeadsConfig`."""

    model_config = ConfigDict(extra="forbid")

    structure: Literal["ff", "cp", "hmm", "btree"] = "cp"
    components: int = Field(default=8, ge=1, le=MOST_COMPONENTS)
    """r, the values of each latent variable."""
    leaves: Literal["full", "shared", "tilted"] = "shared"
    """full: an unembedding for each place and component. shared: one unembedding, the trunk's, after expanders. tilted:
    an unembedding for each place, and shifts of its logits for each component."""
    rank: int = Field(default=16, ge=1)
    """Of what tells the expanders of one place apart, where leaves are shared."""
    greedy: Literal["max_product", "conditionals"] = "conditionals"
    """How greedy drafts are found."""

    @model_validator(mode="after")
    def _one_component(self) -> CircuitShape:
        if self.structure == "ff" and self.components != 1:
            raise ValueError(f"components: {self.components} for ff, which has 1")
        return self


class HeadsConfig(BaseModel):
    """Contents of `heads/config.json`."""

    model_config = ConfigDict(extra="forbid")

    kind: str = "chain"
    depth: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    source_layers: list[int] = []
    """Per decoder block, the trunk layer (0-based) whose kind it has."""
    shared: bool = False
    """One block for all depths, which then has one entry in `source_layers` (FastMTP, arXiv 2509.18362)."""
    blocks: list[int] = []
    """Per depth, the block (0-based, numbered by first use) that it has, where blocks are looped; empty: one each, or
    the one that all share."""
    adapters: list[Annotated[int, Field(ge=0)]] = []
    """Per depth, the rank of a LoRA adapter of its own on its block, 0 for none; empty: none at any depth."""
    parallel: ParallelShape | None = None
    circuit: CircuitShape | None = None
    shared_layers: int = Field(default=0, ge=0)
    """How many of the trunk's last layers run a second time, with adapters, before the heads; 0: heads read the
    trunk's states."""
    adapter_rank: int = Field(default=0, ge=0)
    """Rank of those adapters; 0 where there are none."""
    vocabulary_size: int = Field(default=0, ge=0)
    """Tokens of the draft vocabulary; 0 where heads draft over the whole vocabulary."""
    columns: int = Field(default=0, ge=0)
    """Tokens that heads with logits of their own give; 0 for heads that give states."""
    trunk: str = ""
    """Fingerprint of the trunk that the heads belong to."""
    weights: str = ""
    """SHA-256 of the file of the weights, as it was saved; empty: not known, as in imported heads."""

    @property
    def block_of(self) -> list[int]:
        """Per depth, the block that it has."""
        return self.blocks or ([0] * self.depth if self.shared else list(range(self.depth)))

    def merged(self) -> HeadsConfig:
        """The same heads with a block for each depth and no adapters."""
        sources = [self.source_layers[block] for block in self.block_of]
        return self.model_copy(update={"shared": False, "source_layers": sources, "blocks": [], "adapters": []})

    @model_validator(mode="after")
    def _one_source_layer_for_each_block(self) -> HeadsConfig:
        if self.blocks and (self.shared or len(self.blocks) != self.depth or not _in_order(self.blocks)):
            raise ValueError(f"blocks: {self.blocks} does not say the block of each of {self.depth} depths")
        if self.adapters and len(self.adapters) != self.depth:
            raise ValueError(f"adapters: {len(self.adapters)} ranks for {self.depth} depths")
        if bool(self.shared_layers) != bool(self.adapter_rank):
            raise ValueError(f"adapter_rank: {self.adapter_rank} for {self.shared_layers} shared layers")
        blocks = {
            "chain": max(self.block_of) + 1,
            "parallel": self.depth if self.parallel is not None and self.parallel.block == "decoder" else 0,
            "medusa": 0,
            "circuit": 0,
        }.get(self.kind, len(self.source_layers))
        if len(self.source_layers) != blocks:
            raise ValueError(f"source_layers: {len(self.source_layers)} entries for {blocks} blocks")
        for kind in ("parallel", "circuit"):
            if (getattr(self, kind) is not None) != (self.kind == kind):
                raise ValueError(
                    f"{kind}: is for heads of kind {kind}, and needed there; these are of kind {self.kind}"
                )
        return self


def _in_order(blocks: list[int]) -> bool:
    """Whether each new number is the next one."""
    new = list(dict.fromkeys(blocks))
    return new == list(range(len(new)))
