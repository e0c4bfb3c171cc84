"""Files that appear whole or not at all, and fingerprints of what is in them.

JSON files of a run are sealed: beside their content they have its SHA-256, so that a damaged one is told from a
whole one by itself, without a second file that would have to change together with it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mtpd.errors import MtpdError, UserError

CACHE = Path.home() / ".cache" / "mtpd"
"""What is made once on a machine and can be made again."""
PARTIAL = ".partial"
"""End of the names of files that are being written."""
OLD = 60.0
"""Seconds after which a file that is being written counts as left behind."""
SEAL = "sha256"
"""The key of a JSON object under which the SHA-256 of the rest of it stands."""


@contextmanager
def writing(path: str | Path, *, needed: int | None = None) -> Iterator[None]:
    """Turns an operating-system error under it (no room, no permission) into one line that names the file.

    Args:
        needed: bytes that are written, named where there is no room for them.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        room = f" ({'' if needed is None else f'{megabytes(needed)} needed, '}{free_space(path)})" if full else ""
        raise MtpdError(f"{path}: cannot write: {error.strerror or error}{room}") from error


def megabytes(count: int) -> str:
    """Bytes as people compare them with a disk: 12.3 MB, 1,234 MB"""
    return f"{count / 1e6:,.0f} MB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def free_space(path: str | Path) -> str:
    """Says what the disk of a path has left; the path need not be there."""
    place = Path(path).absolute()
    nearest = next(each for each in (place, *place.parents) if each.exists())
    try:
        return f"{megabytes(shutil.disk_usage(nearest).free)} free"
    except OSError:
        return "free space unknown"


def write_whole(path: str | Path, content: bytes | str) -> None:
    """Writes a file that appears whole or not at all: a reader sees the old content or the new one.

    Raises:
        MtpdError: the disk is full, or the folder cannot be written to.
    """
    data = content.encode() if isinstance(content, str) else content
    with written_whole(path, needed=len(data)) as beside:
        beside.write_bytes(data)


@contextmanager
def written_whole(path: str | Path, *, needed: int | None = None) -> Iterator[Path]:
    """A place to write a file in, which then takes the place of what `path` was: whole, or not at all.

    Args:
        needed: bytes, for the message where they have no room.

    Raises:
        MtpdError: the disk is full, or the folder cannot be written to.
    """
    path = Path(path)
    with writing(path, needed=needed):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
        os.close(handle)
        beside = Path(name)
        try:
            yield beside
            with open(beside, "rb+") as file:
                os.fsync(file.fileno())
            # mkstemp makes files that only their owner can read; these are ordinary ones.
            os.chmod(beside, 0o666 & ~_umask())
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        sync(path.parent)


@contextmanager
def tensors_written(path: str | Path, tensors: Mapping[str, Any], metadata: dict[str, str]) -> Iterator[Path]:
    """`written_whole` of a safetensors file, without a copy of the tensors in memory; within it, it is written already.

    Args:
        tensors: on the CPU, by name.
    """
    from safetensors import SafetensorError  # brings in torch
    from safetensors.torch import save_file

    with written_whole(path, needed=sum(tensor.nbytes for tensor in tensors.values())) as beside:
        try:
            save_file(dict(tensors), beside, metadata=metadata)
        except SafetensorError as error:
            if os.strerror(errno.ENOSPC) in str(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise
        yield beside


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A place to write a folder in, which then takes the place of what `folder` was: whole, or not at all.

    Raises:
        MtpdError: the disk is full, or cannot be written to.
    """
    beside, before = (folder.with_name(f".{folder.name}{kind}{PARTIAL}") for kind in ("", ".before"))
    try:
        with writing(folder):
            for left in (beside, before):
                shutil.rmtree(left, ignore_errors=True)
            beside.mkdir(parents=True)
            yield beside
            for file in (path for path in beside.rglob("*") if path.is_file()):
                sync(file)
            # Deleted where it is, it would be half a folder for a while.
            if folder.exists():
                folder.rename(before)
            beside.rename(folder)
            sync(folder.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    shutil.rmtree(before, ignore_errors=True)


def is_empty(folder: str | Path) -> bool:
    """Whether a folder is missing, or holds nothing but what a killed process left half-written."""
    return not Path(folder).is_dir() or all(path.name.endswith(PARTIAL) for path in Path(folder).iterdir())


def sweep(folder: str | Path) -> None:
    """Deletes what processes that were killed left behind half-written, in a folder and those in it."""
    for left in Path(folder).rglob(f".*{PARTIAL}"):
        # Another process may be writing right now.
        if left.is_file() and time.time() - left.stat().st_mtime > OLD:
            left.unlink(missing_ok=True)


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the SHA-256 of its content under `sha256`, as the last key."""
    return {**content, SEAL: fingerprint_json(content)}


def intact(content: Mapping[str, Any]) -> bool:
    """Whether a JSON object is the one that was sealed; one without a seal counts as intact."""
    return SEAL not in content or content[SEAL] == fingerprint_json(_unsealed(content))


def read_sealed(path: str | Path, *, refusal: str) -> dict[str, Any]:
    """The content of a sealed JSON file. Files without a seal, such as those of other programs, are read too.

    Args:
        refusal: what messages say of a file that is none, such as "not an acceptance file".

    Raises:
        UserError: it is missing, no JSON object, or damaged.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}): {refusal}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {refusal}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: {refusal}: it holds no JSON object")
    if not intact(content):
        raise UserError(
            f"{path}: {refusal}: it is damaged or was edited, its SHA-256 is not that of its content; restore it, or "
            f"delete it and make it anew (edited on purpose: take the key {SEAL} out)"
        )
    return _unsealed(content)


def _unsealed(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != SEAL}


def sync(path: str | Path) -> None:
    """Makes a file, or the renames in a folder, durable. Nothing happens on systems that cannot do that with a folder.

    Raises:
        OSError: the disk fails.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
    finally:
        os.close(handle)


def escapes(value: str, folder: Path) -> bool:
    """Whether a text that is taken as a path from a folder leads out of it, by itself or through links, or is a URL."""
    path = Path(value)
    if "://" in value or "\0" in value or value.startswith("~") or path.is_absolute() or ".." in path.parts:
        return True
    root, here = folder.resolve(), folder / path
    reached = [here, *(here.rglob("*") if here.is_dir() and here.resolve() != root else [])]
    return any(not each.resolve().is_relative_to(root) for each in reached)


def fingerprint(content: bytes | str) -> str:
    """SHA-256 of bytes or of text in UTF-8, 64 hexadecimal digits."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def fingerprint_json(value: Any) -> str:
    """SHA-256 of a value as JSON with sorted keys, so that equal values have equal fingerprints."""
    return fingerprint(json.dumps(value, sort_keys=True, separators=(",", ":"), default=str))


def fingerprint_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def short(digest: str) -> str:
    """The first 12 digits: enough to tell runs apart in messages and folder names."""
    return digest[:12]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
