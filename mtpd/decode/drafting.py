"""How far heads draft."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Drafting(BaseModel):
    """How far to draft: contents of `heads/decoding.json`."""

    model_config = ConfigDict(extra="forbid")

    depth: int = Field(ge=1)
    threshold: float = Field(default=0.0, ge=0.0, le=1.0)
    """Drafting stops where the product of the probabilities that the heads gave to their drafts falls below it."""
    siblings: int = Field(default=0, ge=0)
    """Further candidates a round, each an alternative to one of the drafts."""
    tree: int = Field(default=0, ge=0)
    """Drafts are a tree of this many at most instead of a chain; for heads whose drafts do not depend on each other."""
    lookup: bool = False
    """Heads and look-up draft together, and the machine's times decide how much; the rest is not read then."""
    sampled: bool = False
    """Under sampling, drafts are drawn from the heads' distributions instead of being their most likely tokens."""
