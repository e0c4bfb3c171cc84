"""A prompt that is to be answered."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from mtpd.data.rows.prompt import Prompt
from mtpd.files import fingerprint


@dataclass(frozen=True)
class Task:
    """A prompt that is to be answered, with its tokens.

    Attributes:
        ids: all tokens before the answer; in later turns of a conversation the earlier ones and their answers too.
        turn: which turn of the conversation is answered, from 1 on.
    """

    prompt: Prompt
    ids: list[int]
    turn: int = 1

    @cached_property
    def key(self) -> str:
        """A name of the tokens: prompts with the same ones have the same answer."""
        return key_of(self.ids)


Answered = tuple[Task, list[int]]
Answerer = Callable[[Sequence[Task]], Iterator[Answered]]
"""Gives tasks with their answers, as they end; what it has no answer to is left out."""


def key_of(ids: Sequence[int]) -> str:
    """A name of tokens."""
    return fingerprint(array("q", ids).tobytes())[:32]


def until_end(response: Sequence[int], ends: frozenset[int]) -> list[int]:
    """The answer up to the first token that ends it."""
    stop = next((place for place, token in enumerate(response, start=1) if token in ends), None)
    return list(response[:stop])


def is_cut(response: Sequence[int], ends: frozenset[int]) -> bool:
    """Whether an answer stops where nothing ended it."""
    return not response or response[-1] not in ends
