"""Prompts that are answered turn by turn, and what each turn has room for."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mtpd.data.answers.task import Task
from mtpd.data.packing import Sample
from mtpd.data.rows.prompt import Prompt
from mtpd.errors import UserError

logger = logging.getLogger(__name__)


@dataclass
class Conversation:
    """A prompt, and how far it is answered."""

    prompt: Prompt
    tasks: list[Task] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)

    @property
    def next_turn(self) -> int:
        """The turn that is answered next; 0 where none is."""
        whole = len(self.answers) == len(self.tasks) <= len(self.prompt.later)
        return len(self.answers) + 1 if whole else 0

    def samples(self) -> Iterator[Sample]:
        """Gives documents with all answers in them."""
        ids: list[int] = []
        mask: list[bool] = []
        parts = 0
        for task, answer in zip(self.tasks, self.answers, strict=False):
            if task.ids[: len(ids)] != ids:
                yield Sample(self._name(parts), ids, mask, self.prompt.family)
                ids, mask, parts = [], [], parts + 1
            further = task.ids[len(ids) :]
            ids = [*ids, *further, *answer]
            mask = [*mask, *[False] * len(further), *[True] * len(answer)]
        if self.answers:
            yield Sample(self._name(parts), ids, mask, self.prompt.family)

    def _name(self, part: int) -> str:
        return f"{self.prompt.id}/{part + 1}" if part else self.prompt.id


def conversations(prompts: Sequence[Prompt]) -> list[Conversation]:
    ids: set[str] = set()
    for prompt in prompts:
        if prompt.id in ids:
            raise UserError(f"data.prompts: two prompts have the id {prompt.id}")
        ids.add(prompt.id)
    if not prompts:
        raise UserError("data.prompts: there are no prompts to answer")
    return [Conversation(prompt) for prompt in prompts]


@dataclass
class Limits:
    """Which prompts have room for an answer, and what was left out for want of it."""

    max_new_tokens: int
    max_length: int
    row_length: int | None
    longest: int = 0
    too_long: int = 0
    no_room: int = 0

    def hold(self, ids: Sequence[int], turn: int) -> bool:
        """Whether an answer fits after these tokens; counts the prompts where it does not."""
        too_long = not ids or len(ids) + self.max_new_tokens > self.max_length
        no_room = not too_long and self.row_length is not None and len(ids) >= self.row_length
        if turn == 1:
            self.longest = max(self.longest, len(ids))
            self.too_long += too_long
            self.no_room += no_room
        return not too_long and not no_room

    def report(self, prompts: int) -> None:
        """Warns of prompts that are left out.

        Raises:
            UserError: none is left.
        """
        reasons = []
        if self.too_long:
            reasons.append(
                f"{self.too_long} of {prompts} prompts are longer than the context: up to {self.longest} tokens and "
                f"data.max_new_tokens={self.max_new_tokens} do not fit into {self.max_length}"
            )
        if self.no_room:
            reasons.append(
                f"{self.no_room} of {prompts} prompts leave no room for a response in a row of "
                f"data.row_length={self.row_length}"
            )
        if self.too_long + self.no_room == prompts:
            raise UserError(f"data.prompts: {'; '.join(reasons)}")
        for reason in reasons:
            logger.warning("%s; they are left out", reason)
