"""How often drafts are right, by what is known of them before they are verified: counts, and the chances from them.

A head's draft is right about as often as the head says, but not quite; the table says how often it was, for each depth
and each step of the probability that the head gave it. A look-up is right the more often the longer the match, the more
of the places looked at agree, and the further a continuation has already been right. All chances are conditional: given
that the draft before it was accepted.

The counts are made on texts that were not trained on (`mtpd.evaluate.chances`), without any decoding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mtpd.decode.drafting import LOOKUP, Source
from mtpd.errors import UserError
from mtpd.files import read_sealed, sealed, write_whole

CHANCES = "chances.json"
"""Beside the heads: the counts."""
STEPS = 12
"""Steps of a head's probability, each e^(-1/2) of the one before."""
LENGTHS = (2, 3, 4, 6, 9)
"""Where a longer match begins to count for more."""
AGREEING = 3
"""Places that agree, at most."""
REACH = 8
"""Tokens that a look-up drafts at most."""
PRIOR = 4.0
"""What is known of all drafts of a kind weighs as much as this many drafts of a cell."""

Cell = tuple[int, int]
"""Accepted, drafted."""


def step_of(log_probability: float) -> int:
    """The step of a probability that a head gave."""
    return min(STEPS, int(-2.0 * log_probability)) if log_probability > -math.inf else STEPS


def length_of(match: int) -> int:
    """The class of a match of so many tokens."""
    return sum(match >= least for least in LENGTHS)


class Chances(BaseModel):
    """Counts by cell, as `chances.json` beside the heads holds them."""

    model_config = ConfigDict(extra="forbid")

    heads: dict[str, Cell] = Field(default_factory=dict)
    """By "depth step"."""
    likeliest: dict[str, Cell] = Field(default_factory=dict)
    """By depth: the likeliest draft alone."""
    lookup: dict[str, Cell] = Field(default_factory=dict)
    """By "length agree place"."""
    corpus: dict[str, Cell] = Field(default_factory=dict)
    """As of look-up, for continuations in other texts."""

    def head(self, depth: int, log_probability: float) -> float:
        """The chance of a draft of a head. Where nothing was counted, the head is believed."""
        cell = self.heads.get(f"{depth} {step_of(log_probability)}", (0, 0))
        return (cell[0] + PRIOR * math.exp(log_probability)) / (cell[1] + PRIOR)

    def right_at(self, depth: int) -> float:
        """The share of right drafts of a head, of the likeliest ones alone; half where nothing was counted."""
        accepted, drafted = self.likeliest.get(str(depth), (0, 0))
        return (accepted + PRIOR / 2) / (drafted + PRIOR)

    def looked_up(self, match: int, agree: int, place: int, *, source: Source = LOOKUP) -> float:
        """The chance of token `place` (from 0 on) of a continuation, in the text itself or in the corpus."""
        cells = self.lookup if source == LOOKUP else self.corpus
        cell = cells.get(lookup_key(match, agree, place), (0, 0))
        return (cell[0] + PRIOR * _assumed(match, place)) / (cell[1] + PRIOR)

    def path(
        self, match: int, agree: int, tokens: Sequence[int], before: float = 1.0, *, source: Source = LOOKUP
    ) -> list[float]:
        """The chances that a continuation is right up to each of its tokens."""
        found = []
        for place in range(len(tokens)):
            before *= self.looked_up(match, agree, place, source=source)
            found.append(before)
        return found


def lookup_key(match: int, agree: int, place: int) -> str:
    """The name of a look-up's cell."""
    return f"{length_of(match)} {min(agree, AGREEING)} {min(place, REACH - 1)}"


def _assumed(match: int, place: int) -> float:
    """Assumes a chance for a look-up of which nothing was counted: `match + place` tokens agree already."""
    known = match + place
    return known / (known + 2.0)


def read_chances(folder: Path) -> Chances:
    """The counts beside the heads of a folder; without the file, heads are believed.

    Raises:
        UserError: the file is damaged.
    """
    file = folder / CHANCES
    if not file.is_file():
        return Chances()
    try:
        return Chances.model_validate(read_sealed(file, refusal="not counts of drafts"))
    except ValidationError as error:
        raise UserError(f"{file}: cannot be read; delete it: `mtpd distill` on the run counts again") from error


def write_chances(folder: Path, chances: Chances) -> None:
    """Stores the counts beside the heads of a folder."""
    write_whole(folder / CHANCES, json.dumps(sealed(chances.model_dump(mode="json"))) + "\n")
