"""The base of all settings that a recipe has. It stands below recipes and heads, and needs no PyTorch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

LARGEST = 10**9
"""No count of anything here is larger, and what computes with it has 64 bits."""


class Section(BaseModel):
    """Settings of all parts of a recipe: no unknown keys, no coercion, no NaN or infinity, no changes later."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
