"""Suites measured: prompts, the trunk's greedy responses (kept between calls), and acceptance on them."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mtpd.data.packing import Sample
from mtpd.data.prompts import Prompt, render
from mtpd.data.responses import generate_responses
from mtpd.decode.chances import Chances
from mtpd.decode.corpus import Corpus
from mtpd.errors import UserError
from mtpd.evaluate.acceptance import Acceptance, SuiteCounts
from mtpd.evaluate.contamination import TrainedPrompts
from mtpd.evaluate.decoded import measure_decoded
from mtpd.evaluate.drafters import drafts_together, measure_drafters, with_drafters
from mtpd.evaluate.offline import measure_offline
from mtpd.evaluate.slices import template_mode
from mtpd.evaluate.suites import Question, Suite
from mtpd.evaluate.trunk_quality import at_chance
from mtpd.files import fingerprint_json, short
from mtpd.heads import Heads
from mtpd.trunk import Trunk

logger = logging.getLogger(__name__)

GENERATION_BATCH = 64


@dataclass(frozen=True)
class Model:
    """A trunk with its tokenizer, to be measured."""

    trunk: Trunk
    tokenizer: Any
    fingerprint: str
    ends: Collection[int]


@dataclass
class Trace:
    """Samples of a measurement, and the seconds that it took."""

    responses: float = 0.0
    """Seconds for the trunk's greedy responses; near 0 where they were kept."""
    measuring: float = 0.0
    """Seconds for everything else."""
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    """By suite, what was measured on."""


def measure_suites(
    model: Model,
    heads: Heads,
    suites: Mapping[str, tuple[Suite, Sequence[Question]]],
    *,
    heads_fingerprint: str,
    mode: Literal["offline", "decoded"],
    responses: Path,
    chances: Chances | None = None,
    corpus: Corpus | None = None,
    trained: TrainedPrompts | None = None,
    progress: bool = True,
) -> tuple[Acceptance, Trace]:
    """Acceptance of heads on suites.

    Args:
        heads: in the trunk's number format; how many tokens they draft a round is their depth.
        suites: by name, the suite and its prompts.
        responses: folder in which the trunk's responses are kept by fingerprint (offline only).
        chances: how often drafts are right, to measure the heads also as a part of the drafter; None does not.
        corpus: other texts in which continuations are looked up too.
        trained: what the heads were trained on; prompts that it meets are marked, and warned of.

    Raises:
        UserError: no prompt of a suite fits into the model's context.
    """
    counts: dict[str, SuiteCounts] = {}
    trace = Trace()
    for name, (suite, questions) in suites.items():
        began = time.monotonic()
        if mode == "offline":
            samples = respond(model, name, suite, questions, responses, progress=progress)
        else:
            samples = prompts_alone(model, name, suite, questions)
        trace.samples[name] = samples
        trace.responses += time.monotonic() - began
        began = time.monotonic()
        if mode == "offline":
            measured = measure_offline(model.trunk, heads, samples, end_tokens=model.ends, progress=progress)
            if chances is not None and drafts_together(model.trunk):
                found = measure_drafters(
                    model.trunk, heads, samples, chances, corpus=corpus, end_tokens=model.ends, progress=progress
                )
                measured = {family: with_drafters(each, found) for family, each in measured.items()}
        else:
            measured = measure_decoded(
                model.trunk,
                heads,
                samples,
                chances=chances,
                corpus=corpus,
                max_new_tokens=suite.max_new_tokens,
                end_tokens=model.ends,
                progress=progress,
            )
        trace.measuring += time.monotonic() - began
        counts[name] = measured[name].model_copy(update={"settings": suite.settings})
        describe(counts[name], questions)
        mark_trained(counts[name], name, questions, trained)
    settings = {"dtype": str(model.trunk.dtype).removeprefix("torch."), "drafts": heads.depth}
    acceptance = Acceptance(
        mode=mode,
        settings=settings,
        trunk=model.fingerprint,
        heads=heads_fingerprint,
        random_trunk=at_chance(model.trunk, [each.prompt_ids for texts in trace.samples.values() for each in texts]),
        suites=counts,
    )
    return acceptance, trace


def respond(
    model: Model, name: str, suite: Suite, questions: Sequence[Question], folder: Path, *, progress: bool = True
) -> list[Sample]:
    """Greedy responses of the trunk to a suite, generated once and kept under a name that says what they depend on."""
    key = fingerprint_json(
        [model.fingerprint, suite.max_new_tokens, [_depended_on(question.prompt) for question in questions]]
    )
    return generate_responses(
        model.trunk.model,
        model.tokenizer,
        [question.prompt for question in questions],
        folder / f"{name}-{short(key)}.jsonl",
        trunk=model.fingerprint,
        max_new_tokens=suite.max_new_tokens,
        batch=GENERATION_BATCH,
        max_length=model.trunk.context,
        progress=progress,
    )


def _depended_on(prompt: Prompt) -> list[Any]:
    """What the response to a prompt depends on, and its id."""
    return [prompt.id, prompt.prompt, *([dict(prompt.template)] if prompt.template else [])]


def prompts_alone(model: Model, name: str, suite: Suite, questions: Sequence[Question]) -> list[Sample]:
    """The prompts that fit into the context with their responses, as samples without one."""
    kept = prompts_with_room(model.tokenizer, name, suite, questions, context=model.trunk.context)
    return [Sample.of(prompt.id, ids, [], name) for prompt, ids in kept]


def prompts_with_room(
    tokenizer: Any, name: str, suite: Suite, questions: Sequence[Question], *, context: int
) -> list[tuple[Prompt, list[int]]]:
    """The prompts that fit into the context with their responses, with their token ids.

    Raises:
        UserError: there are none.
    """
    rendered = [(question.prompt, render(tokenizer, question.prompt)) for question in questions]
    fitting = [(prompt, ids) for prompt, ids in rendered if len(ids) + suite.max_new_tokens <= context]
    if not fitting:
        raise UserError(
            f"suite {name}: no prompt fits into the context of {context} tokens with a response of "
            f"{suite.max_new_tokens}"
        )
    if len(fitting) < len(rendered):
        logger.warning("suite %s: %d prompts are longer than the context", name, len(rendered) - len(fitting))
    return fitting


def describe(suite: SuiteCounts, questions: Sequence[Question]) -> None:
    """Notes in each row what its prompt is, for slices."""
    by_id = {question.prompt.id: question for question in questions}
    for row in suite.rows or []:
        question = by_id[row.id]
        row.family, row.language = question.family or None, question.language
        row.mode = template_mode(question.prompt.template)


def mark_trained(suite: SuiteCounts, name: str, questions: Sequence[Question], trained: TrainedPrompts | None) -> None:
    """Notes in each row whether the heads were trained on its prompt."""
    if trained is None:
        return
    met = trained.meets([question.prompt.text for question in questions])
    by_id = {question.prompt.id: found for question, found in zip(questions, met, strict=True)}
    for row in suite.rows or []:
        row.trained = by_id[row.id]
    if suite.trained:
        exact = sum(row.trained == "exact" for row in suite.rows or [])
        logger.warning(
            "suite %s: the run was trained on %d of its %d prompts (%d word for word, %d nearly): "
            "its acceptance is too high, and a gate leaves these prompts out",
            name,
            suite.trained,
            suite.prompts,
            exact,
            suite.trained - exact,
        )
