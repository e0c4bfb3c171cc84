"""What a saved set of heads says about itself."""

from __future__ import annotations

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
    vocabulary_size: int = Field(default=0, ge=0)
    """Tokens of the draft vocabulary; 0 where heads draft over the whole vocabulary."""
    trunk: str = ""
    """Fingerprint of the trunk that the heads belong to."""

    @model_validator(mode="after")
    def _one_source_layer_for_each_block(self) -> HeadsConfig:
        blocks = 1 if self.shared else self.depth
        if len(self.source_layers) != blocks:
            raise ValueError(f"source_layers: {len(self.source_layers)} entries for {blocks} blocks")
        return self
