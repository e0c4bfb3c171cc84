"""The training step of a run, and of each stage of an extension."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from transformers import TrainerCallback

from mtpd.data.packing import PackedRows, Sample
from mtpd.data.store import HiddenStates, MemoryStore
from mtpd.errors import UserError, enough_memory
from mtpd.heads import Heads
from mtpd.parallel.deepspeed_config import load_settings
from mtpd.parallel.partition import deepspeed_running, partitioned
from mtpd.parallel.sequence import SplitRows
from mtpd.run.session import Session
from mtpd.train.arguments import loss_settings, training_arguments
from mtpd.train.finished_depths import FinishedDepths
from mtpd.train.joint_trunk import JointTrunk
from mtpd.train.measuring_trainer import MeasuringTrainer, stopping
from mtpd.train.model import DistillModel
from mtpd.train.step_rows import accumulation, processes
from mtpd.train.trainer import Metrics, train

logger = logging.getLogger(__name__)


def train_heads(
    session: Session,
    heads: Heads,
    rows: PackedRows,
    store: HiddenStates | None,
    samples: Sequence[Sample],
    below: FinishedDepths | None = None,
    joint: JointTrunk | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Trains, or goes on from the newest whole checkpoint; measures on samples every `evaluation.steps`.

    Args:
        below: the first depths of the heads, where those are not trained.
        joint: the trunk, where it is trained too.

    Raises:
        UserError, MtpdError: DeepSpeed's configuration is wrong or does not start; the training diverged.
    """
    recipe, trunk = session.recipe, session.trunk
    settings = load_settings(recipe.train.deepspeed)
    after = 0 if below is None else below.depth
    with ExitStack() as running:
        parts = recipe.train.sequence_parallel
        options: dict[str, Any] = {
            "accumulation": accumulation(recipe.train, session.run.path, processes(), parts=parts)
        }
        if settings is not None:
            if settings.stage == 3 and (joint is not None or heads.shared_layers):
                key = "heads.shared_layers" if joint is None else "trunk.train"
                raise UserError(
                    f"train.deepspeed: {settings.source} is of stage 3, and {key} needs the whole trunk; accepted: "
                    "stage 1 or 2"
                )
            running.enter_context(deepspeed_running(trunk.device))
            options["deepspeed"] = settings.for_heads(heads, hidden_size=trunk.hidden_size, own_logits=heads.own_logits)
        # Experts that no token goes to may have none.
        options["every_gradient"] = joint is None and not heads.own_logits and not heads.experts
        dtype = trunk.dtype if joint is None else joint.dtype
        arguments = training_arguments(recipe, dtype=dtype, device=trunk.device, **options)
        trunk.to(arguments.device)
        if arguments.world_size > 1 and store is not None and not all(row in store for row in range(len(rows))):
            # A rank meets rows that another one has computed.
            instead = (
                "accepted: disk, where all processes read what each has computed"
                if isinstance(store, MemoryStore)
                else "`mtpd data store` fills a store ahead of training"
            )
            logger.warning(
                "data.hidden_states: %s: %d processes keep no states in training, the trunk runs in each epoch; %s",
                recipe.data.hidden_states,
                arguments.world_size,
                instead,
            )
            store = None
        if arguments.world_size > 1 and below is not None:
            below.store = None
        model = DistillModel(
            trunk,
            heads,
            loss_settings(recipe, depth=heads.depth, after=after),
            split=SplitRows(parts, ahead=heads.depth + 1) if parts > 1 else None,
            compiled=recipe.train.compile,
            checkpoint_blocks=recipe.train.checkpoint_blocks,
            after=after,
            joint=joint,
            autocast=dtype if settings is not None and dtype != torch.float32 else None,
        )
        trainer = MeasuringTrainer(
            model,
            arguments,
            rows,
            store=store,
            below=below,
            samples=samples,
            end_tokens=session.ends,
            callbacks=[Metrics(session.run.metrics), *stopping(recipe), *callbacks],
            progress=session.progress,
            skip_bad_batches=recipe.train.skip_bad_batches,
        )
        if settings is not None and settings.stage == 3 and not trunk.partitioned:
            layers = trunk.decoder.layers
            folder = session.run.path / "offload"
            running.enter_context(
                partitioned(trunk, settings.for_trunk(layers, hidden_size=trunk.hidden_size, folder=folder))
            )
        advice = (
            f"lower train.micro_batch_rows ({recipe.train.micro_batch_rows} now; train.gradient_accumulation makes up "
            f"for it) or data.row_length ({recipe.data.row_length} now), or set train.checkpoint_blocks=true"
        )
        with enough_memory("training", advice):
            train(trainer, session.resume)
