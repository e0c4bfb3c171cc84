"""How a decoder layer's tensors are called in a checkpoint, and how its module calls them.

They differ where transformers keeps the experts of a layer in one tensor and checkpoints keep one tensor
for each, and where it renames some. transformers' own table says how (`conversion_mapping`); it is read
here in both directions over tensors that stay in their files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
)

from mtpd.formats.tensors import Stored, joined, part

PLACE = "model.layers.0."
"""Patterns of the table are written for whole names: a layer's tensors get this before them."""

Tensors = dict[str, Stored]


@dataclass(frozen=True)
class _Experts:
    """One tensor of all experts, and the names of its parts with `*` for the expert's number."""

    whole: str
    parts: tuple[str, ...]


def to_module(model_type: str, tensors: Mapping[str, Stored]) -> Tensors:
    """A layer's tensors as its module has them; those that are so already stay as they are.

    Args:
        tensors: by name behind the layer's prefix.
    """
    renamings, experts = _table(model_type)
    named = {_renamed(name, renamings): tensor for name, tensor in tensors.items()}
    for group in experts:
        found = [_numbered(named, pattern) for pattern in group.parts]
        numbers = sorted(found[0])
        if not numbers or any(sorted(each) != numbers for each in found) or numbers != list(range(len(numbers))):
            continue
        pieces = [named.pop(each[number]) for number in numbers for each in found]
        rows = sum(piece.shape[0] for piece in pieces[: len(found)])
        named[group.whole] = joined(pieces, (len(numbers), rows, *pieces[0].shape[1:]))
    return named


def to_checkpoint(model_type: str, tensors: Mapping[str, Stored]) -> Tensors:
    """The way back: a layer's tensors as checkpoints have them."""
    renamings, experts = _table(model_type)
    named: Tensors = {}
    wholes = {group.whole: group for group in experts}
    for name, tensor in tensors.items():
        if name not in wholes or len(tensor.shape) != 3:
            named[name] = tensor
            continue
        group = wholes[name]
        count, rows, *rest = tensor.shape
        shape = (rows // len(group.parts), *rest)
        size = math.prod(shape)
        for number in range(count):
            for index, pattern in enumerate(group.parts):
                start = (number * len(group.parts) + index) * size
                named[pattern.replace("*", str(number))] = part(tensor, start, shape)
    back = [renaming.reverse_transform() for renaming in reversed(renamings)]
    return {_renamed(name, back): tensor for name, tensor in named.items()}


def _table(model_type: str) -> tuple[list[Any], list[_Experts]]:
    mapping = get_checkpoint_conversion_mapping(model_type) or []
    renamings = [
        each
        for each in mapping
        if isinstance(each, WeightRenaming) and not isinstance(each, PrefixChange) and type(each) is WeightRenaming
    ]
    experts = [
        _Experts(each.target_patterns[0], tuple(each._original_source_patterns))
        for each in mapping
        if isinstance(each, WeightConverter) and _stacks_rows(each)
    ]
    return renamings, experts


def _stacks_rows(converter: WeightConverter) -> bool:
    """Whether a conversion only puts matrices below each other: then the bytes stay in their order."""
    if len(converter.target_patterns) != 1:
        return False
    kinds = [(type(each), getattr(each, "dim", None)) for each in converter.operations]
    return kinds in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])


def _renamed(name: str, renamings: list[Any]) -> str:
    renamed = apply_renamings(PLACE + name, renamings)
    return renamed.removeprefix(PLACE) if renamed.startswith(PLACE) else name


def _numbered(tensors: Mapping[str, Stored], pattern: str) -> dict[int, str]:
    expression = re.compile(re.escape(pattern).replace(re.escape("*"), r"(\d+)"))
    return {int(match[1]): name for name in tensors if (match := expression.fullmatch(name))}
