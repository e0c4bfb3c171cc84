"""Suite prompts that a run was trained on, or on ones that are nearly the same.

Exact repetitions are found by the fingerprints of normalised prompts in the provenance. For near ones the run
directory keeps a MinHash signature of each prompt trained on (Broder 1997): the share of equal entries of two
signatures estimates the Jaccard similarity of the sets of 5-character pieces of the normalised texts. Pieces of
characters rather than words, so that short prompts and languages without spaces are compared as well.
datasketch computes the signatures. One of 128 numbers takes 512 bytes, whereas prompts may be large or secret.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mtpd.data.rows.prompt import normalise, prompt_fingerprint
from mtpd.errors import UserError
from mtpd.files import SEAL, fingerprint, write_whole

PERMUTATIONS = 128
PIECE = 5
"""Characters of a piece."""
SIMILAR = 0.8
"""Jaccard similarity from which two prompts count as nearly the same; Lee et al., arXiv 2107.06499, take 0.8 too."""


@dataclass(frozen=True)
class TrainedPrompts:
    """The prompts that a run was trained on, as fingerprints and signatures."""

    fingerprints: frozenset[str]
    """Of normalised prompts."""
    signatures: np.ndarray[Any, np.dtype[np.uint32]]
    """[N, PERMUTATIONS]; no rows where the run did not keep them."""

    def meets(self, texts: Sequence[str]) -> list[Literal["exact", "near"] | None]:
        """For each prompt whether the run was trained on it, on one that is nearly the same, or on neither."""
        near = self._near(texts)
        return [
            "exact" if prompt_fingerprint(text) in self.fingerprints else ("near" if index in near else None)
            for index, text in enumerate(texts)
        ]

    def _near(self, texts: Sequence[str]) -> set[int]:
        if not len(self.signatures):
            return set()
        # All pairs: 40,000 training prompts take twenty milliseconds for each prompt of a suite.
        similarities = [float((self.signatures == own).mean(axis=1).max()) for own in signatures(texts)]
        return {index for index, similarity in enumerate(similarities) if similarity >= SIMILAR}


def signatures(texts: Iterable[str]) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """MinHash signatures [N, PERMUTATIONS] of normalised texts."""
    from datasketch import MinHash  # brings in scipy

    pieces = []
    for text in texts:
        plain = normalise(text)
        pieces.append({plain[i : i + PIECE].encode() for i in range(max(1, len(plain) - PIECE + 1))})
    # The scheme is named, so that signatures kept by one release are comparable with those of the next.
    made = MinHash.generator(pieces, num_perm=PERMUTATIONS, seed=1, scheme="affine32")
    return np.array([minhash.hashvalues for minhash in made], dtype=np.uint32).reshape(-1, PERMUTATIONS)


def write_signatures(path: Path, texts: Iterable[str]) -> None:
    """Keeps the signatures of what is trained on."""
    found = signatures(texts)
    write_whole(path, save({"signatures": found}, metadata={"format": "np", SEAL: fingerprint(found.tobytes())}))


def read_trained(fingerprints: Iterable[str], path: Path) -> TrainedPrompts:
    """Reads what a run directory says about its training prompts.

    Args:
        path: the file of `write_signatures`; runs without one are compared by fingerprint alone.

    Raises:
        UserError: the file is none of ours.
    """
    empty = np.zeros((0, PERMUTATIONS), dtype=np.uint32)
    if not path.is_file():
        return TrainedPrompts(frozenset(fingerprints), empty)
    try:
        with safe_open(path, framework="np") as file:
            found, seal = file.get_tensor("signatures"), (file.metadata() or {}).get(SEAL)
        if seal is not None and seal != fingerprint(found.tobytes()):
            raise ValueError("it is damaged: its SHA-256 is not that of the signatures")
        if found.ndim != 2 or found.shape[1] != PERMUTATIONS:
            raise ValueError(f"signatures of shape {found.shape}")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not a file of prompt signatures: {error}") from error
    return TrainedPrompts(frozenset(fingerprints), found)
