"""Heads that draft tokens: a folder for each kind, and what all of them share.

Names are imported when they are first used: recipes read `kinds.py`, which needs no PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mtpd.heads.chain.config import KIND as CHAIN
from mtpd.heads.circuit.config import KIND as CIRCUIT
from mtpd.heads.kinds import KINDS, Kind, register
from mtpd.heads.medusa.config import KIND as MEDUSA
from mtpd.heads.parallel.config import KIND as PARALLEL

if TYPE_CHECKING:
    from mtpd.heads.base import Batch, Heads, Readout
    from mtpd.heads.build import (
        build_heads,
        class_of,
        configure_heads,
        copy_heads,
        empty_heads,
        fill_heads,
        start_heads,
    )
    from mtpd.heads.config import CONFIG, WEIGHTS, HeadsConfig, read_config
    from mtpd.heads.saved import check_weights, load_heads, restore_heads, save_heads

__all__ = [
    "CONFIG",
    "KINDS",
    "WEIGHTS",
    "Batch",
    "Heads",
    "HeadsConfig",
    "Kind",
    "Readout",
    "build_heads",
    "check_weights",
    "class_of",
    "configure_heads",
    "copy_heads",
    "empty_heads",
    "fill_heads",
    "load_heads",
    "read_config",
    "register",
    "restore_heads",
    "save_heads",
    "start_heads",
]

for _kind in (CHAIN, PARALLEL, MEDUSA, CIRCUIT):
    register(_kind)

_HOMES = {
    **dict.fromkeys(("Batch", "Heads", "Readout"), "mtpd.heads.base"),
    **dict.fromkeys(
        ("build_heads", "class_of", "configure_heads", "copy_heads", "empty_heads", "fill_heads", "start_heads"),
        "mtpd.heads.build",
    ),
    **dict.fromkeys(("CONFIG", "WEIGHTS", "HeadsConfig", "read_config"), "mtpd.heads.config"),
    **dict.fromkeys(("check_weights", "load_heads", "restore_heads", "save_heads"), "mtpd.heads.saved"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
