"""The training step of a run, and of each stage of an extension."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from mtpd.data.packing import PackedRows, Sample
from mtpd.data.store import HiddenStates
from mtpd.distill.arguments import loss_settings, training_arguments
from mtpd.distill.below import FinishedDepths
from mtpd.distill.callbacks import MeasuringTrainer, stopping
from mtpd.distill.joint import JointTrunk
from mtpd.distill.model import DistillModel
from mtpd.distill.trainer import Metrics, train
from mtpd.errors import enough_memory
from mtpd.heads import Heads

if TYPE_CHECKING:
    from mtpd.distill.run import Session

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
    """
    recipe = session.recipe
    after = 0 if below is None else below.depth
    model = DistillModel(
        session.trunk,
        heads,
        loss_settings(recipe, depth=heads.depth, after=after),
        compiled=recipe.train.compile,
        checkpoint_blocks=recipe.train.checkpoint_blocks,
        after=after,
        joint=joint,
    )
    arguments = training_arguments(recipe, dtype=session.trunk.dtype, device=session.trunk.device)
    if arguments.world_size > 1 and store is not None and not all(row in store for row in range(len(rows))):
        logger.warning(
            "data.hidden_states: several processes do not fill a store, the trunk runs in each epoch; "
            "`mtpd data store` fills it ahead of training"
        )
        store = None
    if arguments.world_size > 1 and below is not None:
        below.store = None
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
    advice = (
        f"lower train.rows_per_step ({recipe.train.rows_per_step} now; train.gradient_accumulation makes up for it) or "
        f"data.row_length ({recipe.data.row_length} now), or set train.checkpoint_blocks=true"
    )
    with enough_memory("training", advice):
        train(trainer, session.resume)
