"""Prompts from the built-in set, files, or a `datasets` id, and those that are held out.

`mtpd.data.rows.read_row` says which rows are read, `mtpd.data.sources` which files.
"""

from __future__ import annotations

import heapq
import logging
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from mtpd.data import sources
from mtpd.data.rendering import render as render
from mtpd.data.rows.left_out import LeftOut, Unusable
from mtpd.data.rows.prompt import Message as Message
from mtpd.data.rows.prompt import Prompt as Prompt
from mtpd.data.rows.read_row import read_row as read_row
from mtpd.data.rows.row_format import RowFormat
from mtpd.errors import UserError
from mtpd.files import fingerprint

logger = logging.getLogger(__name__)


def load_prompts(
    source: str,
    *,
    split: str = "train",
    subset: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    form: RowFormat | None = None,
    left_out: LeftOut | None = None,
) -> list[Prompt]:
    """Loads prompts. Rows that cannot be used are left out, and counted in a warning.

    With a limit, no more than so many are in memory. Which ones are drawn follows from the seed and their texts alone:
    a larger limit keeps them, and a row more or another order changes no other.

    Args:
        source: "builtin", "builtin-held-out" or "builtin-other", "stdlib" or "stdlib-held-out", a file, a folder of
            files, or the id of a `datasets` data set.
        split: which split of a folder or a `datasets` data set.
        subset: its configuration name.
        limit: at most so many, drawn with `seed`; None takes all in their order.
        form: how rows are read; None reads them by their columns.
        left_out: counts the rows that cannot be used, and says how many there may be.

    Raises:
        UserError: a missing file, no rows, or too many that cannot be used, with the first of them (file:line).
    """
    form, stem = form or RowFormat(), Path(source).stem
    counted = LeftOut() if left_out is None else LeftOut(left_out.most)
    rows = 0
    drawn: list[tuple[int, int, Prompt]] = []
    for index, (place, row) in enumerate(sources.read(source, split=split, subset=subset)):
        rows += 1
        try:
            prompt = _read(form, row, place, default_id=f"{stem}-{index}", default_family=stem)
        except Unusable as error:
            counted.add(error)
            continue
        # The least keys are kept: the heap has the greatest of them first.
        key = -int(fingerprint(f"{seed}:{prompt.fingerprint}")[:16], 16) if limit is not None else 0
        if limit is None or len(drawn) < limit:
            drawn.append((key, -index, prompt))
            if len(drawn) == limit:
                heapq.heapify(drawn)
        elif (key, -index) > drawn[0][:2]:
            heapq.heapreplace(drawn, (key, -index, prompt))
    counted.check(rows, source=f"data.prompts: {source}")
    if left_out is not None:
        left_out.take(counted)
    ids = DistinctIds()
    prompts = [ids.number(prompt) for _, _, prompt in sorted(drawn, key=lambda item: -item[1])]
    if ids.repeated:
        logger.warning("%s: %s", source, ids.words())
    return prompts


def _read(form: RowFormat, row: object, place: str, *, default_id: str, default_family: str) -> Prompt:
    prompt = form.read(row, place=place, default_id=default_id, default_family=default_family)
    if not prompt.text.strip() and (isinstance(prompt.prompt, list) or not prompt.response):
        raise Unusable("empty", f"{place}: it has no text")
    return prompt


class DistinctIds:
    """Numbers the ids that several rows of one source have: `a`, `a#2`, `a#3`."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._next: Counter[str] = Counter()
        self.repeated = 0
        """Rows whose id an earlier row has."""
        self._example = ""

    def number(self, prompt: Prompt) -> Prompt:
        """The prompt with an id that no earlier one has."""
        name = prompt.id
        while name in self._taken:
            self._next[prompt.id] += 1
            name = f"{prompt.id}#{self._next[prompt.id] + 1}"
        self._taken.add(name)
        if name != prompt.id:
            self.repeated += 1
            self._example = self._example or f"{prompt.id} again is {name}"
        return replace(prompt, id=name)

    def words(self) -> str:
        """Words for a warning."""
        what = "row has the id" if self.repeated == 1 else "rows have the id"
        return f"{self.repeated} {what} of an earlier one; they are numbered ({self._example})"


@dataclass(frozen=True)
class HeldOutSplit:
    """Training and held-out prompts that share no text.

    `duplicates` counts training prompts that repeat another one, `met` those that a held-out prompt repeats.
    """

    train: list[Prompt]
    held_out: list[Prompt]
    duplicates: int
    met: int


def split_held_out(
    prompts: list[Prompt], held_out: list[Prompt] | None, *, count: int = 80, seed: int = 0
) -> HeldOutSplit:
    """Removes repeated prompts, then everything from training that is held out.

    Args:
        held_out: the prompts measured on; None takes `count` of the deduplicated `prompts` by `seed`.

    Raises:
        UserError: nothing is left to train on.
    """
    distinct = deduplicate(prompts)
    duplicates = len(prompts) - len(distinct)
    if held_out is None:
        if count >= len(distinct):
            raise UserError(
                f"data.held_out_count: {count} of {len(distinct)} distinct prompts leave none to train on; "
                "give more prompts, a smaller count, or data.held_out"
            )
        chosen = set(random.Random(seed).sample(range(len(distinct)), count))
        kept = [prompt for index, prompt in enumerate(distinct) if index not in chosen]
        return HeldOutSplit(kept, [distinct[index] for index in sorted(chosen)], duplicates, 0)
    held_out = deduplicate(held_out)
    measured = {prompt.fingerprint for prompt in held_out}
    kept = [prompt for prompt in distinct if prompt.fingerprint not in measured]
    if not kept:
        raise UserError(f"data.prompts: all {len(distinct)} distinct prompts are held out; none is left to train on")
    return HeldOutSplit(kept, held_out, duplicates, len(distinct) - len(kept))


def deduplicate(prompts: Iterable[Prompt]) -> list[Prompt]:
    """The first of each group of prompts with the same normalised text, in order."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.fingerprint, prompt)
    return list(first.values())
