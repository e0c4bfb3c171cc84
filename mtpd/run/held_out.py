"""Which held-out prompts are measured on, and which choose among checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mtpd.data.packing import Sample
from mtpd.errors import UserError
from mtpd.recipe import Recipe


def set_apart(recipe: Recipe, samples: Sequence[Sample], apart: frozenset[str]) -> tuple[list[Sample], list[Sample]]:
    """Samples to measure the finished heads on, and those that choose among checkpoints while training.

    None is in both: heads chosen for their tau on some prompts look better on them than they are.

    Raises:
        UserError: nothing would be left to measure on.
    """
    if not recipe.evaluation.steps:
        return list(samples), []
    held_out = [sample for sample in samples if sample.family not in apart]
    chosen = spread(held_out, recipe.evaluation.steps_prompts)
    if len(chosen) == len(held_out):
        raise UserError(
            f"evaluation.steps_prompts: {recipe.evaluation.steps_prompts} of {len(held_out)} measured prompts leave "
            f"none to measure the finished heads on; accepted: less than {len(held_out)}"
        )
    names = {sample.id for sample in chosen}
    return [sample for sample in samples if sample.id not in names], chosen


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items, taken in turns from each family so that all are represented."""
    families: dict[str, list[Any]] = {}
    for item in items:
        families.setdefault(item.family, []).append(item)
    turns = [
        family[turn]
        for turn in range(max(map(len, families.values()), default=0))
        for family in families.values()
        if turn < len(family)
    ]
    return turns[:count]
