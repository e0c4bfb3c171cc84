"""The message of a command that was ended: each command says itself what it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

RESUMES = "the same command resumes where this one stopped"
RESUMES_WITHOUT_FRESH = "the same command without --fresh resumes where this one stopped"
KEPT_RESPONSES = "the responses generated so far are kept, and the same command uses them"

_kept = ""


@contextmanager
def keeping(what: str) -> Iterator[None]:
    """Within it an end by a signal leaves something behind.

    Args:
        what: the sentence for the user.
    """
    global _kept
    _kept = what
    yield
    # Not after an exception: `main` reads it then.
    _kept = ""


def take_kept() -> str:
    """The sentence of the command that was ended, empty where nothing is kept; the next command begins without."""
    global _kept
    what, _kept = _kept, ""
    return what
