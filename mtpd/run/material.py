"""Training and measuring material of a run: prompts, responses, packed rows, hidden states, held-out samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mtpd.data.disk_store import DiskStore, fill
from mtpd.data.given import given_samples
from mtpd.data.packing import PackedRows, Sample, pack
from mtpd.data.prompts import HeldOutSplit, Prompt, load_prompts, split_held_out
from mtpd.data.rendering import render_all, warn_of_control_tokens
from mtpd.data.responses import cut_responses, generate_responses
from mtpd.data.rows.left_out import LeftOut, Unusable
from mtpd.data.sources import built_in
from mtpd.data.store import HiddenStates, MemoryStore, store_key
from mtpd.errors import UserError, enough_memory
from mtpd.parallel.sequence import shared_trunk
from mtpd.recipe import Recipe
from mtpd.recipe.sections import GivenText
from mtpd.run.check import row_format
from mtpd.run.other_answers import other_answers
from mtpd.run.session import Session

CHOOSING_PROMPTS = 28
"""Held-out prompts at most that choose among checkpoints."""


def split_prompts(recipe: Recipe, left_out: LeftOut | None = None) -> HeldOutSplit:
    """Prompts to train on and held-out prompts, with nothing in both.

    Args:
        left_out: counts the rows that cannot be used.
    """
    data, form = recipe.data, row_format(recipe.data)
    counted = LeftOut(data.max_unusable) if left_out is None else left_out
    prompts = load_prompts(
        data.prompts,
        split=data.split,
        subset=data.subset,
        limit=data.limit,
        seed=recipe.seed,
        form=form,
        left_out=counted,
    )
    held_out: list[Prompt] | None = None
    if data.held_out is not None or data.prompts == "builtin":
        source = data.held_out or "builtin"
        if built_in(source):
            form = row_format(data, columns=False)
        held_out = load_prompts(
            "builtin-held-out" if source == "builtin" else source, seed=recipe.seed, form=form, left_out=counted
        )
    return split_held_out(prompts, held_out, count=data.held_out_count, seed=recipe.seed)


def training_rows(session: Session, prompts: Sequence[Prompt], left_out: LeftOut | None = None) -> PackedRows:
    """Responses of the trunk (or of the data) to all prompts, and given text, packed into rows.

    Args:
        left_out: counts the prompts that cannot be used, beside the rows that could not be read.
    """
    data = session.recipe.data
    found = LeftOut(data.max_unusable)
    warn_of_control_tokens(session.tokenizer, prompts)
    if data.responses != "given":
        asked = usable(session, prompts, found)
        # Before hours of answering.
        found.check(len(prompts), source="data.prompts")
        samples = respond(
            session,
            asked,
            session.run.responses,
            temperature=data.temperature,
            top_p=data.top_p,
            max_new_tokens=data.max_new_tokens,
            row_length=data.row_length,
        )
        cut, count = cut_responses(samples, session.ends)
        session.responses = {"count": count, "cut": cut}
    else:
        samples = _given(session, prompts, found)
        found.check(len(prompts), source="data.prompts")
    of_texts = LeftOut(data.max_unusable)
    if texts := given_texts(session.recipe):
        samples += _given(session, texts, of_texts)
        of_texts.check(len(texts), source="data.given")
    if left_out is not None:
        left_out.take(found)
        left_out.take(of_texts)
    return pack(samples, row_length=data.row_length, alone=session.trunk.recurrent)


def usable(session: Session, prompts: Sequence[Prompt], left_out: LeftOut) -> list[Prompt]:
    """Prompts that can be answered; without a chat template there are no rounds."""
    tokenizer, tokens = session.tokenizer, session.recipe.data.max_new_tokens
    kept = with_room(tokenizer, prompts, left_out, context=session.trunk.context, max_new_tokens=tokens)
    return [prompt if tokenizer.chat_template else replace(prompt, later=()) for prompt, _ in kept]


def with_room(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    left_out: LeftOut,
    *,
    context: int,
    max_new_tokens: int,
) -> list[tuple[Prompt, list[int]]]:
    """Prompts with their token ids: those that the template takes and that leave room for an answer in the context."""
    kept = []
    for prompt, ids in render_all(tokenizer, prompts, left_out):
        if len(ids) + max_new_tokens > context:
            left_out.add(
                Unusable(
                    "longer than the context",
                    f"{prompt.name}: its {len(ids)} tokens and data.max_new_tokens={max_new_tokens} do not fit "
                    f"into the context of {context}",
                )
            )
        else:
            kept.append((prompt, ids))
    return kept


def _given(session: Session, prompts: Sequence[Prompt], left_out: LeftOut) -> list[Sample]:
    """Documents of rows that have their own responses."""
    samples: list[Sample] = []
    for prompt in prompts:
        try:
            samples += given_samples(session.tokenizer, prompt, end_tokens=session.ends)
        except Unusable as error:
            left_out.add(error)
    return samples


def given_texts(recipe: Recipe) -> list[Prompt]:
    """Further texts to train on, which have their own responses."""
    return [text for given in recipe.data.given for text in load_given(recipe, given)]


def load_given(recipe: Recipe, given: GivenText) -> list[Prompt]:
    """The texts of one entry of `data.given`."""
    return load_prompts(
        given.prompts,
        split=given.split,
        subset=given.subset,
        limit=given.limit,
        seed=recipe.seed,
        form=row_format(recipe.data, columns=False),
        left_out=LeftOut(recipe.data.max_unusable),
    )


def respond(
    session: Session,
    prompts: Sequence[Prompt],
    path: Path,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    row_length: int | None = None,
) -> list[Sample]:
    """Answers of the trunk; greedy unless a temperature says otherwise."""
    batch = session.recipe.data.generation_batch
    with (
        enough_memory("generating responses", f"lower data.generation_batch ({batch} now)"),
        other_answers(
            session,
            training=row_length is not None,
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
        ) as others,
    ):
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
            row_length=row_length,
            together=True,
            progress=session.progress,
            others=others,
        )


def hidden_states(
    session: Session, rows: PackedRows, prompts: Sequence[Prompt], *, of_heads: str | None = None
) -> HiddenStates | None:
    """Opens the store of the states that heads read, if the recipe keeps them; it may have none of them yet.

    Args:
        of_heads: the fingerprint of heads whose states these are, for the stages that train more; None: the trunk's.
    """
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
    folder = data.store or session.run.hidden_states
    if of_heads is not None:
        key["heads"], folder = of_heads, session.run.hidden_states
    return DiskStore(folder, session.trunk, rows, key=key, together=True)


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
            batch_rows=recipe.train.micro_batch_rows,
            before_last=recipe.heads.shared_layers,
            together=recipe.train.sequence_parallel,
            progress=session.progress,
        )


def other_families(recipe: Recipe) -> frozenset[str]:
    """Names of the suites that are measured beside the held-out prompts."""
    return frozenset(Path(source).stem for source in recipe.evaluation.extra)


def measured_prompts(recipe: Recipe, held_out: Sequence[Prompt]) -> list[Prompt]:
    """Held-out prompts that are measured on, and those of further suites."""
    evaluation = recipe.evaluation
    # Of a conversation the first round is measured: one prompt, one response.
    asked = [replace(prompt, later=()) for prompt in spread(list(held_out), evaluation.prompts_limit)]
    form = row_format(recipe.data, columns=False)
    for source in evaluation.extra:
        name = Path(source).stem
        extra = load_prompts(source, limit=evaluation.prompts_limit, seed=recipe.seed, form=form)
        asked += [replace(prompt, id=f"{name}:{prompt.id}", family=name, later=()) for prompt in extra]
    return asked


def measured_samples(session: Session, held_out: Sequence[Prompt]) -> tuple[list[Sample], list[Sample]]:
    """Greedy answers to the held-out prompts, and to those of further suites.

    Returns:
        Samples to measure the finished heads on, and those that choose among checkpoints while training. None is in
        both: heads chosen for their tau on some prompts look better on them than they are.

    Raises:
        UserError: nothing would be left to measure on.
    """
    evaluation = session.recipe.evaluation
    asked = measured_prompts(session.recipe, held_out)
    left_out = LeftOut(session.recipe.data.max_unusable)
    asked = [prompt for prompt, _ in render_all(session.tokenizer, asked, left_out)]
    left_out.check(len(asked) + left_out.total, source="data.held_out")
    samples = respond(session, asked, session.run.held_out, max_new_tokens=evaluation.max_new_tokens)
    if not evaluation.steps:
        return samples, []
    apart = other_families(session.recipe)
    of_prompts = [sample for sample in samples if sample.family not in apart]
    chosen = spread(of_prompts, min(CHOOSING_PROMPTS, len(of_prompts) // 2))
    if not chosen:
        raise UserError(
            f"evaluation.steps: {evaluation.steps} is not accepted with {len(of_prompts)} measured prompts, of "
            "which half choose among checkpoints; accepted: 0, or two prompts at least (evaluation.prompts_limit)"
        )
    names = {sample.id for sample in chosen}
    return [sample for sample in samples if sample.id not in names], chosen


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items, taken in turns from each family so that all are represented."""
    families: dict[str, list[Any]] = {}
    for item in items:
        families.setdefault(item.family, []).append(item)
    turns = [
        family[turn]
        for turn in range(max(map(len, families.values()), default=0))
        for family in families.values()
        if turn < len(family)
    ]
    return turns[:count]
