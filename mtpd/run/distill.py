"""`mtpd distill` from beginning to end. Each step leaves files, and a repeated call goes on after the last whole one.

recipe -> trunk -> prompts -> responses -> packed rows -> hidden states -> heads -> acceptance

Several ranks take the same steps. Responses, hidden states and training they share; the main rank alone starts heads,
measures and writes what is written once, and the others wait for its files. Where the trunk's layers are shared out
over the ranks, they do that together too, and the main rank writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mtpd.data.models import describe_device, resolve_device
from mtpd.data.packing import PackedRows, Sample
from mtpd.data.prompts import Prompt
from mtpd.data.rows.left_out import LeftOut
from mtpd.evaluate.contamination import write_signatures
from mtpd.heads import load_heads, save_heads
from mtpd.parallel import ranks
from mtpd.recipe import Recipe
from mtpd.run.acceptance import decode, keep_chances, keep_corpus, keep_texts, measure, measure_together, show
from mtpd.run.directory import finish_provenance, is_finished, open_together, write_provenance
from mtpd.run.extend import Material, extend_heads
from mtpd.run.joint_training import train_jointly, with_trained_trunk
from mtpd.run.kept_heads import gain_of_run, keep_heads, verdict, wants_heads
from mtpd.run.material import (
    fill_together,
    given_texts,
    hidden_states,
    measured_samples,
    other_families,
    split_prompts,
    training_rows,
)
from mtpd.run.new_heads import new_heads
from mtpd.run.session import Session, start, with_fitting_defaults, with_native_depth
from mtpd.run.training import train_heads


def distill(recipe: Recipe, *, fresh: bool = False, resume: str = "auto", progress: bool = True) -> Path:
    """Trains heads as the recipe says, and measures them before and after.

    Args:
        recipe: from `mtpd.recipe.load_recipe`.
        fresh: deletes an earlier run in the same directory instead of going on with it.
        resume: what training goes on from: `auto` for the newest whole checkpoint of the run, or one of them by name,
            after which the later ones are deleted.
        progress: shows bars and tables.

    Returns:
        The run directory.

    Raises:
        UserError, MtpdError: with one line that names the cause.
    """
    with ranks.joined(resolve_device(recipe.device)):
        recipe = with_native_depth(with_fitting_defaults(recipe))
        run = open_together(recipe, fresh=fresh, resume=resume)
        finished = ranks.from_main(lambda: is_finished(run))
        with start(recipe, run, progress=progress, resume=resume) as session:
            path = _take_steps(session)
        if finished and path == run.path:
            told = "nothing was left to do: the run was finished before; --fresh starts over"
            session.console.print(told, highlight=False)
    return path


def _take_steps(session: Session) -> Path:
    recipe, run = session.recipe, session.run
    frozen = recipe.trunk.train == "frozen"
    left_out = LeftOut(recipe.data.max_unusable)
    prompts = split_prompts(recipe, left_out)
    session.console.print(
        f"{recipe.model}: {session.trunk.name}, {session.trunk.depth} layers, {session.trunk.dtype} on "
        f"{describe_device(session.trunk.device)}; "
        f"{len(prompts.train)} prompts to train on, {len(prompts.held_out)} held out"
    )
    rows = training_rows(session, prompts.train, left_out)
    ranks.from_main(lambda: _note_texts(session, rows, [*prompts.train, *given_texts(recipe)], left_out))
    store = hidden_states(session, rows, prompts.train)
    samples, chosen_by = measured_samples(session, prompts.held_out)
    if wants_heads(run):
        fill_together(session, rows, store)
        heads = new_heads(session, rows, store)
        measure(session, heads, samples, run.heads_before, run.acceptance_before)
        if frozen:
            train_heads(session, heads, rows, store, chosen_by)
        else:
            train_jointly(session, heads, rows, store, samples, chosen_by)
        ranks.from_main(lambda: save_heads(heads, run.heads_trained if frozen else run.heads))
    if frozen:
        keep_heads(session, samples)
    else:
        session = with_trained_trunk(session)
        samples, chosen_by = measured_samples(session, prompts.held_out)
    heads = load_heads(run.heads, session.trunk, fingerprint=session.fingerprint)
    # Counted on other texts than it is measured on, where there are some.
    corpus = keep_corpus(session, rows)
    chances = keep_chances(session, heads, chosen_by or samples, corpus)
    measure(session, heads, samples, run.heads, run.acceptance)
    measure_together(session, heads, samples, chances, corpus)
    keep_texts(session, heads, samples)
    ranks.from_main(lambda: _finish(session, samples))
    for line in verdict(session, rows) if frozen else ():
        session.console.print(line, highlight=False, soft_wrap=True)
    if recipe.extend.to is None and not recipe.extend.auto:
        return run.path
    material = Material(session, samples, chosen_by, lambda: (rows, store))
    return extend_heads(material, heads.as_chain(what="extend.to"))


def _note_texts(session: Session, rows: PackedRows, texts: Sequence[Prompt], left_out: LeftOut) -> None:
    """Writes what the heads come from, and the signatures of all texts to train on."""
    run, prompts = session.run, [prompt.fingerprint for prompt in texts]
    write_provenance(
        run,
        trunk=session.fingerprint,
        rows=rows.fingerprint,
        prompts=prompts,
        left_out=left_out.noted(),
        responses=session.responses,
    )
    if not run.trained_prompts.is_file():
        write_signatures(run.trained_prompts, [prompt.text for prompt in texts])


def _finish(session: Session, samples: Sequence[Sample]) -> None:
    """Decodes, shows what came out, and writes the file that is the last of a run."""
    recipe, run = session.recipe, session.run
    frozen = recipe.trunk.train == "frozen"
    if recipe.evaluation.decode_prompts and frozen:
        decode(session, samples)
    show(run, session.console, other_families(recipe))
    finish_provenance(run, gain_of_run(recipe, run).noted() if frozen else None)
