"""Files that appear whole or not at all, and fingerprints of what is in them."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mtpd.errors import MtpdError


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turns an operating-system error under it (no room, no permission) into one line that names the file."""
    try:
        yield
    except OSError as error:
        raise MtpdError(f"{path}: cannot write: {error.strerror or error}") from error


def write_whole(path: str | Path, content: bytes | str) -> None:
    """Writes a file that appears whole or not at all: a reader sees the old content or the new one.

    Raises:
        MtpdError: the disk is full, or the folder cannot be written to.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            # mkstemp makes files that only their owner can read; these are ordinary ones.
            os.chmod(beside, 0o666 & ~_umask())
            os.replace(beside, path)
        except BaseException:
            Path(beside).unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(folder: str | Path) -> None:
    """Makes renames in a folder durable. Nothing happens on systems that cannot open a folder."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


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
