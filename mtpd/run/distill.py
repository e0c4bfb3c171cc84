"""`mtpd distill` from beginning to end. Each step leaves files, and a repeated call goes on after the last whole one.

recipe -> trunk -> prompts -> responses -> packed rows -> hidden states -> heads -> acceptance

Several ranks take the same steps. Responses, hidden states and training they share; the main rank alone starts heads,
measures and writes what is written once, and the others wait for its files. Where the trunk's layers are shared out
over the ranks, they do that together too, and the main rank writes.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from mtpd.data import builtin_models
from mtpd.data.models import load_model, resolve_device, resolve_dtype, trunk_fingerprint
from mtpd.data.packing import PackedRows, Sample, pack
from mtpd.data.prompts import Prompt, given_sample, load_prompts, split_held_out
from mtpd.data.responses import end_tokens, generate_responses
from mtpd.data.store import DiskStore, HiddenStates, MemoryStore, fill, store_key
from mtpd.errors import UserError, enough_memory
from mtpd.evaluate.contamination import write_signatures
from mtpd.formats.importing import native_form
from mtpd.heads import WEIGHTS, chain_of, configure_heads, load_heads, save_heads
from mtpd.parallel import ranks
from mtpd.parallel.partitioned_trunk import is_apart, trunk_apart
from mtpd.parallel.sequence import check_split, shared_trunk
from mtpd.recipe import Recipe, parse_recipe
from mtpd.run.acceptance import decode, measure, show
from mtpd.run.directory import RunDirectory, finish_provenance, open_together, write_provenance
from mtpd.run.held_out import set_apart, spread
from mtpd.run.new_heads import new_heads
from mtpd.run.training import train_heads
from mtpd.trunk import Trunk

logger = logging.getLogger(__name__)


@dataclass
class Session:
    """What the steps of one call share."""

    recipe: Recipe
    run: RunDirectory
    trunk: Trunk
    tokenizer: Any
    fingerprint: str
    ends: list[int]
    progress: bool
    resume: str = "auto"
    """What training goes on from: `auto` for the newest whole checkpoint, or one of the run by name."""


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
    session = replace(start(recipe, run, progress=progress), resume=resume)
    with trunk_apart(session.trunk, recipe, device=resolve_device(recipe.device), folder=run.offload):
        return _take_steps(session, console)


def _take_steps(session: Session, console: Console) -> Path:
    from mtpd.run.joint_training import train_jointly, with_trained_trunk  # which is made of the steps here

    recipe, run = session.recipe, session.run
    prompts = split_prompts(recipe)
    console.print(
        f"{recipe.model}: {session.trunk.name}, {session.trunk.depth} layers, {session.trunk.dtype}; "
        f"{len(prompts.train)} prompts to train on, {len(prompts.held_out)} held out"
    )
    rows = training_rows(session, prompts.train)
    trained = [*prompts.train, *given_texts(recipe)]
    if ranks.is_main():
        write_provenance(
            run,
            trunk=session.fingerprint,
            rows=rows.fingerprint,
            prompts=[prompt.fingerprint for prompt in trained],
        )
        if not run.trained_prompts.is_file():
            write_signatures(run.trained_prompts, [prompt.text for prompt in trained])
    store = hidden_states(session, rows, prompts.train)
    samples, apart = measured_samples(session, prompts.held_out)
    samples, chosen_by = set_apart(recipe, samples, apart)
    if not ranks.from_main((run.heads / WEIGHTS).is_file):
        fill_together(session, rows, store)
        heads = new_heads(session, rows, store)
        measure(session, heads, samples, run.heads_before, run.acceptance_before)
        if recipe.trunk.train == "frozen":
            train_heads(session, heads, rows, store, chosen_by)
        else:
            train_jointly(session, heads, rows, store, samples, chosen_by)
        if ranks.is_main():
            save_heads(heads, run.heads)
        ranks.barrier()
    if recipe.trunk.train != "frozen":
        session = with_trained_trunk(session, console)
        samples, chosen_by = set_apart(recipe, *measured_samples(session, prompts.held_out))
    heads = load_heads(run.heads, session.trunk, fingerprint=session.fingerprint)
    measure(session, heads, samples, run.heads, run.acceptance)
    if ranks.is_main():
        if recipe.evaluation.decode_prompts and recipe.trunk.train == "frozen":
            decode(session, samples)
        show(run, console, apart)
        finish_provenance(run)
    ranks.barrier()
    if recipe.extend.to is None and not recipe.extend.auto:
        return run.path
    from mtpd.run.extend import Material, extend_heads  # which is made of the steps here

    material = Material(session, samples, chosen_by, lambda: (rows, store))
    return extend_heads(material, chain_of(heads, what="extend.to"), console)


def with_native_depth(recipe: Recipe) -> Recipe:
    """The recipe with kind and depth of the model's own heads, where those are what it starts from and it sets none."""
    heads = recipe.heads
    if heads.init != "native":
        return recipe
    if heads.kind not in ("chain", "parallel"):
        raise UserError(f"heads.init: native is not accepted for {heads.kind} heads; accepted: chain, parallel")
    if heads.adapters:
        raise UserError(f"heads.adapters: {heads.adapters} is not accepted with native heads; accepted: 0")
    if heads.kind == "chain" and {"kind", "depth"} <= heads.model_fields_set:
        return recipe
    form = native_form(recipe.model)
    if "kind" in heads.model_fields_set and heads.kind != form["kind"]:
        raise UserError(f"heads.kind: {heads.kind} is not what {recipe.model} has; accepted: {form['kind']}")
    values = recipe.model_dump(mode="json")
    if "depth" in heads.model_fields_set:
        del form["depth"]
    values["heads"] |= form
    return parse_recipe(values)


def start(recipe: Recipe, run: RunDirectory, *, progress: bool) -> Session:
    """Loads the model and proves that heads can be built for it."""
    with ranks.main_first():
        if recipe.model == "demo":
            builtin_models.demo_directory()
    apart = is_apart(recipe)
    dtype = resolve_dtype(recipe.dtype, resolve_device(recipe.device))
    model, tokenizer = load_model(
        recipe.model,
        dtype=str(dtype).removeprefix("torch."),
        device="cpu" if apart else recipe.device,
        trust_remote_code=recipe.trust_remote_code,
        empty=apart and not ranks.is_main(),
    )
    trunk = Trunk(model, tokens=real_tokens(model, tokenizer))
    if ranks.is_main() or not apart:
        trunk.check()
        check_split(recipe, trunk, processes=ranks.count())
    check_row_length(recipe, trunk)
    check_heads(recipe, trunk)
    if trunk.recurrent and recipe.evaluation.decode_prompts:
        raise UserError(
            f"evaluation.decode_prompts: {recipe.evaluation.decode_prompts} is not accepted for {trunk.name}, whose "
            "linear attention cannot take rejected drafts back in mtpd's decoding; accepted: 0"
        )
    fingerprint = ranks.from_main(lambda: trunk_fingerprint(model))
    return Session(recipe, run, trunk, tokenizer, fingerprint, end_tokens(model, tokenizer), progress)


def check_row_length(recipe: Recipe, trunk: Trunk) -> None:
    """Raises UserError if a row is longer than what the model was made for."""
    if recipe.data.row_length > trunk.context:
        raise UserError(
            f"data.row_length: {recipe.data.row_length} is longer than the context of {recipe.model}; "
            f"accepted: at most {trunk.context}"
        )


def check_heads(recipe: Recipe, trunk: Trunk) -> None:
    """Raises UserError if the trunk cannot have the heads of the recipe; those of a checkpoint are what they are."""
    if recipe.heads.init != "native":
        configure_heads(recipe.heads.model_dump(), trunk, vocabulary=0, fingerprint="")


def real_tokens(model: Any, tokenizer: Any) -> int:
    """Rows of the vocabulary that are tokens; those past them only pad the matrix to a round size."""
    rows = model.get_output_embeddings().weight.shape[0]
    return min(rows, max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1))


def split_prompts(recipe: Recipe) -> Any:
    """Prompts to train on and held-out prompts, with nothing in both."""
    data = recipe.data
    prompts = load_prompts(data.prompts, split=data.split, subset=data.subset, limit=data.limit, seed=recipe.seed)
    held_out: list[Prompt] | None = None
    if data.held_out is not None or data.prompts == "builtin":
        source = data.held_out or "builtin"
        held_out = load_prompts("builtin-held-out" if source == "builtin" else source, seed=recipe.seed)
    return split_held_out(prompts, held_out, count=data.held_out_count, seed=recipe.seed)


def training_rows(session: Session, prompts: Sequence[Prompt]) -> PackedRows:
    """Responses of the trunk (or of the data) to all prompts, and given text, packed into rows."""
    data = session.recipe.data
    if data.responses == "trunk":
        samples = respond(
            session,
            prompts,
            session.run.responses,
            temperature=data.temperature,
            top_p=data.top_p,
            max_new_tokens=data.max_new_tokens,
        )
    else:
        samples = [given_sample(session.tokenizer, prompt, end_tokens=session.ends) for prompt in prompts]
    samples += [given_sample(session.tokenizer, text, end_tokens=session.ends) for text in given_texts(session.recipe)]
    return pack(samples, row_length=data.row_length, alone=session.trunk.recurrent)


def given_texts(recipe: Recipe) -> list[Prompt]:
    """Further texts to train on, which have their own responses."""
    return [
        text
        for given in recipe.data.given
        for text in load_prompts(
            given.prompts, split=given.split, subset=given.subset, limit=given.limit, seed=recipe.seed
        )
    ]


def respond(
    session: Session,
    prompts: Sequence[Prompt],
    path: Path,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> list[Sample]:
    """Answers of the trunk; greedy unless a temperature says otherwise."""
    batch = session.recipe.data.generation_batch
    with enough_memory("generating responses", f"lower data.generation_batch ({batch} now)"):
        return generate_responses(
            session.trunk.model,
            session.tokenizer,
            prompts,
            path,
            trunk=session.fingerprint,
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            batch=batch,
            seed=session.recipe.seed,
            max_length=session.trunk.context,
            together=True,
            progress=session.progress,
        )


def hidden_states(session: Session, rows: PackedRows, prompts: Sequence[Prompt]) -> HiddenStates | None:
    """What keeps the states that heads read, if the recipe keeps them; it may have none of them yet."""
    data = session.recipe.data
    if data.hidden_states == "recompute":
        return None
    if data.hidden_states == "memory":
        return MemoryStore(session.trunk, rows)
    key = store_key(
        session.fingerprint,
        session.tokenizer,
        [prompt.fingerprint for prompt in prompts],
        rows,
        before_last=session.recipe.heads.shared_layers,
    )
    return DiskStore(data.store or session.run.hidden_states, session.trunk, rows, key=key, together=True)


def fill_together(session: Session, rows: PackedRows, store: HiddenStates | None) -> None:
    """Fills a store on the disk ahead of training where there are several ranks, each with its share of the rows.

    In training a rank meets rows that another one has computed, and would compute them again.
    """
    if isinstance(store, DiskStore) and store.shared:
        fill_store(session, rows, store)


def fill_store(session: Session, rows: PackedRows, store: HiddenStates) -> None:
    """Fills a store, in as many rows at a time as training has."""
    recipe = session.recipe
    with shared_trunk(recipe, session.trunk) as trunk:
        fill(
            store,
            trunk,
            rows,
            batch_rows=recipe.train.rows_per_step,
            before_last=recipe.heads.shared_layers,
            together=recipe.train.sequence_parallel,
            progress=session.progress,
        )


def measured_samples(session: Session, held_out: Sequence[Prompt]) -> tuple[list[Sample], frozenset[str]]:
    """Greedy answers to the held-out prompts, and to those of further suites.

    Returns:
        The samples, and the names of the further suites.
    """
    evaluation = session.recipe.evaluation
    chosen = spread(list(held_out), evaluation.prompts_limit)
    apart: list[str] = []
    for source in evaluation.extra:
        name = Path(source).stem
        apart.append(name)
        extra = load_prompts(source, limit=evaluation.prompts_limit, seed=session.recipe.seed)
        chosen += [Prompt(f"{name}:{prompt.id}", prompt.prompt, family=name) for prompt in extra]
    samples = respond(session, chosen, session.run.held_out, max_new_tokens=evaluation.max_new_tokens)
    return samples, frozenset(apart)
