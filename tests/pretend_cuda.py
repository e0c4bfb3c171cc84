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
from collections.abc import Callable, Iterator
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

from mtpd.decode.graphs import WAITING

CUDA = torch.device("cuda:0")
VIEWS = frozenset([
    "_conj", "_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "diagonal", "expand",
    "flatten", "is_same_size", "lift_fresh", "movedim", "narrow", "numel", "permute", "select", "slice", "split",
    "split_with_sizes", "squeeze", "sym_size", "t", "transpose", "unbind", "unflatten", "unfold", "unsqueeze",
    "view", "view_as",
])  # fmt: skip
EMPTY = frozenset(["empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"])
CROSSING = frozenset(
    ["_local_scalar_dense", "_pin_memory", "_to_copy", "copy_", "index", "is_pinned", "pin_memory", "set_"]
)
"""Operators whose tensors may be on two devices."""
PUTTING = frozenset(["_index_put_impl_", "index_put", "index_put_"])


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
    capturing: PretendedGraph | None = None

    def reset(self) -> None:
        for counter in (self.launches, self.syncs, self.places):
            counter.clear()

    def launch(self, name: str) -> None:
        if not self.muted and self.capturing is None:
            self.launches[name] += 1

    def wait(self, name: str) -> None:
        if self.capturing is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name} at {_place()}")
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

    def compute() -> Any:
        if name == "histc" and not given[0][0].is_floating_point():
            # Of whole numbers a GPU can do it, and a CPU cannot.
            return func(given[0][0].float(), *given[0][1:], **given[1]).to(given[0][0].dtype)
        return func(*given[0], **given[1])

    if _counts.capturing is not None:
        if any(tensor.dim() and not _on_device(tensor) for tensor in tensors):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name} of the host at {_place()}")
        result = _counts.capturing.record(func, given, compute)
    else:
        result = compute()
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


class PretendedGraph:
    """What a CUDA graph is: kernels, with the addresses and the numbers that they were launched with.

    To capture does not compute: what is written meanwhile is taken back. Between two replays the memory of what lies
    between kernels belongs to others.
    """

    def __init__(self) -> None:
        self.kernels: list[tuple[Callable[[], Any], list[Tensor]]] = []
        """Each with what it writes anew; one that writes in place writes nothing anew."""
        self.signature: list[Any] = []
        """Operators, shapes and numbers of the host."""
        self.own: dict[int, Tensor] = {}
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def record(self, func: Any, given: Any, compute: Callable[[], Any]) -> Any:
        tensors = [each for each in tree_leaves(given) if isinstance(each, Tensor)]
        written = [each for each in tree_leaves(_written(func, *given)) if isinstance(each, Tensor)]
        for each in written:
            at = each.untyped_storage().data_ptr()
            if at not in self.own and at not in self.before:
                whole = torch.empty(0, dtype=each.dtype).set_(each.untyped_storage())
                self.before[at] = whole, whole.clone()
        result = compute()
        known = {each.untyped_storage().data_ptr() for each in tensors}
        made = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        new = [each for each in made if each.untyped_storage().data_ptr() not in known]
        self.own |= {each.untyped_storage().data_ptr(): each for each in new}
        self.signature.append((str(func), tree_map(lambda x: tuple(x.shape) if isinstance(x, Tensor) else x, given)))
        if written or new:
            self.kernels.append((compute, [] if written else new))
        return result

    def end(self) -> None:
        for whole, before in self.before.values():
            whole.copy_(before)
        self._spoil()

    def replay(self) -> None:
        _counts.launch("graph")
        for compute, new in self.kernels:
            found = compute()
            for held, each in zip(new, [x for x in tree_leaves(found) if isinstance(x, Tensor)], strict=bool(new)):
                held.copy_(each)
        self._spoil()

    def _spoil(self) -> None:
        for each in self.own.values():
            each.fill_(float("nan") if each.is_floating_point() else 1)


@contextmanager
def _capture(graph: PretendedGraph, **_: Any) -> Iterator[None]:
    _counts.capturing = graph
    try:
        yield
    finally:
        _counts.capturing = None
    graph.end()


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
        (torch.cuda, "CUDAGraph", PretendedGraph),
        (torch.cuda, "graph", _capture),
        (torch.cuda, "graph_pool_handle", lambda: None),
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
