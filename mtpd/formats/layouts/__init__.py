"""Layouts that `mtpd export` writes, a file each of the layout's name: the `LAYOUT` of every file is registered."""

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from mtpd.errors import UserError
from mtpd.formats.layout import LAYOUTS, Layout, register

__all__ = ["LAYOUTS", "layout_of"]

for _file in iter_modules(__path__):
    register(import_module(f"{__name__}.{_file.name}").LAYOUT)


def layout_of(says: Mapping[str, Any]) -> Layout:
    """The layout that the `mtpd.json` of an export names.

    Raises:
        UserError: it is not registered here.
    """
    name = str(says["layout"])
    if name not in LAYOUTS:
        raise UserError(f"layout: {name} is not known; accepted: {', '.join(LAYOUTS)}, or what a package registers")
    return LAYOUTS[name]
