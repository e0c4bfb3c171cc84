"""Heads of mtpd as tensors of a family: the way back of `native.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mtpd.errors import UserError
from mtpd.formats.family import Family
from mtpd.formats.find_heads import BLOCK, halves_swapped, stacked
from mtpd.formats.layer_names import Tensors, to_checkpoint
from mtpd.formats.tensors import Stored


def by_depth(tensors: Mapping[str, Stored], blocks: Sequence[int]) -> Tensors:
    """A block for each depth, shared ones written out as often as they are used.

    Args:
        blocks: by depth, the number of its block.
    """
    found: Tensors = {}
    for depth, block in enumerate(blocks):
        prefix = f"layers.{block}."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        found |= {f"layers.{depth}.{name}": tensor for name, tensor in own.items()}
    return found


def first_heads(tensors: Mapping[str, Stored], count: int) -> Tensors:
    """The tensors of the first `count` heads."""
    kept = tuple(f"layers.{index}." for index in range(count))
    return {name: tensor for name, tensor in tensors.items() if name.startswith(kept)}


def as_family(
    tensors: Mapping[str, Stored],
    family: Family,
    *,
    heads: int,
    layers: int,
    model_type: str = "",
    per_head: int = 1,
) -> Tensors:
    """The family's names and arrangement of the tensors of heads.

    Args:
        tensors: as `mtpd.heads` names and arranges them.
        heads: how many there are.
        layers: of the base.
        model_type: of the base, to spell its layers; "" leaves them as modules have them.
        per_head: sub-layers of a head.

    Raises:
        UserError: the family has one tensor for all heads, and theirs differ.
    """
    spelled: Tensors = {name: tensor for name, tensor in tensors.items() if f".{BLOCK}" not in name}
    for index in range(heads):
        prefix = f"layers.{index}.{BLOCK}"
        layer = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        spelled |= {prefix + name: tensor for name, tensor in to_checkpoint(model_type, layer).items()}
    if family.order == "hidden":
        spelled = {
            name: halves_swapped(tensor) if name.endswith(".project.weight") else tensor
            for name, tensor in spelled.items()
        }
    if family.stacked is not None:
        spelled[family.stacked] = stacked(spelled, heads)
    named = family.to_checkpoint(spelled, heads=heads, layers=layers, per_head=per_head)
    found: Tensors = {}
    for ours, theirs in named.items():
        if theirs in found and not found[theirs].same(spelled[ours]):
            raise UserError(
                f"{family.name}: has one {theirs} for all heads, and the heads have different ones; accepted: heads "
                "that share a block (heads.shared=true), or one head"
            )
        found[theirs] = spelled[ours]
    return found
