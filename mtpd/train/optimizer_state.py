"""The state of the optimizer as one safetensors file, whichever way it is sharded over however many processes.

It is kept by the names of parameters, whole: a run goes on with any number of processes and at any stage of ZeRO, and
nothing is unpickled. Only heads are trained, so it is small beside a trunk.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from mtpd.errors import MtpdError
from mtpd.files import tensors_written

OPTIMIZER = "optimizer.safetensors"
"""In a checkpoint."""
STEP_ROWS, OLD_STEP_ROWS = "step_rows", "rows_per_step"
"""Rows of an optimizer step of all processes together, now and in earlier checkpoints: where a step lies in the data
follows from it."""
State = dict[str, dict[str, Any]]
"""By the name of a parameter, what the optimizer keeps of it, by key."""


def state_of(model: nn.Module, optimizer: Any, engine: Any = None) -> State:
    """The whole state. With an engine of DeepSpeed all processes have to call it, and the first one has the state.

    Args:
        model: whose trained parameters the optimizer has.
    """
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    if engine is None:
        return {name: dict(optimizer.state.get(each, {})) for name, each in trained.items()}
    from deepspeed.utils import safe_get_full_optimizer_state

    shards = _shards(engine)
    _tie(engine)
    own = engine.optimizer.optimizer.state[shards[0]]
    state: State = {}
    keeps = torch.distributed.get_rank() == 0
    for name, each in trained.items():
        state[name] = {}
        for key, value in own.items():
            if _by_element(value, shards[0]):
                whole = safe_get_full_optimizer_state(each, key)
                # All processes have to ask; the one that writes keeps it.
                value = whole.cpu() if keeps else None
            state[name][key] = value
    return state if keeps else {}


def put_state(state: State, model: nn.Module, optimizer: Any, engine: Any = None) -> None:
    """Gives an optimizer that has not stepped yet the state that another one had."""
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    if engine is None:
        names = {id(each): name for name, each in trained.items()}
        order = [names[id(each)] for group in optimizer.param_groups for each in group["params"]]
        content = optimizer.state_dict()
        content["state"] = {place: dict(state[name]) for place, name in enumerate(order) if state[name]}
        optimizer.load_state_dict(content)
        return
    zero, shards = engine.optimizer, _shards(engine)
    sample = next(values for values in state.values() if values)
    # Whether a value has one entry for each element of its parameter, or one for all.
    by_element = {key for key, value in sample.items() if isinstance(value, Tensor) and value.ndim}
    for shard in shards:
        zero.optimizer.state[shard] = {
            key: torch.zeros_like(shard) if key in by_element else _scalar(value, shard)
            for key, value in sample.items()
        }
    _tie(engine)
    for name, each in trained.items():
        for key in by_element & state[name].keys():
            _put_shard(each, state[name][key], key)


def _put_shard(parameter: Any, value: Tensor, key: str) -> None:
    """Keeps this process's part of a value that belongs to a whole parameter."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    value = value.to(parameter.device)
    if not hasattr(parameter, "ds_id"):
        safe_set_full_optimizer_state(parameter, value, key)
        return
    # The parts of stage 3 have one size; the last ones are filled up with zeros.
    size, group = parameter.ds_tensor.numel(), parameter.ds_process_group
    rank, count = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    filled = torch.zeros(size * count, dtype=value.dtype, device=value.device)
    filled[: value.numel()] = value.flatten()
    safe_set_local_optimizer_state(parameter, filled[rank * size :][:size], key)


def _shards(engine: Any) -> list[Tensor]:
    """The flat parameters of this process that the optimizer steps on."""
    zero = engine.optimizer
    # Stage 3 has other names for them than stages 1 and 2.
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups")
    found: list[Tensor] = next(getattr(zero, name) for name in names if hasattr(zero, name))
    return found


def _tie(engine: Any) -> None:
    """Tells each parameter where its part of the state is.

    Stages 1 and 2 do so once, when the first group of parameters has stepped, and the others have no state yet.
    """
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    zero = engine.optimizer
    for group, shard in zip(getattr(zero, "bit16_groups", []), _shards(engine), strict=False):
        lazy_init_hp_params_optimizer_state(group, shard, zero.optimizer.state)


def _by_element(value: Any, shard: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == shard.shape


def _scalar(value: Any, shard: Tensor) -> Any:
    # Each shard counts its own steps.
    return value.to(shard.device, copy=True) if isinstance(value, Tensor) else value


def save_state(state: State, path: Path, *, step_rows: int) -> None:
    """Writes a state, and how many rows a step of it had, as a file that appears whole or not at all."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for name, values in state.items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{key}/{name}"] = value.detach().to("cpu", copy=True).contiguous()
            else:
                numbers[f"{key}/{name}"] = value
    metadata = {"format": "pt", "numbers": json.dumps(numbers), STEP_ROWS: str(step_rows)}
    with tensors_written(path, tensors, metadata):
        pass


def load_state(path: Path, model: nn.Module) -> State:
    """Loads what `save_state` wrote. Parameters that no loss reached have nothing in it.

    Raises:
        MtpdError: the file is missing or damaged, or belongs to other parameters.
    """
    try:
        values: dict[str, Any] = {**load_file(path), **json.loads(_metadata(path)["numbers"])}
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise MtpdError(f"{path}: no readable state of the optimizer: {str(error).splitlines()[0]}") from error
    state: State = {name: {} for name, each in model.named_parameters() if each.requires_grad}
    for place, value in values.items():
        key, _, name = place.partition("/")
        if name not in state:
            raise MtpdError(f"{path}: has the state of {name}, which is not trained; start over with --fresh")
        state[name][key] = value
    for name, found in state.items():
        shapes = [value.shape for value in found.values() if isinstance(value, Tensor) and value.ndim]
        parameter = model.get_parameter(name)
        # One that is partitioned has no elements; DeepSpeed keeps its shape.
        if any(shape != getattr(parameter, "ds_shape", parameter.shape) for shape in shapes):
            raise MtpdError(f"{path}: the state of {name} is of another shape; start over with --fresh")
    if not any(state.values()):
        raise MtpdError(f"{path}: has no state; start over with --fresh")
    return state


def read_step_rows(checkpoint: Path) -> int | None:
    """Reads how many rows an optimizer step had when a checkpoint was written; None if it does not say."""
    try:
        found = _metadata(checkpoint / OPTIMIZER)
        return int(found.get(STEP_ROWS) or found[OLD_STEP_ROWS])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}
