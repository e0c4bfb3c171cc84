"""Heads made noise in a copy of an export: heads that a loader reads must then accept less."""

from __future__ import annotations

import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from mtpd.formats.directory import link_others
from mtpd.formats.families.table import OTHER
from mtpd.formats.find_heads import Native
from mtpd.formats.tensors import Stored, chunks, stored

LEAST = 0.05
"""CAR_1 below which heads accept hardly more than noise may."""

SPREAD = 0.1
"""Standard deviation of the noise in place of a tensor whose elements are all the same."""


@dataclass(frozen=True)
class Perturbed:
    """A copy of an export in which all tensors of the heads are noise."""

    folder: Path
    native: Native
    """The heads as they were written."""

    @cached_property
    def kinds(self) -> dict[str, list[str]]:
        """mtpd's names of the heads' tensors, those together that differ in the head, or the expert, alone."""
        found: dict[str, list[str]] = {}
        for name in self.native.names:
            if not name.startswith(OTHER):
                found.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(name)
        return found

    def give_back(self, kind: str) -> None:
        """Puts the written tensors of a kind into the copy."""
        for name in self.kinds[kind]:
            self._overwrite(name, self.native.raw[self.native.names[name]])

    def spoil(self, kind: str) -> None:
        """Puts noise into the tensors of a kind, the same every time."""
        for name in self.kinds[kind]:
            tensor = self.native.raw[self.native.names[name]].load()
            spread = float(tensor.float().std()) if tensor.numel() > 1 else 0.0
            generator = torch.Generator().manual_seed(zlib.crc32(self.native.names[name].encode()))
            noise = torch.randn(tensor.shape, generator=generator) * (spread or SPREAD)
            self._overwrite(name, stored(noise.to(tensor.dtype)))

    def _overwrite(self, name: str, tensor: Stored) -> None:
        theirs = self.native.names[name]
        where = self.native.raw[theirs].where
        assert where is not None, "a tensor of a checkpoint lies in a file"
        with (self.folder / self.native.checkpoint.file_of[theirs]).open("r+b") as opened:
            opened.seek(where[1])
            for piece in chunks(tensor):
                opened.write(piece)


@contextmanager
def perturbed(native: Native) -> Iterator[Perturbed]:
    """A copy, beside it, of the directory that heads lie in, with noise in their place; other files are linked."""
    folder = native.checkpoint.path
    files = {native.checkpoint.file_of[name] for name in native.raw}
    with tempfile.TemporaryDirectory(dir=folder.resolve().parent, prefix=".perturbed-") as beside:
        copy = Path(beside) / folder.name
        copy.mkdir()
        link_others(folder, copy, without=files)
        for file in files:
            shutil.copyfile(folder / file, copy / file)
        noisy = Perturbed(copy, native)
        for kind in noisy.kinds:
            noisy.spoil(kind)
        yield noisy


def accepts_less(written: float, noise: float) -> bool | None:
    """Whether noise accepts less than the heads that were written, by their CAR_1; None where those hardly accept."""
    return noise < written if written >= LEAST else None
