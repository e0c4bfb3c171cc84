"""What the checks share: their options, and what they leave."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Options:
    """How all checks run."""

    device: str
    tiny: bool
    """Shapes that a processor computes in seconds: for tests of the checks themselves."""
    out: Path
    until: float
    """The moment, by `time.monotonic()`, at which the check that runs has to be done."""

    @property
    def left(self) -> float:
        """Seconds that the check that runs still has."""
        return self.until - time.monotonic()

    @property
    def dtype(self) -> torch.dtype:
        """Of models: bfloat16 where the GPU computes in it."""
        cuda = self.device.startswith("cuda")
        return torch.bfloat16 if not cuda or torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


@dataclass
class Outcome:
    """One thing that was checked."""

    name: str
    ok: bool | None
    """None where it was left out."""
    said: str
    """In one line."""
    figures: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        mark = {True: "ok", False: "FAILED", None: "left out"}[self.ok]
        return f"{mark:9} {self.name:40} {self.said}"


def attempts(work: Iterable[tuple[str, Callable[[], Outcome]]]) -> Iterator[Outcome]:
    """Outcomes of functions, by name; one that raises has failed, with its traceback on stderr, and others go on."""
    for name, function in work:
        try:
            yield function()
        except Exception as error:
            traceback.print_exc()
            said = (str(error).splitlines() or [""])[0]
            yield Outcome(name, False, f"{type(error).__name__}: {said}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def gigabytes(count: float) -> str:
    """Bytes as people compare them with a GPU's memory."""
    return f"{count / 1e9:.1f} GB"
