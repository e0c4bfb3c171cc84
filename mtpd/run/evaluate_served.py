"""`mtpd eval --server`: the acceptance that a running server has, beside what was measured offline."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from mtpd.data.answers.task import Task
from mtpd.data.models import real_tokens
from mtpd.errors import UserError
from mtpd.evaluate import tables
from mtpd.evaluate.acceptance import Acceptance
from mtpd.evaluate.beside_offline import beside_offline
from mtpd.evaluate.compare import console
from mtpd.evaluate.intervals import intervals
from mtpd.evaluate.load import Load
from mtpd.evaluate.measure import describe, mark_trained, prompts_with_room
from mtpd.evaluate.served import Asked, DraftingServer, Pass, ask, load_of, suite_counts
from mtpd.evaluate.suites import Question, Suite, questions
from mtpd.evaluate.versions import library_versions
from mtpd.files import fingerprint_file
from mtpd.finished_run import open_finished
from mtpd.heads import WEIGHTS, read_config
from mtpd.run.directory import RunDirectory
from mtpd.run.evaluate import conclude, fitting, show_measured
from mtpd.run.finished import trained_prompts
from mtpd.run.request import Request, check_request
from mtpd.run.without_weights import without_weights
from mtpd.trunk import Trunk


def evaluate_server(
    request: Request, url: str, *, plain: str | None, concurrency: Sequence[int], progress: bool = True
) -> int:
    """Measures, prints and writes; gives the exit code. The model's weights are not read.

    Args:
        plain: a server of the same model without drafts: texts and speeds are compared with it.
        concurrency: requests at a time, one pass over the prompts each; the counts are of the first.

    Raises:
        UserError: a mistake in the request, a server that drafts nothing, or has another model.
        MtpdError: a server that fails.
    """
    began = time.monotonic()
    opened = open_finished(request.run, heads=request.heads, untrusted=request.untrusted)
    recipe, run = opened.recipe, RunDirectory(request.run)
    baseline = request.baseline()
    past = request.past()
    asked = {name: (suite, questions(name, suite)) for name, suite in check_request(request, baseline).items()}
    model, tokenizer, ends = without_weights(recipe, opened.model)
    context = Trunk(model).context
    asked = fitting(tokenizer, asked, context=context)
    suites = _tasks(tokenizer, asked, context=context)
    settings: dict[str, Any] = {
        "model": opened.model,
        "ends": ends,
        "tokens": real_tokens(model, tokenizer),
        "max_new_tokens": max(suite.max_new_tokens for suite, _ in suites.values()),
        "at_a_time": max(concurrency),
    }
    server = DraftingServer(url, tokenizer, key="--server", **settings)
    counters = server.counters()
    if counters.drafts is None:
        raise UserError(f"{server.place}: {counters.engine.without_drafts}")
    server.server.further = counters.engine.request
    without = None if plain is None else DraftingServer(plain, tokenizer, key="--plain-server", **settings)
    passes: list[Load] = []
    for at_a_time in concurrency:
        found = ask(server, suites, concurrency=at_a_time, words="served", progress=progress)
        other = None
        if without is not None:
            other = _undrafted(without, ask(without, suites, concurrency=at_a_time, words="plain", progress=progress))
        if not passes:
            counts = suite_counts(server, found, suites, other)
            trained = trained_prompts(run)
            for name, (_, of_suite) in asked.items():
                describe(counts[name], of_suite)
                mark_trained(counts[name], name, of_suite, trained)
        passes.append(load_of(found, other))
    heads = read_config(request.run / request.heads)
    acceptance = Acceptance(
        mode="served",
        settings={"drafts": len(passes[0].accepted), "concurrency": concurrency[0]},
        trunk=heads.trunk,
        heads=fingerprint_file(request.run / request.heads / WEIGHTS),
        versions=library_versions() | {"server": server.version(counters.engine.name)},
        suites=counts,
        loads=passes,
    )
    if request.drafts is not None and request.drafts != acceptance.total().depth:
        raise UserError(
            f"--drafts: {request.drafts} is not accepted, the server drafts {acceptance.total().depth} tokens at a time"
        )
    beside = None
    if run.evaluation.is_file():
        beside = beside_offline(acceptance, Acceptance.load(run.evaluation), place=server.place)
    path = request.output or run.evaluation_served
    acceptance.save(path)
    to, estimates = console(quiet=not progress), intervals(acceptance)
    show_measured(to, acceptance, estimates, by=request.asked.by)
    to.print(tables.loads_table(passes))
    to.print(
        f"mtpd eval {request.run} --drafts {acceptance.total().depth} measures the same offline, to compare with"
        if beside is None
        else beside.words,
        highlight=False,
        soft_wrap=True,
    )
    return conclude(request, acceptance, baseline, path, estimates, to=to, began=began, past=past)


def _undrafted(server: DraftingServer, found: Pass) -> Pass:
    for counted in found.counted.values():
        if counted.drafts:
            raise UserError(f"{server.place}: drafts too; accepted: a server without {counted.engine.option}")
    return found


def _tasks(tokenizer: Any, asked: Mapping[str, tuple[Suite, Sequence[Question]]], *, context: int) -> Asked:
    """The prompts of each suite that leave room for an answer."""
    return {
        name: (suite, [Task(*each) for each in prompts_with_room(tokenizer, name, suite, found, context=context)])
        for name, (suite, found) in asked.items()
    }
