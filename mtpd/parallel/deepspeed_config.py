"""Reads `train.deepspeed`: a DeepSpeed configuration, checked before anything starts, and sized from the model.

One JSON configures two things. The heads are trained by a DeepSpeed engine of their own, at the stage that it names.
At stage 3 the trunk's layers are partitioned too (`mtpd.parallel.partition`); offloading parameters is about them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mtpd.errors import UserError
from mtpd.recipe import DEEPSPEED_PRESETS
from mtpd.recipe.shipped import shipped_folder

AUTO = "auto"
BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
"""Filled in by transformers, from the keys of the recipe."""
SAID_BY_RECIPE = {
    "optimizer": "train.learning_rate and train.arguments.weight_decay",
    "scheduler": "train.scheduler",
    "fp16": "dtype",
    "bf16": "dtype",
    "torch_autocast": "dtype",
    "amp": "dtype",
    "data_types": "dtype",
}
"""Sections of DeepSpeed's that the recipe has keys for."""
PERSISTENT_ROWS = 10
"""Parameters of up to so many hidden sizes (norms, biases) are not worth a message: they stay whole."""
ALIGNED = 1024
"""Sizes of buckets are multiples of so many elements."""
LARGEST_BUCKET = 500_000_000
"""Elements of a bucket at most, as many as DeepSpeed's own default; larger tensors are sent by themselves."""
LIVE_LAYERS = 3
"""Layers whose parameters are whole at a time: one computes, one is fetched ahead, one is let go."""


@dataclass(frozen=True)
class DeepSpeedSettings:
    """A DeepSpeed configuration that has been checked.

    Attributes:
        source: the preset or file, for messages.
        config: the JSON as it was read; sizes may be "auto".
    """

    source: str
    config: dict[str, Any]

    @property
    def stage(self) -> int:
        """ZeRO's stage: 1, 2 or 3."""
        return int(self.config["zero_optimization"]["stage"])

    @property
    def offload(self) -> str:
        """Place of the trunk's partitions: "none" (on the device), "cpu" or "nvme"."""
        return str((self.config["zero_optimization"].get("offload_param") or {}).get("device", "none"))

    def for_heads(self, heads: nn.Module, *, hidden_size: int, own_logits: bool) -> dict[str, Any]:
        """The configuration of the engine that trains the heads.

        Args:
            own_logits: whether the heads read their parameters outside of the calls of their modules, where stage 3
                does not see it; they are trained at stage 2 then.
        """
        config = copy.deepcopy(self.config)
        zero = config["zero_optimization"]
        zero.pop("offload_param", None)
        if self.stage == 3 and own_logits:
            kept = ("overlap_comm", "contiguous_gradients", "reduce_bucket_size", "offload_optimizer")
            zero = {"stage": 2, "allgather_bucket_size": AUTO, **{key: zero[key] for key in kept if key in zero}}
            config["zero_optimization"] = zero
        return _sized(config, _layers(heads), hidden_size=hidden_size)

    def for_trunk(self, layers: nn.ModuleList, *, hidden_size: int, folder: Path) -> dict[str, Any]:
        """The configuration under which the trunk's layers are partitioned, at stage 3.

        Args:
            folder: gets the partitions that are offloaded to NVMe, where the configuration names no place.
        """
        config = copy.deepcopy(self.config)
        for key in BATCH:
            config.pop(key, None)
        # The engine of a trunk trains nothing; DeepSpeed wants a number.
        config["train_micro_batch_size_per_gpu"] = 1
        zero = config["zero_optimization"]
        zero.pop("offload_optimizer", None)
        offload = zero.get("offload_param") or {}
        if offload.get("nvme_path") == AUTO:
            offload["nvme_path"] = str(folder)
        config = _sized(config, list(layers), hidden_size=hidden_size)
        largest = max(parameter.numel() for parameter in layers.parameters())
        for key, value in (("buffer_size", largest), ("max_in_cpu", largest * int(offload.get("buffer_count", 5)))):
            if offload.get(key) == AUTO:
                offload[key] = value
        return config


def load_settings(name: str | None) -> DeepSpeedSettings | None:
    """The configuration that `train.deepspeed` names.

    Args:
        name: a preset, the path of a .json file, or None for no DeepSpeed.

    Raises:
        UserError: the file cannot be read, is no configuration of DeepSpeed, or says what the recipe says.
    """
    if name is None:
        return None
    path = preset_folder() / f"{name}.json" if name in DEEPSPEED_PRESETS else Path(name)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"train.deepspeed: {name}: cannot be read: {getattr(error, 'strerror', error)}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"train.deepspeed: {name}: line {error.lineno}: no JSON: {error.msg}") from error
    problem = _problem(config)
    if problem:
        raise UserError(f"train.deepspeed: {name}: {problem}")
    for key in BATCH:
        config[key] = AUTO
    # What DeepSpeed would do instead: compile an optimizer of its own, replace torch's linear function for good.
    config.setdefault("zero_allow_untested_optimizer", True)
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    config["zero_optimization"].setdefault("memory_efficient_linear", False)
    return DeepSpeedSettings(name, config)


def preset_folder() -> Path:
    """Gives the folder of the presets, beside the recipes that come with mtpd."""
    return shipped_folder() / "deepspeed"


def _problem(config: Any) -> str | None:
    """Says what is wrong with a configuration, if anything is."""
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") not in (1, 2, 3):
        given = zero.get("stage") if isinstance(zero, dict) else zero
        return f"zero_optimization.stage: {given} is not accepted; accepted: 1, 2, 3"
    for key, said in SAID_BY_RECIPE.items():
        section = config.get(key)
        if section and not (isinstance(section, dict) and section.get("enabled") is False):
            return f"{key}: is not accepted here; accepted: the recipe's {said}"
    for key in BATCH:
        if config.get(key, AUTO) != AUTO:
            return f"{key}: {config[key]} is not accepted; accepted: auto, which is what the recipe says"
    offload = (zero.get("offload_param") or {}).get("device", "none")
    if offload != "none" and zero["stage"] != 3:
        return f"zero_optimization.offload_param: {offload} needs stage 3; accepted: none"
    # Imported late: it takes seconds.
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**_without_auto(zero))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["zero_optimization", *map(str, first["loc"])])
        return f"{where}: {first['msg']}"
    return None


def _without_auto(section: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if value != AUTO
    }


def _layers(heads: nn.Module) -> list[nn.Module]:
    """The parts of heads that are computed one after the other."""
    found: Any = getattr(heads, "layers", None)
    return list(found) if found is not None and len(found) else [heads]


def _numbers(modules: Iterable[nn.Module]) -> int:
    """Parameters of the largest of some modules."""
    return max(sum(_numel(parameter) for parameter in module.parameters()) for module in modules)


def _numel(parameter: nn.Parameter) -> int:
    """Elements, also of a parameter that is partitioned already and has none of its own."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def bucket_elements(layer: int, *, hidden_size: int) -> int:
    """Elements of a bucket of gradients, from those of the largest layer that is trained."""
    # DeepSpeed wants buckets that end where its messages may begin.
    return -(-min(max(layer, hidden_size**2), LARGEST_BUCKET) // ALIGNED) * ALIGNED


def _sized(config: dict[str, Any], layers: list[nn.Module], *, hidden_size: int) -> dict[str, Any]:
    """The configuration with a number for each size that is "auto"."""
    layer = _numbers(layers)
    bucket = bucket_elements(layer, hidden_size=hidden_size)
    sizes = {
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        # The next layer is fetched while one computes.
        "stage3_prefetch_bucket_size": layer,
        "stage3_param_persistence_threshold": PERSISTENT_ROWS * hidden_size,
        "stage3_max_live_parameters": LIVE_LAYERS * layer,
        # A layer that is used again at once, a shared block, say, stays.
        "stage3_max_reuse_distance": layer,
    }
    zero = config["zero_optimization"]
    for key, value in sizes.items():
        if zero.get(key) == AUTO:
            zero[key] = value
    return config
