"""A pretended CUDA device: tensors that say they are on cuda:0, and compute on the CPU.

What runs on it is held to the rules of a real one. All tensors of an operator have to be on one device, but for numbers
(tensors without dimensions), copies and indices. It is counted what costs time there: kernels that are launched, and
points at which the host waits for the device. Backward passes are not in it: the engine of autograd wants a real
device, and zeros stand for gradients.

    with pretended_cuda() as counts:
        trunk.to(CUDA)
        ...
        counts.syncs.total()
"""

from __future__ import annotations

import collections
import ctypes
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.cuda.amp.common
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda:0")
VIEWS = frozenset(
    [
        "_conj",
        "_reshape_alias",
        "_unsafe_view",
        "alias",
        "as_strided",
        "chunk",
        "detach",
        "diagonal",
        "expand",
        "flatten",
        "is_same_size",
        "lift_fresh",
        "movedim",
        "narrow",
        "numel",
        "permute",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "sym_size",
        "t",
        "transpose",
        "unbind",
        "unflatten",
        "unfold",
        "unsqueeze",
        "view",
        "view_as",
    ]
)
EMPTY = frozenset(["empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"])
CROSSING = frozenset(
    ["_local_scalar_dense", "_pin_memory", "_to_copy", "copy_", "index", "is_pinned", "pin_memory", "set_"]
)
"""Operators whose tensors may be on two devices."""
PUTTING = frozenset(["_index_put_impl_", "index_put", "index_put_"])
WAITING = frozenset(
    [
        "_local_scalar_dense",
        "_unique2",
        "equal",
        "is_nonzero",
        "masked_select",
        "nonzero",
        "unique_consecutive",
        "unique_dim",
    ]
)
"""Operators whose result the host has to know."""


@dataclass
class Counts:
    """Costs since the device was there, or since `reset`."""

    launches: collections.Counter[str] = field(default_factory=collections.Counter)
    """By operator."""
    syncs: collections.Counter[str] = field(default_factory=collections.Counter)
    """By operator."""
    places: collections.Counter[str] = field(default_factory=collections.Counter)
    """Synchronisations by the line of mtpd that they are of."""
    muted: int = 0

    def reset(self) -> None:
        for counter in (self.launches, self.syncs, self.places):
            counter.clear()

    def launch(self, name: str) -> None:
        if not self.muted:
            self.launches[name] += 1

    def wait(self, name: str) -> None:
        if not self.muted:
            self.syncs[name] += 1
            self.places[_place()] += 1


class OnDevice(Tensor):
    """A tensor of the pretended device around one of the CPU."""

    inside: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls: Any, inside: Tensor) -> Any:
        made = Tensor._make_wrapper_subclass(
            cls,
            inside.shape,
            strides=inside.stride(),
            storage_offset=inside.storage_offset(),
            dtype=inside.dtype,
            layout=inside.layout,
            device=CUDA,
            requires_grad=False,
        )
        made.inside = inside
        return made

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_counts = Counts()


def _place() -> str:
    """The line of mtpd that is running."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/mtpd/" in name and "/site-packages/" not in name and "/tests/" not in name:
            return f"{name.rpartition('/mtpd/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def _on_device(value: Any) -> bool:
    return isinstance(value, OnDevice)


def _inside(value: Any) -> Any:
    return value.inside if _on_device(value) else value


def _outside(value: Any) -> Any:
    return OnDevice(value) if isinstance(value, Tensor) and not _on_device(value) else value


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket.__name__
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    device = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    of_device = any(map(_on_device, tensors))
    goes_there = device is not None and device.type == "cuda"
    if not of_device and not goes_there:
        return func(*args, **kwargs)
    _check_devices(func, name, args, tensors)
    given = tree_map(_inside, (args, kwargs if device is None else {**kwargs, "device": torch.device("cpu")}))
    if name == "histc" and not given[0][0].is_floating_point():
        # Of whole numbers a GPU can do it, and a CPU cannot.
        result = func(given[0][0].float(), *given[0][1:], **given[1]).to(given[0][0].dtype)
    else:
        result = func(*given[0], **given[1])
    if _waits(name, args, kwargs, device):
        _counts.wait(name)
    if name not in VIEWS | EMPTY | {"_local_scalar_dense"}:
        _counts.launch(name)
    if device is not None and device.type == "cpu":
        return result
    written = _written(func, args, kwargs)
    return tree_map(_outside, result) if written is None else written


def _check_devices(func: Any, name: str, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    """Raises RuntimeError for tensors of two devices where a real device would."""
    there = [tensor for tensor in tensors if _on_device(tensor)]
    here = [tensor for tensor in tensors if not _on_device(tensor) and tensor.dim()]
    if name in PUTTING:
        # Indices may be anywhere.
        here = [args[2]] if not _on_device(args[2]) and args[2].dim() else []
    elif name in CROSSING:
        here = []
    if there and here:
        shapes = [tuple(tensor.shape) for tensor in here]
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {func} at {_place()} has some of the CPU: {shapes}"
        )


def _waits(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device | None) -> bool:
    """Whether the host waits for the device here."""
    if name == "_to_copy":
        crosses = device is not None and _on_device(args[0]) != (device.type == "cuda")
        # What goes there may be on its way while the host goes on; what comes from there has to have come.
        return crosses and (_on_device(args[0]) or not kwargs.get("non_blocking"))
    if name == "copy_":
        # What is copied into pinned memory comes while the host goes on; an event says when it is there.
        beside = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        return not beside and _on_device(args[0]) != _on_device(args[1])
    if name == "index" or name in PUTTING:
        indices = [index for index in args[1] if index is not None]
        return any(index.dtype in (torch.bool, torch.uint8) or not _on_device(index) for index in indices)
    return name in WAITING


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operator was given to write into and gives back; None where it makes something new."""
    schema = func._schema
    if not any(each.alias_info is not None and each.alias_info.is_write for each in schema.returns):
        return None
    places = [
        at for at, each in enumerate(schema.arguments) if each.alias_info is not None and each.alias_info.is_write
    ]
    given = [args[at] if at < len(args) else kwargs[schema.arguments[at].name] for at in places]
    return given[0] if len(given) == 1 else tuple(given)


class _Stream:
    """One that has nothing to do, and an event in it."""

    def __init__(self, device: Any = None) -> None:
        self.device = device

    def wait_stream(self, other: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        _counts.wait("synchronize")


@contextmanager
def pretended_cuda() -> Iterator[Counts]:
    """Within it there is the device. Tensors of it are of no use afterwards."""
    global _counts
    _counts = Counts()
    with ExitStack() as stack:
        for target, name, value in _replacements():
            stack.enter_context(mock.patch.object(target, name, value))
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        stack.enter_context(_guard())
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(_Mode())
        yield _counts


@contextmanager
def _guard() -> Iterator[None]:
    """A CPU build of PyTorch has nothing that sets the current device of CUDA: that of meta tensors does nothing."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    table = (ctypes.c_void_p * 22).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 9
    assert table[cuda] is None, "this PyTorch is built with CUDA"
    table[cuda] = table[meta] or table[0]
    try:
        yield
    finally:
        table[cuda] = None


def _replacements() -> list[tuple[Any, str, Any]]:
    """Functions that a pretended device needs in the place of PyTorch's."""
    new, tolist, grad, empty = Tensor.new_tensor, Tensor.tolist, torch.autograd.grad, torch.empty
    attention = torch.nn.functional.scaled_dot_product_attention

    def new_tensor(self: Tensor, data: Any, **options: Any) -> Tensor:
        if not _on_device(self):
            return new(self, data, **options)
        return torch.tensor(data, **{"dtype": self.dtype, "device": CUDA, **options})

    def to_list(self: Tensor) -> Any:
        if not _on_device(self):
            return tolist(self)
        _counts.wait("tolist")
        return tolist(_inside(self))

    def gradients(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        wanted = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        if not any(map(_on_device, wanted)):
            return grad(outputs, inputs, *args, **kwargs)
        return tuple(torch.zeros_like(each.detach()) for each in wanted)

    def one_kernel(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not _on_device(query):
            return attention(query, *args, **kwargs)
        _counts.launch("attention with a mask" if kwargs.get("attn_mask") is not None else "attention")
        _counts.muted += 1
        try:
            return attention(query, *args, **kwargs)
        finally:
            _counts.muted -= 1

    def unpinned(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        return empty(*size, **options)

    return [
        (torch, "empty", unpinned),
        (torch.cuda, "Stream", _Stream),
        (torch.cuda, "Event", _Stream),
        (torch.cuda, "current_stream", _Stream),
        (torch.cuda, "stream", nullcontext),
        (Tensor, "record_stream", lambda self, stream: None),
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "is_bf16_supported", lambda including_emulation=True: True),
        (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (Tensor, "new_tensor", new_tensor),
        (Tensor, "tolist", to_list),
        (torch.autograd, "grad", gradients),
        (torch.nn.functional, "scaled_dot_product_attention", one_kernel),
    ]
