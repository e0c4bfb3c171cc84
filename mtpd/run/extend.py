"""`mtpd extend`: more heads out of those of a finished run, stage after stage, and which depth pays.

Each stage is a run directory of its own, `extended/FORM-DEPTH` in the run it extends: whatever reads runs reads it. A
repeated call goes on after the last whole file of the newest stage.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mtpd.data.models import resolve_device
from mtpd.data.packing import PackedRows, Sample
from mtpd.data.store import HiddenStates
from mtpd.errors import UserError
from mtpd.evaluate.acceptance import Acceptance
from mtpd.evaluate.depths import Depths, depths_pay_table, measure_depths
from mtpd.files import fingerprint_file, read_sealed, sealed, write_whole
from mtpd.heads import WEIGHTS, Heads, build_heads, load_heads, save_heads
from mtpd.parallel import ranks
from mtpd.recipe import ExtendRecipe, Recipe, dump, stages_of
from mtpd.recipe.untrusted import refuse_untrusted
from mtpd.report.car import write_car
from mtpd.run.acceptance import keep_chances, keep_texts, measure, measure_together
from mtpd.run.check import extended_recipe
from mtpd.run.depths import held_out_counts
from mtpd.run.directory import RunDirectory, note_training
from mtpd.run.kept_heads import gain_of_run, keep_heads, verdict_line, wants_heads
from mtpd.run.material import (
    fill_together,
    hidden_states,
    measured_samples,
    other_families,
    split_prompts,
    spread,
    training_rows,
)
from mtpd.run.session import Session, start
from mtpd.run.training import train_heads
from mtpd.train.finished_depths import FinishedDepths

DECODED_PROMPTS, DECODED_TOKENS = 4, 64
"""Held-out prompts that every number of drafts decodes, and tokens of each, at most."""


@dataclass(frozen=True)
class Material:
    """Shared by all stages: session, samples, rows."""

    session: Session
    """Of the run that is extended."""
    samples: list[Sample]
    chosen_by: list[Sample]
    rows: Callable[[], tuple[PackedRows, HiddenStates | None]]
    """Rows to train on and what keeps their hidden states; not called where nothing is trained."""


def extend(
    path: Path, given: Mapping[str, Any], *, fresh: bool = False, progress: bool = True, untrusted: bool = False
) -> Path:
    """Extends the heads of a finished run.

    Args:
        given: keys of the recipe's `extend` section, in place of what the run's recipe says.
        fresh: deletes what an earlier call left of these stages.
        untrusted: the run is somebody else's, and so is what its recipe names.

    Returns:
        The directory of the last stage, or the run itself if no stage pays.

    Raises:
        UserError, MtpdError: with one line that names the cause.
    """
    recipe, run = extended_recipe(path, given), RunDirectory(path)
    if untrusted:
        # What a stage writes is in the run, wherever its recipe says that it lies.
        refuse_untrusted(recipe.model_dump(mode="json", exclude={"output"}), source=str(run.recipe))
    with ranks.joined(resolve_device(recipe.device)), start(recipe, run, progress=progress) as session:
        return _extend(session, fresh=fresh)


def _extend(session: Session, *, fresh: bool) -> Path:
    recipe, run = session.recipe, session.run
    heads = load_heads(run.heads, session.trunk, fingerprint=session.fingerprint).as_chain(what="mtpd extend")
    prompts = split_prompts(recipe)
    samples, chosen_by = measured_samples(session, prompts.held_out)

    def rows() -> tuple[PackedRows, HiddenStates | None]:
        packed = training_rows(session, prompts.train)
        return packed, hidden_states(session, packed, prompts.train)

    return extend_heads(Material(session, samples, chosen_by, rows), heads, fresh=fresh)


def extend_heads(material: Material, heads: Heads, *, fresh: bool = False) -> Path:
    """All stages that the recipe says; with `extend.auto`, as long as the newest depths pay."""
    session = material.session
    settings = session.recipe.extend
    reached = session.run
    for depth in stages_of(settings, heads.depth):
        if settings.auto and not _pays(material, heads, reached):
            return reached.path
        stage = _stage_directory(session.run, settings, depth)
        heads = _run_stage(material, stage, heads, reached, depth, fresh=fresh)
        _show(material, stage, heads)
        reached = stage
    if settings.auto:
        _pays(material, heads, reached)
    return reached.path


def _stage_directory(run: RunDirectory, settings: ExtendRecipe, depth: int) -> RunDirectory:
    untrained = "-untrained" if settings.steps == 0 else ""
    return RunDirectory(run.extended / f"{settings.form}-{depth}{untrained}")


def _begin(stage: RunDirectory, session: Session, heads: Heads, base: RunDirectory, depth: int, *, fresh: bool) -> None:
    """Makes the directory of a stage, or finds that it is the same stage.

    Raises:
        UserError: it holds a stage with other settings, or from other heads.
    """
    content = {
        "from": heads.depth,
        "to": depth,
        "heads": fingerprint_file(base.heads / WEIGHTS),
        **session.recipe.extend.model_dump(include={"form", "rank", "steps", "learning_rate"}),
    }
    if stage.stage.is_file() and not fresh:
        found = read_sealed(stage.stage, refusal="not a stage of an extension")
        other = [key for key, value in content.items() if found.get(key) != value]
        if other:
            raise UserError(
                f"{stage.path}: holds a stage with other {', '.join(other)}; start over with --fresh, or delete it"
            )
        return
    if stage.path.exists():
        shutil.rmtree(stage.path)
    stage.path.mkdir(parents=True)
    # Stages are read as runs, and what is not in them is that of the run.
    write_whole(stage.recipe, dump(session.recipe.model_copy(update={"output": stage.path})))
    for name in (session.run.provenance, session.run.trained_prompts):
        if name.is_file():
            shutil.copy2(name, stage.path / name.name)
    write_whole(stage.stage, json.dumps(sealed(content), indent=1) + "\n")


def _run_stage(
    material: Material, stage: RunDirectory, old: Heads, base: RunDirectory, depth: int, *, fresh: bool
) -> Heads:
    """Loops, trains and measures, or goes on with it."""
    ranks.from_main(lambda: _begin(stage, material.session, old, base, depth, fresh=fresh))
    ranks.wait_for(stage.stage)
    recipe = _stage_recipe(material.session.recipe, stage.path)
    # A checkpoint that a user names is one of the run.
    session = replace(material.session, run=stage, recipe=recipe, resume="auto")
    settings, trunk = session.recipe.extend, session.trunk
    trains = settings.steps != 0
    if wants_heads(stage):
        heads = old.extended(trunk, depth=depth, form=settings.form, rank=settings.rank, seed=session.recipe.seed)
        folder = stage.heads_before
        ranks.once(folder / WEIGHTS, lambda: heads, lambda heads: save_heads(heads, folder))
        measure(session, heads, material.samples, folder, stage.acceptance_before)
        if trains:
            rows, store = material.rows()
            fill_together(session, rows, store)
            # Blocks that serve all depths are trained on all of them.
            finished = None
            if settings.form != "shared":
                of_heads = read_sealed(stage.stage, refusal="not a stage of an extension")["heads"]
                finished = FinishedDepths(trunk, old, hidden_states(session, rows, [], of_heads=of_heads))
            train_heads(session, heads, rows, store, material.chosen_by, finished)
        ranks.from_main(lambda: save_heads(heads, stage.heads_trained if trains else stage.heads))
    if trains:
        keep_heads(session, material.samples)
    trained = load_heads(stage.heads, trunk, fingerprint=session.fingerprint).as_chain(what="mtpd extend")
    chances = keep_chances(session, trained, material.chosen_by or material.samples, None)
    measure(session, trained, material.samples, stage.heads, stage.acceptance)
    measure_together(session, trained, material.samples, chances, None)
    keep_texts(session, trained, material.samples)
    return trained


def _stage_recipe(recipe: Recipe, output: Path) -> Recipe:
    """Makes the recipe of a stage: its directory, steps and learning rate."""
    given = {"max_steps": recipe.extend.steps or None, "learning_rate": recipe.extend.learning_rate}
    changes = {key: value for key, value in given.items() if value is not None}
    return recipe.model_copy(update={"output": output, "train": recipe.train.model_copy(update=changes)})


def _measured_depths(material: Material, heads: Heads, run: RunDirectory) -> Depths | None:
    """Measures once which depth pays, and keeps it; None where the recipe decodes nothing."""
    session = material.session
    if not session.recipe.evaluation.decode_prompts:
        return None

    def measured() -> Depths:
        copy = build_heads(session.trunk, heads.config).as_chain(what="mtpd extend")
        copy.load_state_dict(heads.state_dict())
        prompts = spread(material.samples, min(DECODED_PROMPTS, session.recipe.evaluation.decode_prompts))
        return measure_depths(
            session.trunk,
            copy.to(session.trunk.dtype).eval(),
            [sample.prompt_ids for sample in prompts],
            max_new_tokens=min(DECODED_TOKENS, session.recipe.evaluation.max_new_tokens),
            end_tokens=session.ends,
            acceptance=held_out_counts(run),
            heads_fingerprint=fingerprint_file(run.heads / WEIGHTS),
        )

    ranks.once(run.depths, measured, lambda found: found.save(run.depths))
    return Depths.load(run.depths)


def _pays(material: Material, heads: Heads, run: RunDirectory) -> bool:
    """Whether the deepest head is the fastest number of drafts: only then can a deeper one gain anything."""
    found = _measured_depths(material, heads, run)
    assert found is not None, "extend.auto is refused without evaluation.decode_prompts"
    if not run.stage.is_file():
        material.session.console.print(depths_pay_table(found))
    pays = found.fastest == heads.depth
    if not pays:
        material.session.console.print(
            f"{run.path}: {found.fastest} of {heads.depth} drafts are the fastest here; a further stage does not pay",
            highlight=False,
            soft_wrap=True,
        )
    return pays


def _show(material: Material, stage: RunDirectory, heads: Heads) -> None:
    """Acceptance and speed of a stage, by depth."""
    before, after = Acceptance.load(stage.acceptance_before), Acceptance.load(stage.acceptance)
    apart = other_families(material.session.recipe)
    if ranks.is_main():
        sides = {"looped, untrained": before, "after training": after}
        write_car(stage.plot, stage.path.resolve().name, sides, apart=sorted(apart))
    owned = sum(parameter.numel() for parameter in heads.parameters())
    material.session.console.print(
        f"{stage.path}: {heads.depth} drafts from {owned:,} parameters; tau {before.total().tau:.3f} untrained, "
        f"{after.total().tau:.3f} now",
        highlight=False,
        soft_wrap=True,
    )
    found = _measured_depths(material, heads, stage)
    if found is not None:
        material.session.console.print(depths_pay_table(found, before))
    trained = material.session.recipe.extend.steps != 0
    gain = gain_of_run(material.session.recipe, stage) if trained else None
    if ranks.is_main():
        note_training(stage, None if gain is None else gain.noted())
    if gain is not None:
        material.session.console.print(verdict_line(gain, stage), highlight=False, soft_wrap=True)
