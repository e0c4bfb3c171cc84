"""Ctrl-C and SIGTERM: they end a command at once, or where nothing is lost.

Exit codes are those that shells and schedulers know: 128 and the number of the signal, 130 for Ctrl-C and 143 for
SIGTERM. Signals reach the main thread alone; in another one nothing here does anything.

A command that ends stays ended: a further signal while files are closed and the process winds up raises nothing,
because an exception there would be a traceback after everything was saved. An end that takes long can be cut off by
another signal.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
PATIENCE = 2.0
"""Seconds from the end of a command to where another signal cuts it off."""

_ended_at: float | None = None
"""When the command that runs has ended; None while it runs."""


class Terminated(SystemExit):
    """SIGTERM came. No `except Exception` takes it for an error."""

    def __init__(self) -> None:
        super().__init__(TERMINATED)


class Asked:
    """Which signal has asked for the end, if one has."""

    def __init__(self) -> None:
        self.signal = 0


def take_signals() -> None:
    """Handles both signals for the rest of the process, also while Python shuts down."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            signal.signal(number, _end_once)


@contextmanager
def terminable() -> Iterator[None]:
    """Within it both signals raise, once, so that files are closed and parts of them are deleted."""
    global _ended_at
    _ended_at = None
    with _handling({signal.SIGINT: _end_once, signal.SIGTERM: _end_once}):
        yield


@contextmanager
def postponed() -> Iterator[Asked]:
    """Within it the first signal is noted alone; who runs ends with `end` where it is best. A second one ends at once.

    A signal that nobody has acted on ends at the end of the block.
    """
    global _ended_at
    _ended_at = None
    asked = Asked()

    def note(number: int, frame: FrameType | None) -> None:
        if asked.signal:
            _end_once(number, frame)
        asked.signal = number

    with _handling({signal.SIGINT: note, signal.SIGTERM: note}):
        yield asked
    if asked.signal:
        end(asked.signal)


def end(number: int) -> NoReturn:
    """Ends as that signal does."""
    command_ended()
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def command_ended() -> None:
    """From now on signals raise nothing."""
    global _ended_at
    if _ended_at is None:
        _ended_at = time.monotonic()


def _end_once(number: int, frame: FrameType | None) -> None:
    if _ended_at is None:
        end(number)
    if time.monotonic() - _ended_at > PATIENCE:
        os._exit(128 + number)


@contextmanager
def _handling(handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A signal that the process was told to ignore (as under nohup) stays ignored.
    before = {number: signal.getsignal(number) for number in handlers}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handlers[number])
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
