"""How many rows a step has, whichever number of processes computes it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from mtpd.errors import UserError
from mtpd.recipe.pretrain import PretrainTraining
from mtpd.recipe.sections import TrainRecipe
from mtpd.train.optimizer_state import read_step_rows

logger = logging.getLogger(__name__)


def processes() -> int:
    """Counts the processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def accumulation(train: TrainRecipe | PretrainTraining, directory: Path, processes: int, *, parts: int = 1) -> int:
    """Micro batches of an optimizer step in each process, or in those that share rows.

    A run that goes on with another number of processes keeps the rows of its steps: they decide what a step is.

    Args:
        directory: of the run; its checkpoints say how many rows their steps have.
        parts: processes that share each row.

    Raises:
        UserError: these processes cannot have as many rows in a step.
    """
    at_once = train.micro_batch_rows * (processes // parts)
    found = (read_step_rows(checkpoint) for checkpoint in sorted(directory.glob("checkpoint-*")))
    before = next((rows for rows in found if rows), None)
    if before is None or before == at_once * train.gradient_accumulation:
        return train.gradient_accumulation
    if before % at_once:
        most = before // train.micro_batch_rows
        counts = [parts * n for n in range(1, most + 1) if most % n == 0]
        raise UserError(
            f"{directory}: its steps have {before} rows, and {processes} processes have {at_once} at a time "
            f"(train.micro_batch_rows: {train.micro_batch_rows}); accepted numbers of processes: "
            + ", ".join(map(str, counts))
        )
    logger.warning(
        "%s: steps of %d rows go on as %d micro batches in each process", directory, before, before // at_once
    )
    return before // at_once
