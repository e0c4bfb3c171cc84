"""A frozen trunk that is partitioned over processes, and heads that are trained by a DeepSpeed engine of their own.

The two are apart, because they are used apart. The trunk's layers are under DeepSpeed's inference engine of ZeRO stage
3: each process holds its share of every layer, and a layer is whole while it computes, in the forward pass and never
in a backward pass, which ends at the heads. Embedding and unembedding stay whole on each process: each step reads all
of both, so that partitioning them would save nothing where memory is at its peak. Heads are ordinary modules
until the trainer wraps them, so that whatever builds or loads them meets tensors that have elements.

Partitioned layers are collective: all processes have to run the trunk equally often.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from mtpd.errors import MtpdError, UserError
from mtpd.parallel.launch import free_port
from mtpd.trunk import Trunk

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others, which may be writing a checkpoint."""
ENABLED = "ACCELERATE_USE_DEEPSPEED"
"""Set by accelerate while DeepSpeed is in use, and read by it later."""

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ""}
"""What a launcher sets, for the only process."""


@contextmanager
def deepspeed_running(device: torch.device) -> Iterator[None]:
    """Within it, transformers' TrainingArguments with `deepspeed` train on `device`; a single process works too.

    Afterwards nothing of it is left that would change how other models of this Python process are made.

    Raises:
        MtpdError: DeepSpeed cannot start here.
    """
    before = dict(os.environ)
    # It says that DeepSpeed accumulates and itself does not, which is how transformers wants it.
    talk = logging.getLogger("accelerate.accelerator")
    level = talk.level
    try:
        _start(device)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise MtpdError(f"train.deepspeed: DeepSpeed cannot start here: {reason}; accepted then: null") from error
    talk.setLevel(logging.ERROR)
    try:
        yield
    finally:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        talk.setLevel(level)
        unset_hf_deepspeed_config()
        for name in (ENABLED, *ALONE):
            if name in before:
                os.environ[name] = before[name]
            else:
                os.environ.pop(name, None)


def _start(device: torch.device) -> None:
    """Starts the process group, if nothing has yet, in such a way that accelerate knows its size on a CPU too."""
    if "RANK" not in os.environ:
        os.environ.update({**ALONE, "MASTER_PORT": str(free_port())})
    if device.type == "cpu":
        # Else DeepSpeed and accelerate would each choose a GPU, where there is one.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    import deepspeed
    from accelerate.state import AcceleratorState, PartialState
    from deepspeed.utils import logger

    # Compiled at the start, for a minute or more, and used for inference.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    logger.setLevel(logging.ERROR)
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ[ENABLED] = "true"
    PartialState(cpu=False, backend="gloo" if device.type == "cpu" else None, timeout=TIMEOUT)


def move_outside_of_layers(trunk: Trunk, device: torch.device) -> None:
    """Moves all of a trunk to a device but the weights of its layers; embeddings are those of the first process.

    Layers follow one parameter at a time, when they are partitioned, and come from the first process too.
    """
    layers = set(trunk.decoder.layers.modules())
    for module in trunk.model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
        for parameter in () if module in layers else module._parameters.values():
            if parameter is not None:
                parameter.data = parameter.data.to(device)
    if torch.distributed.is_initialized():
        ends = (trunk.model.get_input_embeddings(), trunk.model.get_output_embeddings())
        for parameter in {id(each): each for end in ends for each in end.parameters()}.values():
            torch.distributed.broadcast(parameter.data, 0)


@contextmanager
def partitioned(trunk: Trunk, config: dict[str, Any], *, for_good: bool = False) -> Iterator[None]:
    """Within it, each process holds its share of the trunk's layers. Afterwards the trunk is whole again.

    After an error it is left as it is: to put it together takes all processes, and the others may be gone.

    Args:
        for_good: leaves it so afterwards as well.
        config: of DeepSpeed, with stage 3 (`DeepSpeedSettings.for_trunk`).

    Raises:
        UserError: it offloads to NVMe, and DeepSpeed cannot do that here.
    """
    import deepspeed

    if ((config["zero_optimization"].get("offload_param") or {}).get("device")) == "nvme":
        _check_nvme()
    decoder = trunk.decoder
    kept = _take_out(decoder, trunk.model.get_input_embeddings())
    try:
        deepspeed.zero.Init(module=decoder, config_dict_or_path=config, dtype=trunk.dtype)
        engine, *_ = deepspeed.initialize(model=decoder, config=config)
    finally:
        for parent, name, module in kept:
            parent._modules[name] = module
    yield
    if for_good:
        return
    shares = [each for each in decoder.parameters() if hasattr(each, "ds_id")]
    whole: dict[int, Tensor] = {}
    for each in shares:
        with _whole(each):
            whole[id(each)] = each.detach().to("cpu", copy=True).to(trunk.device)
    engine.destroy()
    make_whole(decoder, whole)


def _take_out(decoder: nn.Module, module: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Removes a module from a tree, and gives back the places that it had."""
    places: list[tuple[nn.Module, str, nn.Module]] = [
        (parent, name, child)
        for parent in decoder.modules()
        for name, child in parent._modules.items()
        if child is module
    ]
    for parent, name, _ in places:
        parent._modules.pop(name)
    return places


def gathered(module: nn.Module, *, keep: bool = True, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The state of a module with partitioned parameters put together, on the CPU. All processes call it.

    One parameter at a time is whole on the device. Modules that are not partitioned are just copied.

    Args:
        keep: whether this process wants it; one that does not has nothing.
        dtype: number format of what is kept.
    """
    state = {}
    for name, value in module.state_dict(keep_vars=True).items():
        with _whole(value):
            if keep:
                kept = dtype if value.is_floating_point() else None
                state[name] = value.detach().to("cpu", kept, copy=True)
    return state


def _whole(parameter: Any) -> AbstractContextManager[Any]:
    """Within it, a parameter has all its elements."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    found: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([parameter])
    return found


def make_whole(module: nn.Module, tensors: dict[int, Tensor]) -> None:
    """Replaces partitioned parameters by ordinary ones; shared parameters stay shared.

    Args:
        tensors: by the id of the parameter.
    """
    new: dict[int, nn.Parameter] = {}
    for each in module.modules():
        # DeepSpeed put dictionaries of its own here, which gather what is read from them.
        parameters = dict(each._parameters.items())
        for name, parameter in parameters.items():
            if parameter is not None and id(parameter) in tensors:
                if id(parameter) not in new:
                    tensor = tensors[id(parameter)]
                    new[id(parameter)] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
                parameters[name] = new[id(parameter)]
        each.__dict__["_parameters"] = parameters
        for left in ("_original_parameters", "pre_bwd_fn", "post_bwd_fn"):
            each.__dict__.pop(left, None)


def _check_nvme() -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError(
            "train.deepspeed: offloading to nvme needs DeepSpeed's async_io, which cannot be built here (libaio is "
            "missing?); accepted then: zero3, zero3-cpu"
        )
