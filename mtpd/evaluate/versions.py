"""Versions of the libraries that a number depends on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

NAMES = ("mtpd", "torch", "transformers", "trl", "datasets", "deepspeed", "peft")


def library_versions() -> dict[str, str]:
    """Version of Python and of each library that is installed."""
    found = {"python": platform.python_version()}
    for name in NAMES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
