"""Progress bars for what takes long."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm.auto import tqdm

DELAY = 2.0
"""Seconds before a bar is drawn where no terminal is: what ends earlier leaves nothing in a log."""


class Bar(tqdm):
    """A bar of tqdm on stderr, which stays out of logs of what is short."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, delay=0 if sys.stderr.isatty() else DELAY, **kwargs)

    # tqdm itself draws earlier where a description changes, and clears the line where a warning is printed.
    def display(self, *args: Any, **kwargs: Any) -> None:
        if self._is_due():
            super().display(*args, **kwargs)
            self.last_print_t = time.time()

    def clear(self, *args: Any, **kwargs: Any) -> None:
        if self._is_due():
            super().clear(*args, **kwargs)

    def _is_due(self) -> bool:
        return not self.delay or time.time() >= self.start_t + self.delay
