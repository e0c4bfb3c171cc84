"""LoRA adapters (arXiv 2106.09685) in heads, by PEFT: a depth that shares a block and owns little more than nothing.

An adapted head is a second tree of modules around the same parameters, with PEFT's layers in place of the linear ones.
The block itself has no adapter and computes what it always did.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

ALPHA = 2
"""lora_alpha as a multiple of the rank: what an adapter adds is multiplied with it."""


def adapted(head: nn.Module, rank: int) -> Any:
    """Makes a head around the parameters of another, with an adapter of this rank in every linear layer.

    It computes what the other one does until the adapter is trained. The shared parameters are frozen by this.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds to import

    twin = _around(head)
    names = sorted({name for name, module in head.named_modules() if type(module) is nn.Linear})
    assert names, "a head without linear layers"
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=ALPHA * rank, target_modules=names), twin)
    return twin


def without_adapter(head: nn.Module) -> nn.Module:
    """Copies a head and merges its adapter into the copy's parameters: W + s B A."""
    from peft.tuners.lora import LoraLayer

    plain = copy.deepcopy(head)
    for name, module in list(plain.named_modules()):
        if isinstance(module, LoraLayer):
            layer: Any = module
            layer.merge()
            plain.set_submodule(name, layer.get_base_layer())
    for attribute in ("peft_config", "active_adapter"):
        plain.__dict__.pop(attribute, None)
    return plain.requires_grad_(True)


def _around(module: nn.Module) -> nn.Module:
    """Copies the tree of modules around the same parameters and buffers."""
    twin = copy.copy(module)
    twin.__dict__["_modules"] = {
        name: child if child is None else _around(child) for name, child in module._modules.items()
    }
    return twin


def saved_once(module: nn.Module) -> None:
    """Makes a module's state have each tensor that several submodules share once, under its first name."""
    module.register_state_dict_post_hook(_drop_repeated)
    module.register_load_state_dict_pre_hook(_repeat)


def _repeated(module: nn.Module) -> dict[str, str]:
    """Maps further names of shared parameters and buffers to the first name of the same tensor."""
    first: dict[int, str] = {}
    repeated = {}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        if first.setdefault(id(tensor), name) != name:
            repeated[name] = first[id(tensor)]
    return repeated


def _drop_repeated(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in _repeated(module):
        state.pop(prefix + name, None)


def _repeat(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, first in _repeated(module).items():
        if prefix + first in state:
            state.setdefault(prefix + name, state[prefix + first])
