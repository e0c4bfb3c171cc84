"""Look-up in texts that were written before: an index of the responses that the heads were trained on.

The index knows, for each run of two to four tokens, with which token it went on most often, and the newest place where
it did. It is a file beside the heads, made once and mapped into memory; a round looks up a few keys in sorted arrays.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mtpd.decode.lookup import Match
from mtpd.errors import UserError
from mtpd.files import fingerprint, fingerprint_json, write_whole

logger = logging.getLogger(__name__)

CORPUS_FILE = "corpus.safetensors"
"""Beside the heads."""
SIZES = (4, 3, 2)
"""Tokens of the runs that are indexed."""
BETWEEN = -1
"""Stands between two texts."""
BYTES = 4 + 17 * len(SIZES)
"""Of a token of text at most, in the file."""
_BASE = np.uint64(0x9E3779B97F4A7C15)

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Corpus:
    """The arrays of the file: the texts, and by size of the runs their keys (sorted), places and agreeing places."""

    arrays: Arrays

    def matches(self, end: Sequence[int], length: int) -> list[Match]:
        """Finds how a text may go on, behind the longest run that its end is equal to.

        Args:
            end: the last tokens of the text, four of them or more.
            length: tokens of the continuation at most.
        """
        tokens = self.arrays["tokens"]
        for size in SIZES:
            if len(end) < size:
                continue
            run = np.array(end[-size:], dtype=np.int32)
            key = _keys(run, size)[0]
            keys = self.arrays[f"keys_{size}"]
            at = int(np.searchsorted(keys, key))
            if at == len(keys) or keys[at] != key:
                continue
            place = int(self.arrays[f"places_{size}"][at])
            # Two runs may have one key.
            if not np.array_equal(tokens[place - size : place], run):
                continue
            found = tokens[place : place + length].tolist()
            found = found[: found.index(BETWEEN)] if BETWEEN in found else found
            return [Match(tuple(found), size, int(self.arrays[f"agree_{size}"][at]))]
        return []


def build_corpus(texts: Sequence[Sequence[int]], *, megabytes: int) -> Corpus:
    """Indexes texts, from the first on as many as the size allows."""
    room = megabytes * 10**6 // BYTES
    joined: list[int] = []
    for text in texts:
        if len(joined) + len(text) + 1 > room:
            break
        joined += [*text, BETWEEN]
    tokens = np.array(joined, dtype=np.int32)
    arrays: Arrays = {"tokens": tokens}
    for size in SIZES:
        places = np.arange(size, len(tokens))
        whole = np.ones(len(places), dtype=bool)
        for back in range(size + 1):
            # Neither the run nor what follows it may reach into another text.
            whole &= tokens[places - back] != BETWEEN
        places = places[whole]
        keys, following = _keys(tokens, size)[places - size], tokens[places]
        order = np.lexsort((places, following, keys))
        keys, following, places = keys[order], following[order], places[order]
        ends = np.flatnonzero(np.append((keys[1:] != keys[:-1]) | (following[1:] != following[:-1]), len(keys) > 0))
        counts = np.diff(np.append(-1, ends))
        # Of each run the continuation that was seen most often.
        best = np.lexsort((counts, keys[ends]))
        last = np.append(keys[ends][best][1:] != keys[ends][best][:-1], True) if len(ends) else np.zeros(0, dtype=bool)
        chosen = best[last]
        arrays[f"keys_{size}"] = keys[ends][chosen]
        arrays[f"places_{size}"] = places[ends][chosen].astype(np.int64)
        arrays[f"agree_{size}"] = counts[chosen].clip(max=255).astype(np.uint8)
    return Corpus(arrays)


def write_corpus(folder: Path, corpus: Corpus, tokenizer: Any) -> None:
    """Stores an index beside the heads of a folder."""
    metadata = {"tokenizer": _tokenizer(tokenizer), "sha256": _content(corpus.arrays)}
    write_whole(folder / CORPUS_FILE, save(corpus.arrays, metadata))


def read_corpus(folder: Path, tokenizer: Any) -> Corpus | None:
    """The index beside the heads of a folder; None, and a warning, where it is damaged or of another tokenizer."""
    file = folder / CORPUS_FILE
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="np") as opened:
            metadata = opened.metadata() or {}
            arrays = {name: opened.get_tensor(name) for name in opened.offset_keys()}
        if metadata.get("sha256") != _content(arrays) or "tokens" not in arrays:
            raise UserError("its content is not what was written")
        if metadata.get("tokenizer") != _tokenizer(tokenizer):
            raise UserError("it is of another tokenizer")
    except (SafetensorError, OSError, UserError) as error:
        logger.warning("%s: not used: %s; delete it, or let `mtpd distill` write it anew", file, error)
        return None
    return Corpus(arrays)


def _keys(tokens: NDArray[np.int32], size: int) -> NDArray[np.uint64]:
    """A number for each run of so many tokens, [T - size + 1]."""
    count = max(0, len(tokens) - size + 1)
    keys = np.zeros(count, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for place in range(size):
            keys = (keys ^ tokens[place : place + count].astype(np.uint64)) * _BASE
            keys ^= keys >> np.uint64(29)
    return keys


def _content(arrays: Arrays) -> str:
    return fingerprint_json([[name, fingerprint(arrays[name].tobytes())] for name in sorted(arrays)])


def _tokenizer(tokenizer: Any) -> str:
    return fingerprint_json(sorted(tokenizer.get_vocab().items()))
