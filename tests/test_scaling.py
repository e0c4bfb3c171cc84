"""The formula of `mtpd.distill.scaling` against the tensors that one and two processes hold, and plans made of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_trunk
from processes import in_fresh_ranks, in_ranks
from sharded_runs import Case, new_heads, run_case
from transformers import TrainerCallback

from mtpd.cli import main
from mtpd.distill.estimate import Sizes
from mtpd.distill.plan import plan, training_load
from mtpd.distill.scaling import Load, Machine, Sharding, fits, memory, step_seconds
from mtpd.recipe import load_recipe

SHARDINGS: tuple[Sharding, ...] = ("none", "zero1", "zero2", "zero3", "zero3-cpu")


def size_of(tensors: Any) -> int:
    """Bytes of tensors, each storage once."""
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def own(parameter: Any) -> torch.Tensor:
    """What a rank keeps of a parameter."""
    return parameter.ds_tensor if hasattr(parameter, "ds_id") else parameter.data


class Count(TrainerCallback):
    """Counts what a rank holds, where an optimizer step begins."""

    def __init__(self) -> None:
        self.held: dict[str, int] = {}

    def on_train_begin(self, *args: Any, model: Any, optimizer: Any, **kwargs: Any) -> None:
        zero = getattr(optimizer, "optimizer", optimizer)
        if not hasattr(zero, "optimizer"):
            return
        real = zero.step

        def step(*arguments: Any, **options: Any) -> Any:
            self.count(model, zero, zero.optimizer)
            return real(*arguments, **options)

        zero.step = step

    def on_pre_optimizer_step(self, *args: Any, model: Any, optimizer: Any, **kwargs: Any) -> None:
        zero = getattr(optimizer, "optimizer", optimizer)
        if not hasattr(zero, "optimizer"):
            self.count(model, None, zero)

    def count(self, model: Any, zero: Any, optimizer: Any) -> None:
        heads = list(model.heads.parameters())
        trunk = [own(each) for each in model.trunk.model.parameters()]
        on_host = [each for each in trunk if each.device.type == "cpu" and False]
        moments = [value for kept in optimizer.state.values() for value in kept.values() if value.ndim]
        self.held = {
            "trunk": size_of(trunk),
            "heads": size_of(own(each) for each in heads),
            "optimizer": size_of(moments),
        }
        if zero is None:
            self.held["gradients"] = sum(each.grad.nbytes for each in heads)
            return
        master = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_partitioned_groups_flat
        self.held["master copy"] = size_of(master)
        averaged = getattr(zero, "averaged_gradients", {})
        print(type(zero).__name__, {k: type(v) for k, v in averaged.items()}, on_host)
        print([n for n in dir(zero) if "grad" in n])
        lists = [each for group in averaged.values() if group for each in group if each is not None]
        self.held["gradients"] = sum(each.nbytes for each in lists)
        self.held["grad attributes"] = sum(each.grad.nbytes for each in heads if each.grad is not None)


def held(folder: str, names: list[str]) -> dict[str, Any]:
    found = {}
    for name in names:
        count = Count()
        run_case(name, Case(None if name == "none" else name, steps=2), Path(folder), callbacks=[count])
        found[name] = count.held
    return found
