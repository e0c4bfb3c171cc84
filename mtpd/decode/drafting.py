"""The sources of drafts, and which of them are used."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Source = Literal["heads", "lookup", "corpus"]
HEADS: Source = "heads"
LOOKUP: Source = "lookup"
"""What followed the newest tokens when they last stood in the text."""
CORPUS: Source = "corpus"
"""What followed them in the responses that the heads were trained on, where the run keeps an index of those."""
SOURCES: tuple[Source, ...] = (HEADS, LOOKUP, CORPUS)
ALL_SOURCES = ",".join(SOURCES)


class Drafting(BaseModel):
    """Sources of drafts; by default all that there are, as much in each round as pays."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sources: tuple[Source, ...] = Field(default=SOURCES, min_length=1)
    """Those that are asked; a run that lacks one goes without it."""
    depth: int | None = Field(default=None, ge=1)
    """A chain of so many drafts of the heads alone in every round, which measures heads; None chooses in each round."""
    sampled: bool = False
    """Where text is sampled, heads alone draft, a chain that is drawn from their distributions."""
