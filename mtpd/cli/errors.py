"""Errors as the command line shows them: one line each, and an exit code."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from mtpd.errors import MtpdError, is_out_of_memory
from mtpd.files import free_space

WORDS_OF_A_FULL_DISK = (
    "No space left on device",
    "Disk quota exceeded",
    "PytorchStreamWriter failed writing",
    "basic_ios::clear: iostream error",
)
"""Writers in other languages (safetensors, torch.save) pass the reason on as text only."""

SMALLER = "take a smaller model, shorter texts or fewer at a time, dtype=bfloat16, or another device"
"""What helps where a command, unlike training and generation, has no key of its own for it."""


TAKING_KEYS = ("distill", "pretrain", "store", "vocab", "show", "check")
"""Commands that take `key=value`."""


class DiskFull(MtpdError):
    """There is no room left where something was written."""


def disk_full(error: BaseException, directory: Path) -> DiskFull | None:
    """The error to show if a full disk caused this one.

    Args:
        error: what was raised.
        directory: where the command writes, named if the error itself names no path.
    """
    for cause in _chain(error):
        full = getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if isinstance(cause, MtpdError) and " free)" in str(cause):
            return DiskFull(f"{cause}; free some and run the same command again")
        if full or any(words in str(cause) for words in WORDS_OF_A_FULL_DISK):
            path = getattr(cause, "filename", None) or directory
            return DiskFull(
                f"no space left on the disk of {path} ({free_space(path)}); free some and run the same command again"
            )
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def report(error: BaseException, words: Sequence[str] = ()) -> int:
    """Prints one line about an error to stderr; gives back the exit code that it means.

    Args:
        words: of the command line.
    """
    if isinstance(error, MtpdError):
        if str(error):
            say(f"error: {error}")
        return error.exit_code
    if hasattr(error, "format_message"):  # An unknown command or option. Typer prints help where there is no message.
        context = getattr(error, "ctx", None)
        if message := error.format_message():
            key = _key_of(str(getattr(error, "option_name", "")), words, context)
            way_out = key or f"see {context.command_path if context else 'mtpd'} --help"
            say(f"error: {message.rstrip('.')}; {way_out}")
        return 2
    if any(is_out_of_memory(cause) for cause in _chain(error)):
        say(f"error: out of memory ({error}); {SMALLER}")
        return 1
    say(f"error: {unexpected(error)}")
    return 1


def _key_of(option: str, words: Sequence[str], context: Any) -> str:
    """Names the key to write in place of an option, where the command takes keys of a recipe."""
    if not option or context is None or context.command.name not in TAKING_KEYS:
        return ""
    from mtpd.recipe.recipe import key_meant

    key = key_meant(option.lstrip("-").replace("-", "_"), pretrain=context.command.name == "pretrain")
    if key is None:
        return ""
    # The value stands behind the option, or in it.
    at = next((index for index, word in enumerate(words) if word.partition("=")[0] == option), len(words))
    following = [words[at].partition("=")[2], *words[at + 1 :]] if at < len(words) else []
    value = next((word for word in following[:2] if word and not word.startswith("--")), "VALUE")
    return f"keys of a recipe have no dashes before them: {key}={value}"


def unexpected(error: BaseException) -> str:
    """The line for an error that nobody foresaw."""
    return f"{type(error).__name__}: {error} (run with --debug for the traceback)"


def say(message: str) -> None:
    """One line on stderr, whatever the message holds."""
    typer.echo(one_line(message), err=True)


def one_line(message: str) -> str:
    """Formats a message for the terminal."""
    return f"mtpd: {' '.join(message.split())}"
