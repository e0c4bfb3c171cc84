"""The steps of a run that trains its trunk too: training, the model that comes out, and what to measure it on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mtpd.data.models import trunk_fingerprint
from mtpd.data.packing import PackedRows, Sample
from mtpd.data.store import HiddenStates
from mtpd.files import read_sealed
from mtpd.heads import Heads
from mtpd.parallel import ranks
from mtpd.run.directory import RunDirectory
from mtpd.run.material import spread
from mtpd.run.session import Session, load_trunk
from mtpd.run.training import train_heads
from mtpd.train.joint_trunk import AdaptedTrunk, FullTrunk, JointTrunk, PerplexityLimit, main_head_quality

PERPLEXITY_PROMPTS = 28
"""Held-out prompts on whose responses the main head is checked."""


def train_jointly(
    session: Session,
    heads: Heads,
    rows: PackedRows,
    store: HiddenStates | None,
    samples: Sequence[Sample],
    chosen_by: Sequence[Sample],
) -> None:
    """Trains heads and trunk, and writes the trunk to `trunk/`.

    Raises:
        MtpdError: the main head's perplexity rose by more than the recipe allows; no trunk is written then.
    """
    recipe, run, trunk = session.recipe, session.run, session.trunk
    settings = recipe.trunk
    common: dict[str, Any] = {
        "original_teacher": settings.teacher == "original",
        "learning_rate": settings.learning_rate,
    }
    joint: JointTrunk
    if settings.train == "full":
        joint = FullTrunk(trunk, **common)
    else:
        joint = AdaptedTrunk(trunk, rank=settings.rank, seed=recipe.seed, **common)
    checked = spread(list(samples), PERPLEXITY_PROMPTS)
    # Before any step, and in the number format of the measurements to come.
    before = float(ranks.from_main(lambda: main_head_quality(trunk, checked).perplexity))
    limit = PerplexityLimit(trunk, checked, recipe, before, run.perplexity)
    train_heads(session, heads, rows, store, chosen_by, joint=joint, callbacks=[limit])
    joint.write(run.trunk, session.tokenizer)
    trained, _ = load_trunk(recipe, str(run.trunk))
    heads.config = heads.config.model_copy(update={"trunk": trunk_fingerprint(trained.model)})


def with_trained_trunk(session: Session) -> Session:
    """The session with the trunk that the run trained, which writes responses of its own to the held-out prompts."""
    recipe, run = session.recipe, session.run
    found = read_sealed(run.perplexity, refusal="not perplexities of the main head")
    session.console.print(f"main head: perplexity {found['before']:.4f} before, {found['after']:.4f} after")
    trunk, _ = load_trunk(recipe, str(run.trunk))
    directory = RunDirectory(run.path)
    directory.held_out = run.held_out_after
    return replace(session, run=directory, trunk=trunk, fingerprint=trunk_fingerprint(trunk.model))
