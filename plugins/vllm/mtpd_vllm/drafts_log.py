"""A log of drafts, with which `mtpd verify` compares them one by one.

A line for each round of each request: how many tokens of it were known, and what was drafted. Before the first stands
a line with the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

KEY = "mtpd_drafts"
"""The key in vLLM's `--additional-config` that names the file."""


class DraftsLog:
    """Lines of JSON in a file, each written at once."""

    def __init__(self, path: str) -> None:
        self.file = Path(path).open("a", encoding="utf-8", buffering=1)  # noqa: SIM115 - as long as the process
        self.begun: set[str] = set()

    def add(
        self, request: str, prompt: Sequence[int], known: int, drafts: Sequence[int], *, looked_up: int = 0
    ) -> None:
        """Writes a round of a request, and how many of the first drafts are no head's."""
        if request not in self.begun:
            self.begun.add(request)
            self._write({"request": request, "prompt": list(prompt)})
        line: dict[str, object] = {"request": request, "known": known, "drafts": list(drafts)}
        self._write(line | ({"looked_up": looked_up} if looked_up else {}))

    def _write(self, line: dict[str, object]) -> None:
        self.file.write(json.dumps(line) + "\n")
