"""Families of native MTP checkpoints, a small table each: the `FAMILY` of every file here is registered."""

from importlib import import_module
from pkgutil import iter_modules

from mtpd.formats.family import FAMILIES, register

__all__ = ["FAMILIES"]

for _file in iter_modules(__path__):
    register(import_module(f"{__name__}.{_file.name}").FAMILY)
