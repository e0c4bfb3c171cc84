"""Errors that end a command in one line. A user's mistake exits with 2, a failure with 1."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager


class MtpdError(Exception):
    """A failure: the message is one line that names the cause and the way out."""

    exit_code = 1


class UserError(MtpdError, ValueError):
    """Something the user gave is wrong: it names the key or file, the value and what is accepted."""

    exit_code = 2


class UnsupportedModel(UserError):
    """An architecture that heads cannot be built for, with the reason."""


class OutOfMemory(MtpdError):
    """The memory of the device or of the machine is full: the message says what to make smaller."""


WORDS_OF_FULL_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")
"""PyTorch's allocators for CPUs raise a plain RuntimeError."""


@contextmanager
def enough_memory(doing: str, advice: str) -> Iterator[None]:
    """Turns an allocation that fails under it into one line.

    Args:
        doing: what was going on, such as "training".
        advice: what makes it smaller.

    Raises:
        OutOfMemory: an allocation failed.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        wanted = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
        more = f" ({wanted[1]} more were wanted)" if wanted else ""
        raise OutOfMemory(f"out of memory while {doing}{more}; {advice}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, by Python or by PyTorch, whatever the device."""
    if isinstance(error, OutOfMemory):
        return False
    said = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in said for words in WORDS_OF_FULL_MEMORY)
    )


class RankFailed(MtpdError):
    """Another process of the run has failed. The message is empty where another rank tells the user."""
