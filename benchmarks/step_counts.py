"""Counts what a training step does: operations of products, bytes that are swept, bytes that come from other processes.

Everything that PyTorch runs is seen, also what a backward pass or DistributedDataParallel starts.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop
from transformers import TrainerCallback

ATEN, C10D = torch.ops.aten, torch.ops.c10d
FLOPS = {
    **flop_registry,
    # PyTorch counts those of accelerators alone.
    ATEN._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}
TOUCHES_NOTHING = {ATEN.empty, ATEN.empty_like, ATEN.empty_strided, ATEN.new_empty, ATEN.new_empty_strided}
TOUCHES_NOTHING |= {ATEN.detach, ATEN._unsafe_view}
ULYSSES = "dim_zero_all_to_all"
"""DeepSpeed's exchange between processes that share rows; what is inside of it does not show."""
PICKS = {ATEN.embedding, ATEN.gather, ATEN.index, ATEN.index_select}
"""Read no more than they give."""


class StepCount(TorchDispatchMode):
    """Counts under it.

    Attributes:
        flops: of matrix products and attention, by name.
        swept: bytes that everything else reads and writes, by name.
        softmaxes: numbers of which softmaxes are taken.
        received: bytes that come in through collectives, by name, where each moves as little as it can.
        calls: of collectives.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()
        self.swept: Counter[str] = Counter()
        self.softmaxes: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        packet, name = func.overloadpacket, func.overloadpacket.__name__
        if func.namespace == "c10d":
            self.received[name] += _received(packet, args)
            self.calls[name] += 1
        elif name == ULYSSES:
            parts = output.shape[0]
            self.received[name] += output.nbytes * (parts - 1) // parts
            self.calls[name] += 1
        elif packet == ATEN._softmax:
            self.softmaxes[name] += output.numel()
        elif packet in FLOPS:
            self.flops[name] += FLOPS[packet](*args, **(kwargs or {}), out_val=output)
        elif func.namespace == "aten" and packet not in TOUCHES_NOTHING:
            self.swept[name] += _touched(func, args, kwargs or {}, output)
        return output


def _touched(func: Any, args: Any, kwargs: Any, output: Any) -> int:
    """Bytes that an operation reads and writes: inputs once, new outputs once, what it changes in place twice."""
    schema = func._schema
    if any(each.alias_info is not None and not each.alias_info.is_write for each in schema.returns):
        return 0  # a view
    if func.overloadpacket in PICKS:
        return 2 * output.nbytes
    if func.overloadpacket == ATEN.scatter_add_:
        return 3 * args[3].nbytes
    if func.overloadpacket == ATEN._fused_adamw_:
        # The gradient is not changed, though it might be.
        return 7 * sum(each.nbytes for each in args[0])
    given = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
    known = {leaf.data_ptr() for leaf in given}
    made = [leaf for leaf in tree_iter(output) if isinstance(leaf, Tensor) and leaf.data_ptr() not in known]
    changed: list[Tensor] = []
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name) if argument.name in kwargs else args[place] if place < len(args) else None
            changed += [leaf for leaf in tree_iter(value) if isinstance(leaf, Tensor)]
    if func.overloadpacket in (ATEN.copy_, ATEN.fill_, ATEN.zero_):
        given = given[1:]
    # Written, not read.
    given = [each for each in given if each is not kwargs.get("out")]
    return sum(map(_size, [*given, *made, *changed]))


def _size(tensor: Tensor) -> int:
    # What is repeated without being there is read once.
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def _received(packet: Any, args: Any) -> int:
    """Bytes that a process gets, with the algorithms that move least: a ring, or what is as good."""
    ranks = torch.distributed.get_world_size()
    share = (ranks - 1) / ranks

    def size(value: Any) -> int:
        return sum(leaf.nbytes for leaf in tree_iter(value) if isinstance(leaf, Tensor))

    if packet in (C10D.allreduce_, C10D.allreduce_coalesced_):
        return round(2 * share * size(args[0]))
    if packet in (C10D._allgather_base_, C10D.allgather_, C10D.allgather_into_tensor_coalesced_):
        return round(share * size(args[0]))
    if packet in (C10D._reduce_scatter_base_, C10D.reduce_scatter_, C10D.reduce_scatter_tensor_coalesced_):
        return round(share * size(args[1]))
    if packet in (C10D.broadcast_, C10D.reduce_):
        return size(args[0])
    assert packet in (C10D.barrier, C10D.monitored_barrier_), packet
    return 0


class CountSteps(TrainerCallback):
    """Counts one optimizer step, the second, in which nothing is done for the first time."""

    def __init__(self) -> None:
        self.count = StepCount()
        self.of: dict[str, dict[str, int]] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.count.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.count.__exit__(None, None, None)
            names = ("flops", "swept", "softmaxes", "received", "calls")
            self.of = {name: dict(getattr(self.count, name)) for name in names}
