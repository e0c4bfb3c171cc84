"""What a saved set of heads says about itself."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class HeadsConfig(BaseModel):
    """Contents of `heads/config.json`."""

    model_config = ConfigDict(extra="forbid")

    kind: str = "chain"
    depth: int
    hidden_size: int
    source_layers: list[int]
    """Per head, the trunk layer (0-based) whose kind its block has."""
    vocabulary_size: int = 0
    """Tokens of the draft vocabulary; 0 where heads draft over the whole vocabulary."""
    trunk: str = ""
    """Fingerprint of the trunk that the heads belong to."""
