"""The source of Python's standard library: real text that is on every machine that runs this package.

A document is a file, without its tests. A tenth of the top-level modules, told by the hash of their names, is held
out. Other versions of Python have other sources: results name theirs.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SOURCE, HELD_OUT = "stdlib", "stdlib-held-out"
OUTSIDE = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"})
SHARE = 10
"""One of so many modules is held out."""
PROMPT, PIECE = 64, 224
"""Characters of a prompt, and of a prompt with the text behind it."""


def documents(source: str) -> Iterator[tuple[str, str]]:
    """(path within the library, text) of each file of `stdlib` or `stdlib-held-out`, in the order of the paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if OUTSIDE & set(inside.parts) or held_out(inside.parts[0]) != (source == HELD_OUT):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip():
            yield inside.as_posix(), text


def pieces(source: str) -> Iterator[tuple[str, dict[str, str]]]:
    """(place, row) of the documents cut into prompts with completions."""
    for path, text in documents(source):
        for number, start in enumerate(range(0, len(text) - PIECE + 1, PIECE)):
            piece = text[start : start + PIECE]
            if piece[:PROMPT].strip() and piece[PROMPT:].strip():
                row = {"id": f"{path}:{number}", "prompt": piece[:PROMPT], "completion": piece[PROMPT:]}
                yield path, {**row, "family": source}


def held_out(module: str) -> bool:
    """Whether a top-level module (`json`, or the file `bisect.py`) is never trained on."""
    name = module.removesuffix(".py")
    return hashlib.sha256(name.encode()).digest()[0] % SHARE == 0
