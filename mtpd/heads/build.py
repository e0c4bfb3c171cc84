"""New heads from a recipe: configured for a trunk, built, and given their first weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from mtpd.errors import UserError
from mtpd.heads.base import Heads
from mtpd.heads.config import HeadsConfig
from mtpd.heads.kinds import KINDS
from mtpd.heads.shared_layers import start as shared_layers
from mtpd.heads.shared_layers.heads import SharedLayerHeads
from mtpd.trunk import Trunk


def class_of(kind: str) -> type[Heads]:
    """Imports the class of a kind of heads."""
    module, _, name = KINDS[kind].heads.partition(":")
    found: type[Heads] = getattr(import_module(module), name)
    return found


def build_heads(trunk: Trunk, config: HeadsConfig, *, device: torch.device | None = None) -> Heads:
    """Builds heads of the kind that `config` names, with weights yet to be set.

    They get real weights whatever is around: a sharding or meta-device context of the caller would
    leave them without elements.

    Args:
        device: None is where the trunk is.
    """
    with torch.device(trunk.device if device is None else device):
        heads = class_of(config.kind).build(trunk, config)
        return SharedLayerHeads(trunk, config, heads) if config.shared_layers else heads


def empty_heads(trunk: Trunk, config: HeadsConfig) -> Heads:
    """Builds heads whose parameters have shapes alone, for `fill_heads`."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return build_heads(trunk, config)


def fill_heads(
    heads: Heads, read: Callable[[str], Tensor], *, device: torch.device, dtype: torch.dtype = torch.float32
) -> Heads:
    """Gives empty heads their weights, one tensor at a time: they are there once, in one number format.

    Args:
        read: gives a tensor of their state by its name, and of its shape.
        dtype: number format of the parameters.
    """
    new = {
        id(empty): nn.Parameter(read(name).to(device, dtype, copy=True), requires_grad=empty.requires_grad)
        for name, empty in heads.named_parameters()
    }
    for module in heads.modules():
        for name, parameter in module._parameters.items():
            # Adapted heads and those they adapt have one and the same dictionary.
            if parameter is not None:
                module._parameters[name] = new.get(id(parameter), parameter)
    buffers = dict(heads.named_buffers())
    for name in heads.state_dict().keys() & buffers.keys():
        buffers[name].copy_(read(name))
    return heads.to(dtype)


def copy_heads(heads: Heads, dtype: torch.dtype) -> Heads:
    """Copies heads in another number format, one tensor at a time: they are never there twice in their own."""
    tensors = [*heads.parameters(), *heads.buffers()]
    cast = {
        id(each): each.detach().to(dtype if each.is_floating_point() else each.dtype, copy=True) for each in tensors
    }
    for parameter in heads.parameters():
        cast[id(parameter)] = nn.Parameter(cast[id(parameter)], requires_grad=parameter.requires_grad)
    return copy.deepcopy(heads, cast)


def configure_heads(settings: Mapping[str, Any], trunk: Trunk, *, vocabulary: int, fingerprint: str) -> HeadsConfig:
    """Works out what a recipe means for this trunk.

    Args:
        settings: the `heads` section of a recipe.
        vocabulary: tokens of the draft vocabulary, 0 for all.
        fingerprint: of the trunk.

    Raises:
        UserError: a key that the kind does not read, or a value that it does not take.
    """
    kind = settings["kind"]
    for name, other in KINDS.items():
        fields = {} if other.section is None else other.section.model_fields
        for key, value in settings[name].items() if fields else ():
            if kind != name and value not in (None, fields[key].default):
                raise UserError(
                    f"heads.{name}.{key}: {value} does nothing with heads.kind: {kind}; accepted: kind: {name}"
                )
        for key in sorted(other.keys - KINDS[kind].keys):
            if settings[key]:
                raise UserError(
                    f"heads.{key}: {_shown(settings[key])} does nothing with heads.kind: {kind}; accepted: "
                    f"{_shown(type(settings[key])())}, or kind: {name}"
                )
    if settings["source"] is not None and settings["init"] is not None:
        raise UserError(
            f"heads.init: {settings['init']} does nothing with heads.source, which says how heads start; accepted: null"
        )
    common = {"kind": kind, "depth": settings["depth"], "hidden_size": trunk.hidden_size}
    common |= shared_layers.configure(settings, trunk)
    tokens = trunk.tokens or trunk.unembedding.weight.shape[0]
    own = _start_of(kind).configure({**settings, "columns": vocabulary or tokens}, trunk)
    return HeadsConfig(**common, **own, vocabulary_size=vocabulary, trunk=fingerprint)


def start_heads(
    heads: Heads,
    trunk: Trunk,
    start: str | None,
    batches: Callable[[], Iterable[dict[str, Any]]],
    *,
    seed: int = 0,
    source: Heads | None = None,
) -> None:
    """Gives new heads their first weights.

    Args:
        start: `heads.init` of a recipe; None is what the kind prefers.
        batches: gives rows with `hidden`, the states that the heads read, for starts that are fitted; called for those
            alone.
        seed: of the random parts.
        source: other heads of the trunk to start from, instead.

    Raises:
        UserError: the source is none that this kind can start from.
    """
    kind = heads.config.kind
    first = _start_of(kind)
    if isinstance(heads, SharedLayerHeads):
        shared_layers.initialise(heads, seed=seed)
        batches = shared_layers.fitting(heads, trunk, batches)
        heads = heads.inner
    if source is not None:
        if not hasattr(first, "adopt"):
            accepted = ", ".join(name for name in KINDS if hasattr(_start_of(name), "adopt"))
            raise UserError(f"heads.source: heads of kind {kind} start from no others; accepted: {accepted}")
        first.adopt(heads, trunk, source, seed=seed)
        return
    if first.initialise(heads, trunk, start, seed=seed):
        first.fit(heads, trunk, batches())


def _start_of(kind: str) -> Any:
    """Imports the module that starts heads of a kind."""
    return import_module(KINDS[kind].start)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
