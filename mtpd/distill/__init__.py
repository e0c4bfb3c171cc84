"""From a recipe to trained and measured heads. `distill` is imported when it is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtpd.distill.run import distill

__all__ = ["distill"]


def __getattr__(name: str) -> Any:
    if name != "distill":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mtpd.distill.run import distill

    return distill
