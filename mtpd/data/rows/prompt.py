"""A prompt, and by what words prompts are told apart."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mtpd.files import fingerprint, short

Message = dict[str, Any]
"""`role` and `content`, and what else a chat template reads."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the response that came with it if one did.

    `prompt` is plain text or a list of messages. `response` is of the same kind; as messages it is all
    that follows the prompt, and its assistant turns are the response.
    """

    id: str
    prompt: str | list[Message]
    response: str | list[Message] | None = None
    family: str = ""
    later: tuple[list[Message], ...] = ()
    """What is said in each further round of the conversation, after the trunk's own answer to the one before: a user
    turn, or the results of tools. Answers that came with the data are in `response` alone."""
    template: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the chat template: `tools`, and those of its own such as `enable_thinking`."""
    escape: bool = False
    """Whether control tokens of the model inside of its text are read as the characters that they are."""
    place: str = field(default="", compare=False)
    """Where the row stands, for messages: file:line."""

    @cached_property
    def text(self) -> str:
        """The words that tell prompts apart: what the user says, without system messages."""
        if isinstance(self.prompt, str):
            return self.prompt
        said = [message["content"] for message in self.prompt if message["role"] == "user"]
        return "\n".join(said or [message["content"] for message in self.prompt])

    @cached_property
    def fingerprint(self) -> str:
        """The same for prompts that differ only in case, spaces and punctuation."""
        return prompt_fingerprint(self.text)

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"prompt {self.id}" + (f" ({self.place})" if self.place else "")


class _Folded(dict[int, int]):
    """Characters as `normalise` writes them, looked up once."""

    def __missing__(self, code: int) -> int:
        self[code] = ord(" ") if unicodedata.category(chr(code))[0] in "PZC" else code
        return self[code]


FOLDED = _Folded()


def normalise(text: str) -> str:
    """Lower case, and every run of punctuation and white space as one space.

    Symbols (+, =, <, $) stay, because sums differ by them. A text of punctuation alone stays as it is.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.translate(FOLDED).split()) or folded.strip()


def prompt_fingerprint(text: str) -> str:
    """Fingerprint of a prompt's normalised text."""
    return short(fingerprint(normalise(text)))
