"""What a saved set of heads says about itself."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator


class HeadsConfig(BaseModel):
    """Contents of `heads/config.json`."""

    model_config = ConfigDict(extra="forbid")

    kind: str = "chain"
    depth: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    source_layers: list[int]
    """Per block, the trunk layer (0-based) whose kind it has."""
    shared: bool = False
    """One block for all depths, which then has one entry in `source_layers` (FastMTP, arXiv 2509.18362)."""
    blocks: list[int] = []
    """Per depth, the block (0-based, numbered by first use) that it has, where blocks are looped; empty: one each, or
    the one that all share."""
    adapters: list[Annotated[int, Field(ge=0)]] = []
    """Per depth, the rank of a LoRA adapter of its own on its block, 0 for none; empty: none at any depth."""
    vocabulary_size: int = Field(default=0, ge=0)
    """Tokens of the draft vocabulary; 0 where heads draft over the whole vocabulary."""
    trunk: str = ""
    """Fingerprint of the trunk that the heads belong to."""

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
        blocks = max(self.block_of) + 1
        if len(self.source_layers) != blocks:
            raise ValueError(f"source_layers: {len(self.source_layers)} entries for {blocks} blocks")
        return self


def _in_order(blocks: list[int]) -> bool:
    """Whether each new number is the next one."""
    new = list(dict.fromkeys(blocks))
    return new == list(range(len(new)))
