"""Quantised layers as heads see them: the matrix that a layer multiplies with, whatever a library keeps in its place.

Weights of a quantised checkpoint lie in memory as packed whole numbers, as blocks with scales, or as tensors of a
class of their own, in a form that each library may change. None of these forms is read here: a layer is asked for its
products with unit vectors, and those are the columns of its matrix. So nothing is copied raw, and a new form needs no
code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ROWS = 4096
"""Unit vectors that a layer is given at a time."""


def is_quantised(module: nn.Module) -> bool:
    """Whether a linear layer or an embedding has something else than an ordinary matrix, and perhaps a bias."""
    names = {name for name, _ in module.named_parameters(recurse=False)}
    return not (_ordinary(getattr(module, "weight", None)) and names <= {"weight", "bias"})


def has_quantised(model: nn.Module) -> bool:
    """Whether any linear layer or embedding of a model is quantised."""
    return any(
        is_quantised(module)
        for module in model.modules()
        if hasattr(module, "in_features") or isinstance(module, nn.Embedding)
        # What adapters wrap is looked at by itself.
        if not hasattr(module, "base_layer")
    )


def rows_of(module: Any) -> int:
    """Outputs of an output head, or tokens of an embedding."""
    if not is_quantised(module):
        return int(module.weight.shape[0])
    return int(module.num_embeddings if isinstance(module, nn.Embedding) else module.out_features)


@torch.no_grad()
def cast_ordinary(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts what is not quantised, in place; loaders leave it in the number format of the files.

    Scales, and matrices of FP8 numbers, must not be cast with it.
    """
    for module in model.modules():
        if not (hasattr(module, "in_features") and is_quantised(module)):
            for parameter in module.parameters(recurse=False):
                if _ordinary(parameter):
                    parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def matrix(module: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Gives the matrix [out, in] that a linear layer multiplies with, quantised or not.

    Args:
        dtype: of what the layer is given where its matrix has to be asked for.
    """
    weight: Any = getattr(module, "weight", None)
    if _ordinary(weight) and tuple(weight.shape) == (module.out_features, module.in_features):
        return weight.detach()
    bias, size = getattr(module, "bias", None), int(module.in_features)
    try:
        # A matrix plus a bias would be rounded.
        module.bias = None
        eye = torch.eye(size, dtype=dtype, device=device)
        return torch.cat([module(part) for part in eye.split(ROWS)]).T.contiguous()
    finally:
        module.bias = bias


def shapes(layer: nn.Module, like: nn.Module) -> dict[str, torch.Size]:
    """Shapes of a layer's parameters as an unquantised layer of its kind has them; those of adapters are left out.

    Args:
        like: an unquantised layer, which says what is a linear layer.
    """
    packed = _packed(layer, like)
    found = {
        # A parameter that is partitioned over processes has no elements; DeepSpeed keeps what it had.
        name.replace(".base_layer", ""): getattr(parameter, "ds_shape", parameter.shape)
        for name, parameter in layer.named_parameters()
        if "lora_" not in name
    }
    found = {name: shape for name, shape in found.items() if name.rpartition(".")[0] not in packed}
    for name, module in packed.items():
        found[f"{name}.weight"] = torch.Size((module.out_features, module.in_features))
        if getattr(module, "bias", None) is not None:
            found[f"{name}.bias"] = module.bias.shape
    return found


def weights(layer: nn.Module, like: nn.Module, *, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Weights of a layer as an unquantised layer of its kind loads them; arguments as for `shapes` and `matrix`."""
    packed = _packed(layer, like)
    if not packed:
        return dict(layer.state_dict())
    # Not its state_dict(): to give it, bitsandbytes packs its weights anew, and on CPUs not to the same numbers.
    wanted = set(like.state_dict())
    found = {
        name: value.detach()
        for name, value in (*layer.named_parameters(), *layer.named_buffers())
        if name in wanted and name.rpartition(".")[0] not in packed
    }
    for name, module in packed.items():
        found[f"{name}.weight"] = matrix(module, dtype=dtype, device=device)
        if getattr(module, "bias", None) is not None:
            found[f"{name}.bias"] = module.bias.detach()
    return found


@contextmanager
def lent(layer: nn.Module, block: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Puts the quantised parts of a layer into an unquantised layer of its kind, for good: the two then round alike.

    Within it, gives for each part what the matrix that was there makes of its inputs, and what the part itself does.
    """
    products: dict[str, tuple[Tensor, Tensor]] = {}

    def comparing(name: str, plain: nn.Module) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            products[name] = plain(inputs[0]), output

        return hook

    hooks = []
    for name, module in _packed(layer, block).items():
        hooks.append(module.register_forward_hook(comparing(name, block.get_submodule(name))))
        block.set_submodule(name, module)
    try:
        yield products
    finally:
        for each in hooks:
            each.remove()


def _packed(layer: nn.Module, like: nn.Module) -> dict[str, Any]:
    """The quantised linear layers of `layer` by their names in `like`."""
    found = {}
    for name, module in like.named_modules():
        if isinstance(module, nn.Linear):
            own: Any = layer
            for step in name.split("."):
                own = getattr(own, step, None)
            own = getattr(own, "base_layer", own)
            if own is not None and is_quantised(own) and hasattr(own, "in_features"):
                found[name] = own
    return found


def _ordinary(weight: Any) -> bool:
    # Libraries make classes of their own for tensors, which say that they are of an ordinary number format.
    return type(weight) in (nn.Parameter, Tensor) and weight.dtype in FLOATS
