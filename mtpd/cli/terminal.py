"""Filters the messages of libraries: errors reach the terminal always, the rest with --debug only."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from mtpd.cli.errors import one_line


class OneLine(logging.Handler):
    """Prints mtpd's own records as `mtpd: warning: ...` on stderr, above a progress bar if one is running."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(one_line(f"{record.levelname.lower()}: {record.getMessage()}"), file=sys.stderr)


@contextmanager
def quiet_libraries(*, debug: bool) -> Iterator[None]:
    """Within it warnings of mtpd are one line each, and those of libraries are hidden. Errors are not.

    Args:
        debug: shows what libraries say, in their own words.
    """
    own, handler = logging.getLogger("mtpd"), OneLine(logging.WARNING)
    own.addHandler(handler)
    deepspeed = logging.getLogger("DeepSpeed")
    try:
        if debug:
            yield
            return
        # deepspeed sets up its logger when it is imported, much later: a filter outlives that, a level would not.
        deepspeed.addFilter(_is_error)
        with warnings.catch_warnings(), _quiet_transformers():
            warnings.simplefilter("ignore")
            yield
    finally:
        deepspeed.removeFilter(_is_error)
        own.removeHandler(handler)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No warnings and no bars while weights are read; the bars of downloads stay, which take long."""
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging as talk

    level, bars = talk.get_verbosity(), talk.is_progress_bar_enabled()
    talk.set_verbosity_error()
    talk.disable_progress_bar()
    enable_progress_bars()
    try:
        yield
    finally:
        talk.set_verbosity(level)
        if bars:
            talk.enable_progress_bar()


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
