"""Heads made noise in a copy of an export: what a loader drafts must follow the numbers that lie there."""

from __future__ import annotations

import math
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from mtpd.formats.directory import link_others
from mtpd.formats.family import OTHER
from mtpd.formats.find_heads import Native
from mtpd.formats.tensors import overwrite, stored

LEAST = 0.05
"""CAR_1 below which heads accept hardly more than noise may."""

GAINS, BIASES = 0.3, 0.5
"""Standard deviations of the noise in gains, around 1, and in biases, around 0."""


@dataclass(frozen=True)
class Perturbed:
    """A copy of an export in which all tensors of the heads are noise."""

    folder: Path
    native: Native
    """The heads as they were written."""
    seed: int = 0

    @cached_property
    def kinds(self) -> dict[str, list[str]]:
        """mtpd's names of the heads' tensors, those together that differ in the head, or the expert, alone."""
        found: dict[str, list[str]] = {}
        for name in self.native.names:
            if not name.startswith(OTHER):
                found.setdefault(kind_of(name), []).append(name)
        return found

    def spoil(self, kind: str, *, draw: int = 0) -> None:
        """Puts noise into the tensors of a kind, the same every time for a draw."""
        for name in self.kinds[kind]:
            theirs = self.native.names[name]
            tensor = self.native.raw[theirs]
            generator = torch.Generator().manual_seed(zlib.crc32(f"{theirs} {self.seed} {draw}".encode()))
            spoilt = stored(noise(theirs, tensor.shape, generator).to(tensor.dtype))
            overwrite(self.folder / self.native.checkpoint.file_of[theirs], tensor, spoilt)


def kind_of(name: str) -> str:
    """A tensor's name without the numbers of its head and expert."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def noise(name: str, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Numbers with which every part of a head has its share in what the head computes, whatever it has learned.

    Sums over a row of a matrix keep the size of what they read, and so attention scores are neither near 0, where
    queries and keys would not matter, nor so large that one position has all the weight.
    """
    numbers = torch.randn(tuple(shape), generator=generator)
    if len(shape) > 1:
        return numbers / math.sqrt(shape[-1])
    return numbers * BIASES if name.endswith("bias") else 1.0 + GAINS * numbers


@contextmanager
def perturbed(native: Native, *, seed: int = 0) -> Iterator[Perturbed]:
    """A copy, beside it, of the directory that heads lie in, with noise in their place; other files are linked."""
    folder = native.checkpoint.path
    files = {native.checkpoint.file_of[name] for name in native.raw}
    with tempfile.TemporaryDirectory(dir=folder.resolve().parent, prefix=".perturbed-") as beside:
        copy = Path(beside) / folder.name
        copy.mkdir()
        link_others(folder, copy, without=files)
        for file in files:
            shutil.copyfile(folder / file, copy / file)
        noisy = Perturbed(copy, native, seed)
        for kind in noisy.kinds:
            noisy.spoil(kind)
        yield noisy


def accepts_less(written: float, noise: float) -> bool | None:
    """Whether noise accepts less than the heads that were written, by their CAR_1; None where those hardly accept."""
    return noise < written if written >= LEAST else None
