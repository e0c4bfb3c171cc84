"""Ctrl-C and SIGTERM: they end a command at once, or where nothing is lost.

Exit codes are those that shells and schedulers know: 128 and the number of the signal, 130 for Ctrl-C and 143 for
SIGTERM. Signals reach the main thread alone; in another one nothing here does anything.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM


class Terminated(SystemExit):
    """SIGTERM came. No `except Exception` takes it for an error."""

    def __init__(self) -> None:
        super().__init__(TERMINATED)


class Asked:
    """Which signal has asked for the end, if one has."""

    def __init__(self) -> None:
        self.signal = 0


@contextmanager
def terminable() -> Iterator[None]:
    """Within it SIGTERM raises `Terminated`, so that files are closed and parts of them are deleted."""
    with _handling({signal.SIGTERM: lambda number, frame: end(number)}):
        yield


@contextmanager
def postponed() -> Iterator[Asked]:
    """Within it the first signal is noted alone; who runs ends with `end` where it is best. A second one ends at once.

    A signal that nobody has acted on ends at the end of the block.
    """
    asked = Asked()

    def note(number: int, frame: FrameType | None) -> None:
        if asked.signal:
            end(number)
        asked.signal = number

    with _handling({signal.SIGINT: note, signal.SIGTERM: note}):
        yield asked
    if asked.signal:
        end(asked.signal)


def end(number: int) -> NoReturn:
    """Ends as that signal does."""
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


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
