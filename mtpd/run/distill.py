"""`mtpd distill` from beginning to end. Each step leaves files, and a repeated call goes on after the last whole one.

recipe -> trunk -> prompts -> responses -> packed rows -> hidden states -> heads -> acceptance

Several ranks take the same steps. Responses, hidden states and training they share; the main rank alone starts heads,
measures and writes what is written once, and the others wait for its files. Where the trunk's layers are shared out
over the ranks, they do that together too, and the main rank writes.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from mtpd.data.models import resolve_device
from mtpd.evaluate.contamination import write_signatures
from mtpd.heads import WEIGHTS, load_heads, save_heads
from mtpd.parallel import ranks
from mtpd.parallel.partitioned_trunk import trunk_apart
from mtpd.recipe import Recipe
from mtpd.run.acceptance import decode, keep_chances, keep_corpus, keep_texts, measure, measure_together, show
from mtpd.run.directory import finish_provenance, is_finished, open_together, write_provenance
from mtpd.run.extend import Material, extend_heads
from mtpd.run.joint_training import train_jointly, with_trained_trunk
from mtpd.run.kept_heads import gain_of_run, keep_heads, verdict
from mtpd.run.material import (
    fill_together,
    given_texts,
    hidden_states,
    measured_samples,
    set_apart,
    split_prompts,
    training_rows,
)
from mtpd.run.new_heads import new_heads
from mtpd.run.session import Session, start, with_native_depth
from mtpd.run.training import train_heads

logger = logging.getLogger(__name__)


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
        return _distill(with_native_depth(recipe), fresh=fresh, resume=resume, progress=progress and ranks.is_main())


def _distill(recipe: Recipe, *, fresh: bool, resume: str, progress: bool) -> Path:
    # Wide enough for the tables where the output is a file.
    console = Console(quiet=not progress, width=None if sys.stdout.isatty() else 132)
    run = open_together(recipe, fresh=fresh, resume=resume)
    finished = ranks.from_main(lambda: is_finished(run))
    session = replace(start(recipe, run, progress=progress), resume=resume)
    with trunk_apart(session.trunk, recipe, device=resolve_device(recipe.device), folder=run.offload):
        path = _take_steps(session, console)
    if finished and path == run.path:
        console.print("nothing was left to do: the run was finished before; --fresh starts over", highlight=False)
    return path


def _take_steps(session: Session, console: Console) -> Path:
    recipe, run = session.recipe, session.run
    frozen = recipe.trunk.train == "frozen"
    prompts = split_prompts(recipe)
    console.print(
        f"{recipe.model}: {session.trunk.name}, {session.trunk.depth} layers, {session.trunk.dtype}; "
        f"{len(prompts.train)} prompts to train on, {len(prompts.held_out)} held out"
    )
    rows = training_rows(session, prompts.train)
    texts = [*prompts.train, *given_texts(recipe)]
    if ranks.is_main():
        write_provenance(
            run,
            trunk=session.fingerprint,
            rows=rows.fingerprint,
            prompts=[prompt.fingerprint for prompt in texts],
        )
        if not run.trained_prompts.is_file():
            write_signatures(run.trained_prompts, [prompt.text for prompt in texts])
    store = hidden_states(session, rows, prompts.train)
    samples, apart = measured_samples(session, prompts.held_out)
    samples, chosen_by = set_apart(recipe, samples, apart)
    if not ranks.from_main((run.heads / WEIGHTS).is_file):
        trained = run.heads_trained if frozen else run.heads
        if not ranks.from_main((trained / WEIGHTS).is_file):
            fill_together(session, rows, store)
            heads = new_heads(session, rows, store)
            measure(session, heads, samples, run.heads_before, run.acceptance_before)
            if frozen:
                train_heads(session, heads, rows, store, chosen_by)
            else:
                train_jointly(session, heads, rows, store, samples, chosen_by)
            if ranks.is_main():
                save_heads(heads, trained)
            ranks.barrier()
        if frozen:
            keep_heads(session, samples)
    if not frozen:
        session = with_trained_trunk(session, console)
        samples, chosen_by = set_apart(recipe, *measured_samples(session, prompts.held_out))
    heads = load_heads(run.heads, session.trunk, fingerprint=session.fingerprint)
    # Counted on other texts than it is measured on, where there are some.
    corpus = keep_corpus(session, rows)
    chances = keep_chances(session, heads, chosen_by or samples, corpus)
    measure(session, heads, samples, run.heads, run.acceptance)
    measure_together(session, heads, samples, chances, corpus)
    keep_texts(session, heads, samples)
    if ranks.is_main():
        if recipe.evaluation.decode_prompts and frozen:
            decode(session, samples)
        show(run, console, apart)
        finish_provenance(run, gain_of_run(recipe, run).noted() if frozen else None)
    ranks.barrier()
    for line in verdict(session, rows) if frozen else ():
        console.print(line, highlight=False, soft_wrap=True)
    if recipe.extend.to is None and not recipe.extend.auto:
        return run.path
    material = Material(session, samples, chosen_by, lambda: (rows, store))
    return extend_heads(material, heads.as_chain(what="extend.to"), console)
