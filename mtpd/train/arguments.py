"""From a recipe to transformers' TrainingArguments and the settings of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from mtpd.errors import UserError
from mtpd.losses.settings import LossSettings
from mtpd.recipe import Recipe, checkpoints_kept, compared_tokens, loss_weights
from mtpd.recipe.pretrain import PretrainTraining
from mtpd.recipe.sections import LossRecipe, TrainRecipe
from mtpd.train.measuring_trainer import measuring_arguments


def loss_settings(recipe: Recipe, *, depth: int | None = None, after: int = 0) -> LossSettings:
    """The loss that the recipe describes.

    Args:
        depth: of the heads; None is what the recipe says.
        after: depths up to this one have no loss.
    """
    return loss_of(recipe.train, depth or recipe.heads.depth, after=after)


def loss_of(train: LossRecipe, depth: int, *, after: int = 0) -> LossSettings:
    """The loss of so many heads that a section describes; none where there are no heads."""
    if not depth:
        return LossSettings((), ())
    alpha, beta = loss_weights(train, depth, after=after)
    return LossSettings(
        alpha,
        beta,
        loss=train.loss,
        top_n=compared_tokens(train),
        teacher_temperature=train.teacher_temperature,
    )


def training_arguments(
    recipe: Recipe,
    *,
    dtype: torch.dtype,
    device: torch.device,
    deepspeed: dict[str, Any] | None = None,
    every_gradient: bool = False,
    accumulation: int | None = None,
) -> TrainingArguments:
    """Arguments of the trainer.

    Heads are trained in float32 and computed in `dtype` (autocast), the number format of the trunk.

    Args:
        deepspeed: DeepSpeed's configuration (`DeepSpeedSettings.for_heads`), inside of `deepspeed_running`.
        every_gradient: each parameter that is trained gets a gradient in each pass, so that nobody looks for others.
        accumulation: micro batches in an optimizer step, where they are others than the recipe says.

    Raises:
        UserError: transformers refuses an entry of `train.arguments`.
    """
    train = recipe.train
    changed: dict[str, Any] = {
        "save_strategy": "steps" if train.save_steps else "epoch",
        "save_steps": train.save_steps or 500,
        "save_total_limit": checkpoints_kept(train),
        "report_to": train.report_to or "none",
        "ddp_find_unused_parameters": not every_gradient,
        **measuring_arguments(recipe),
        **train.arguments,
    }
    if accumulation is not None:
        changed["gradient_accumulation_steps"] = accumulation
    return arguments_of(
        train, changed, output=recipe.output, seed=recipe.seed, dtype=dtype, device=device, deepspeed=deepspeed
    )


def arguments_of(
    train: TrainRecipe | PretrainTraining,
    changed: Mapping[str, Any],
    *,
    output: Path,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    deepspeed: dict[str, Any] | None = None,
) -> TrainingArguments:
    """What every training of mtpd has in common.

    Args:
        changed: further arguments, and others than those in common.

    Raises:
        UserError: transformers refuses one.
    """
    arguments: dict[str, Any] = {
        "output_dir": str(output),
        "seed": seed,
        "data_seed": seed,
        "num_train_epochs": train.epochs,
        "max_steps": train.max_steps,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.scheduler,
        # A number below 1 is a share of all steps.
        "warmup_steps": train.warmup_ratio if train.warmup_ratio < 1 else 0,
        "adam_beta2": 0.95,
        "per_device_train_batch_size": train.micro_batch_rows,
        "gradient_accumulation_steps": train.gradient_accumulation,
        "logging_steps": train.logging_steps,
        "report_to": "none",
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": device.type == "cpu",
        "remove_unused_columns": False,
        "dataloader_pin_memory": device.type != "cpu",
        # Batches come from pinned memory while the host goes on.
        "accelerator_config": {"non_blocking": device.type != "cpu"},
        "disable_tqdm": True,
        "log_level": "error",
        **changed,
    }
    if deepspeed is not None:
        # An engine in bfloat16 would train in it: products are computed in it by autocast (`DistillModel`).
        arguments |= {"deepspeed": deepspeed, "bf16": False, "use_cpu": False}
        # The process group is there already; transformers would not see one on a CPU.
        arguments["accelerator_config"] = {**arguments.get("accelerator_config", {}), "use_configured_state": True}
    try:
        found = TrainingArguments(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"train.arguments: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and device.index and found.world_size == 1:
        # transformers would train on the first GPU. What says `cuda` alone is the current one.
        found.__dict__["_setup_devices"] = device
        torch.cuda.set_device(device)
    if found.n_gpu > 1:
        # Without a launcher there is one process, which trains on one device.
        found._n_gpu = 1
    return found
