"""Rules between the keys of a recipe, and which of them the losses read.

Each function gives the problems of one section as lines that name the key, its value and what is accepted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mtpd.heads.kinds import KINDS
from mtpd.losses.settings import LOSSES
from mtpd.recipe.sections import (
    DataRecipe,
    EvaluationRecipe,
    ExtendRecipe,
    HeadsRecipe,
    LossRecipe,
    TrainRecipe,
    TrunkRecipe,
)

OWNED_ARGUMENTS = {
    "output_dir": "output",
    "seed": "seed",
    "bf16": "dtype",
    "fp16": "dtype",
    "use_cpu": "device",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "learning_rate": "train.learning_rate",
    "lr_scheduler_type": "train.scheduler",
    "warmup_steps": "train.warmup_ratio",
    "per_device_train_batch_size": "train.micro_batch_rows",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "save_steps": "train.save_steps",
    "logging_steps": "train.logging_steps",
    "report_to": "train.report_to",
    "torch_compile": "train.compile",
    "gradient_checkpointing": "train.checkpoint_blocks",
    "deepspeed": "train.deepspeed",
}
"""transformers.TrainingArguments that have a recipe key: there is one way to say each of them."""


UNSERVED_ARGUMENTS = {
    "parallelism_config": "null, or the recipe key train.sequence_parallel",
    "fsdp": "null, or the recipe key train.deepspeed",
    "fsdp_config": "null, or the recipe key train.deepspeed",
}
"""transformers.TrainingArguments that would train something else, or nothing, and what is accepted."""


DEEPSPEED_PRESETS = ("zero1", "zero2", "zero3", "zero3-cpu", "zero3-nvme")
"""Values of `train.deepspeed` that are files in recipes/deepspeed."""


DEEPEST = 64
"""Heads that an extension makes at most."""


def evaluation_problems(evaluation: EvaluationRecipe, train: TrainRecipe) -> list[str]:
    problems = []
    if evaluation.patience and not evaluation.steps:
        problems.append(
            f"evaluation.patience: {evaluation.patience} does nothing while evaluation.steps is 0; accepted: 0, or "
            "evaluation.steps above 0"
        )
    if evaluation.steps and train.save_steps not in (0, evaluation.steps):
        problems.append(
            f"train.save_steps: {train.save_steps} is not accepted with evaluation.steps, which writes a checkpoint "
            f"at each measurement; accepted: 0, or {evaluation.steps}"
        )
    return problems


def stages_of(extend: ExtendRecipe, depth: int) -> list[int]:
    """Depth after each stage: twice as many heads each time."""
    stages, last = [], extend.to or DEEPEST
    while depth < last:
        depth = min(2 * depth, last)
        stages.append(depth)
    return stages


def extend_problems(extend: ExtendRecipe, heads: HeadsRecipe, evaluation: EvaluationRecipe) -> list[str]:
    defaults = ExtendRecipe()
    if extend.to is None and not extend.auto:
        return [
            f"extend.{key}: {getattr(extend, key)} does nothing while extend.to is null; accepted: "
            f"{getattr(defaults, key)}, or a number of heads in extend.to"
            for key in ExtendRecipe.model_fields
            if getattr(extend, key) != getattr(defaults, key)
        ]
    problems = []
    if not KINDS[heads.kind].loops:
        accepted = ", ".join(kind.name for kind in KINDS.values() if kind.loops)
        problems.append(
            f"extend.to: {heads.kind} heads do not read each other's states; accepted heads.kind: {accepted}"
        )
    if extend.to is not None and extend.to <= heads.depth:
        problems.append(
            f"extend.to: {extend.to} is not more than the {heads.depth} heads there are; accepted: {heads.depth + 1} "
            f"to {DEEPEST}"
        )
        return problems
    if extend.form != "adapters" and extend.rank != defaults.rank:
        problems.append(
            f"extend.rank: {extend.rank} does nothing with extend.form: {extend.form}; accepted: {defaults.rank}, or "
            "form: adapters"
        )
    if extend.auto and not evaluation.decode_prompts:
        problems.append(
            "evaluation.decode_prompts: 0 is not accepted with extend.auto, which goes by measured speed; accepted: "
            "1 or more"
        )
    if extend.steps == 0 and extend.learning_rate is not None:
        problems.append(
            f"extend.learning_rate: {extend.learning_rate} does nothing with extend.steps: 0; accepted: null"
        )
    return problems


def trunk_problems(
    trunk: TrunkRecipe, heads: HeadsRecipe, data: DataRecipe, train: TrainRecipe, extend: ExtendRecipe
) -> list[str]:
    defaults = TrunkRecipe()
    if trunk.train == "frozen":
        return [
            f"trunk.{key}: {getattr(trunk, key)} does nothing with trunk.train: frozen; accepted: "
            f"{'null' if getattr(defaults, key) is None else getattr(defaults, key)}, or train: lora or full"
            for key in TrunkRecipe.model_fields
            if getattr(trunk, key) != getattr(defaults, key)
        ]
    problems = []
    if trunk.teacher == "detached" and data.hidden_states != "recompute":
        problems.append(
            f"data.hidden_states: {data.hidden_states} does nothing with trunk.teacher: detached, whose states change; "
            "accepted: recompute"
        )
    if heads.shared_layers:
        problems.append(
            f"heads.shared_layers: {heads.shared_layers} is not accepted with trunk.train: {trunk.train}, which "
            "changes those layers; accepted: 0"
        )
    if extend.to is not None or extend.auto:
        problems.append(f"trunk.train: {trunk.train} is not accepted with extend.to or extend.auto; accepted: frozen")
    if trunk.train == "full" and trunk.rank != defaults.rank:
        problems.append(f"trunk.rank: {trunk.rank} does nothing with trunk.train: full; accepted: {defaults.rank}")
    return problems


def sharding_problems(train: TrainRecipe, trunk: TrunkRecipe, heads: HeadsRecipe, dtype: str) -> list[str]:
    if train.deepspeed is None:
        return []
    problems = []
    if train.deepspeed not in DEEPSPEED_PRESETS and not train.deepspeed.endswith(".json"):
        problems.append(
            f"train.deepspeed: {train.deepspeed} is not accepted; accepted: null, {', '.join(DEEPSPEED_PRESETS)}, "
            "or the path of a .json file"
        )
    optimizer = str(train.arguments.get("optim", "adamw_torch"))
    if not optimizer.startswith("adamw_torch"):
        problems.append(
            f"train.arguments.optim: {optimizer} is not accepted with train.deepspeed, which shards the state of "
            "torch's AdamW; accepted: adamw_torch, adamw_torch_fused"
        )
    if dtype == "float16":
        problems.append(
            "dtype: float16 is not accepted with train.deepspeed, under which the loss is not scaled; accepted: auto, "
            "bfloat16, float32"
        )
    if train.skip_bad_batches:
        problems.append(
            f"train.skip_bad_batches: {train.skip_bad_batches} is not accepted with train.deepspeed, which steps "
            "before its loss is looked at; accepted: 0"
        )
    if trunk.train != "frozen" and train.deepspeed.startswith("zero3"):
        problems.append(
            f"train.deepspeed: {train.deepspeed} is not accepted with trunk.train: {trunk.train}, which needs the "
            "whole trunk; accepted: null, zero1, zero2"
        )
    if heads.shared_layers and train.deepspeed.startswith("zero3"):
        problems.append(
            f"train.deepspeed: {train.deepspeed} is not accepted with heads.shared_layers: {heads.shared_layers}, "
            "whose gradient passes through layers of the trunk; accepted: null, zero1, zero2"
        )
    return problems


DECIDED_BY_PARTS = ("accelerator_config", "dataloader_drop_last", "train_sampling_strategy")
"""transformers.TrainingArguments that would give a process other parts of rows than those that are its own."""


def split_problems(train: TrainRecipe, heads: HeadsRecipe, data: DataRecipe, extend: ExtendRecipe) -> list[str]:
    parts = train.sequence_parallel
    if parts == 1:
        return []
    problems = []
    if train.deepspeed is None:
        problems.append(
            f"train.sequence_parallel: {parts} is not accepted without DeepSpeed, whose Ulysses splits rows; accepted: "
            f"1, or train.deepspeed: {', '.join(DEEPSPEED_PRESETS)}"
        )
    # A part is followed by the next one alone.
    deepest = max([heads.depth, *(stages_of(extend, heads.depth) if extend.to or extend.auto else [])])
    least = parts * (deepest + 1)
    if data.row_length % parts or data.row_length < least:
        problems.append(
            f"data.row_length: {data.row_length} is not accepted with train.sequence_parallel: {parts} and {deepest} "
            f"heads; accepted: a multiple of {parts}, at least {least}"
        )
    if heads.shared_layers:
        problems.append(
            f"train.sequence_parallel: {parts} is not accepted with heads.shared_layers: {heads.shared_layers}; "
            "accepted: 1"
        )
    problems += [
        f"train.arguments.{name}: is not accepted with train.sequence_parallel, which decides what each process reads; "
        "accepted: null"
        for name in DECIDED_BY_PARTS
        if train.arguments.get(name)
    ]
    if not train.arguments.get("average_tokens_across_devices", True):
        problems.append(
            "train.arguments.average_tokens_across_devices: false is not accepted with train.sequence_parallel, whose "
            "parts of a row have different numbers of tokens; accepted: true"
        )
    return problems


TOP_N = 10_000


def train_problems(train: TrainRecipe, depth: int) -> list[str]:
    problems = loss_problems(train, depth)
    if train.max_steps == 0:
        problems.append("train.max_steps: 0 is not accepted; accepted: -1 for whole epochs, or at least 1")
    return problems + _argument_problems(train.arguments)


def loss_problems(train: LossRecipe, depth: int) -> list[str]:
    problems = []
    for key, field in LossRecipe.model_fields.items():
        losses = [loss.name for loss in LOSSES.values() if key in loss.reads]
        value, default = getattr(train, key), field.default
        if losses and train.loss not in losses and value != default:
            accepted = "null" if default is None else default
            problems.append(
                f"train.{key}: {value} does nothing with train.loss: {train.loss}; accepted: {accepted}, "
                f"or loss: {', '.join(losses)}"
            )
    if train.weights is not None:
        if train.decay != 1.0:
            problems.append(f"train.decay: {train.decay} is not accepted with a list in train.weights; accepted: 1.0")
        if len(train.weights) != depth:
            problems.append(
                f"train.weights: {train.weights} has {len(train.weights)} weights; accepted: null, or a list of "
                f"{depth} (heads.depth is {depth})"
            )
        elif not any(train.weights):
            problems.append("train.weights: all weights of the loss are 0; accepted: at least one of them above 0")
    return problems


def _argument_problems(arguments: Mapping[str, Any]) -> list[str]:
    problems = [
        f"train.arguments.{name}: is not accepted here; accepted: the recipe key {OWNED_ARGUMENTS[name]}"
        for name in arguments
        if name in OWNED_ARGUMENTS
    ]
    problems += [
        f"train.arguments.{name}: is not accepted; accepted: {UNSERVED_ARGUMENTS[name]}"
        for name, value in arguments.items()
        if value and name in UNSERVED_ARGUMENTS
    ]
    kept = arguments.get("save_total_limit", 2)
    if not isinstance(kept, int) or kept < 1:
        problems.append(f"train.arguments.save_total_limit: {kept} is not accepted; accepted: an integer of at least 1")
    problems += [
        f"train.arguments.{name}: {value} is not accepted; accepted: a finite number"
        for name, value in arguments.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    if arguments and not problems:
        # Imported only for recipes that use it: it takes seconds.
        from dataclasses import fields

        from transformers import TrainingArguments

        known = {field.name for field in fields(TrainingArguments)}
        problems = [
            f"train.arguments.{name}: unknown; accepted: an argument of transformers.TrainingArguments"
            for name in arguments
            if name not in known
        ]
    return problems


def loss_weights(train: LossRecipe, depth: int, *, after: int = 0) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The weights of cross-entropy and divergence that `train.loss` means, for depths after+1..depth.

    A list for fewer depths is looped, as heads are.
    """
    depths = range(after, depth)
    if train.weights is None:
        weights = [train.decay**k for k in depths]
    else:
        weights = [train.weights[k % len(train.weights)] for k in depths]
    alpha, beta = LOSSES[train.loss].terms(depth)
    if train.beta is not None:
        beta = train.beta
    return tuple(alpha * weight for weight in weights), tuple(beta * weight for weight in weights)


def checkpoints_kept(train: TrainRecipe) -> int:
    """Gives the number of checkpoints that a run keeps; older ones are deleted, once a new one is whole."""
    return int(train.arguments.get("save_total_limit", 2))


def compared_tokens(train: LossRecipe) -> int:
    """The n of the top n that `train` means, 0 for all tokens."""
    if "top_n" not in LOSSES[train.loss].reads:
        return 0
    return TOP_N if train.top_n is None else train.top_n
