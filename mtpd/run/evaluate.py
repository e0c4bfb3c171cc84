"""`mtpd eval` from beginning to end: open the run, measure its heads on suites, compare, write."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from mtpd.data.models import resolve_device, trunk_fingerprint
from mtpd.decode.chances import read_chances
from mtpd.decode.corpus import read_corpus
from mtpd.errors import UserError
from mtpd.evaluate import gate, outputs, tables
from mtpd.evaluate.acceptance import Acceptance
from mtpd.evaluate.compare import console, judged, show_judged
from mtpd.evaluate.history import Past, sparklines
from mtpd.evaluate.intervals import intervals
from mtpd.evaluate.measure import Model, Trace, measure_suites, respond
from mtpd.evaluate.other_model import cost
from mtpd.evaluate.slices import slices
from mtpd.evaluate.suites import Question, Suite, questions, usable
from mtpd.evaluate.suites.joined import join
from mtpd.evaluate.trunk_quality import TrunkQuality, trunk_quality
from mtpd.files import fingerprint_file, write_whole
from mtpd.finished_run import RECIPE, open_finished
from mtpd.heads import WEIGHTS, read_config
from mtpd.parallel import ranks
from mtpd.recipe import Recipe
from mtpd.report.samples import sample_texts
from mtpd.run.directory import RunDirectory, warn_of_changes
from mtpd.run.finished import LoadedRun, reopen, trained_prompts
from mtpd.run.request import Request, check_request
from mtpd.run.session import load_trunk

logger = logging.getLogger(__name__)

Suites = dict[str, tuple[Suite, list[Question]]]


def evaluate_run(request: Request, *, progress: bool = True) -> int:
    """Measures, prints and writes; gives the exit code.

    Raises:
        UserError: a mistake in the request or in a file that it names.
    """
    # Everything that can be wrong with files is found before a model is loaded.
    recipe = open_finished(request.run, heads=request.heads, untrusted=request.untrusted).recipe
    run = RunDirectory(request.run)
    warn_of_changes(run)
    with ranks.joined(resolve_device(recipe.device)):
        # What is measured is speed as well: one rank works, and the others wait.
        return _evaluate(request, recipe, run, progress=progress) if ranks.is_main() else 0


def _evaluate(request: Request, recipe: Recipe, run: RunDirectory, *, progress: bool) -> int:
    began = time.monotonic()
    baseline, own = request.baseline(), None
    past = request.past()
    wanted = request.mode or ("offline" if baseline is None else baseline.mode)
    mode: Literal["offline", "decoded"] = "decoded" if wanted == "decoded" else "offline"
    if request.model is not None:
        own = baseline or _own(request, run, mode)
    chosen = check_request(request, baseline or own)
    suites = {name: (suite, questions(name, suite)) for name, suite in chosen.items()}
    finished = reopen(request.run, heads=request.heads, model=request.model)
    suites = fitting(finished.tokenizer, suites, context=finished.trunk.context)
    own_trunk = _other_trunk(request, finished)
    if baseline is not None:
        gate.check_trunk(baseline, finished.fingerprint, f"{request.against} and {request.run}", heads_trunk=own_trunk)
    if mode == "decoded":
        finished = finished.in_dtype(recipe.evaluation.dtype)
    heads = finished.heads(request.heads)
    if request.drafts is not None:
        heads.shorten(request.drafts)
    model = Model(finished.trunk, finished.tokenizer, finished.fingerprint, finished.ends)
    folder = request.run / request.heads
    chances, corpus = read_chances(folder), read_corpus(folder, finished.tokenizer)
    acceptance, trace = measure_suites(
        model,
        heads,
        suites,
        heads_fingerprint=fingerprint_file(request.run / request.heads / WEIGHTS),
        mode=mode,
        responses=request.responses,
        chances=chances,
        corpus=corpus,
        trained=trained_prompts(run),
        progress=progress,
    )
    acceptance.heads_trunk = own_trunk
    path = request.output or run.evaluation_with(request.model, mode=mode)
    acceptance.save(path)
    if mode == "offline" and request.heads == "heads" and request.model is None:
        found = sample_texts(
            model, heads, trace.samples, chances=chances, corpus=corpus, heads_fingerprint=acceptance.heads
        )
        found.save(run.samples)
    to = console(quiet=not progress)
    estimates = intervals(acceptance)
    show_measured(to, acceptance, estimates, by=request.asked.by)
    to.print(_speed(acceptance, trace), highlight=False, soft_wrap=True)
    warn_of_control(acceptance)
    quality = _check_trunk(request, finished, suites, progress=progress) if request.check_trunk else None
    if quality is not None:
        to.print(tables.quality_table(quality))
    code = conclude(request, acceptance, baseline, path, estimates, to=to, began=began, past=past, quality=quality)
    if own_trunk is not None and (own is None or own.trunk == own_trunk):
        _show_cost(to, request, own, acceptance)
    return code


def show_measured(to: Console, acceptance: Acceptance, estimates: tables.Estimates, *, by: Sequence[str] = ()) -> None:
    """Prints the tables of a measurement.

    Args:
        by: what slices are shown by.
    """
    to.print(tables.suites_table(acceptance, estimates))
    to.print(tables.depths_table(acceptance, estimates))
    if acceptance.total().drafters:
        to.print(tables.drafters_table(acceptance, estimates))
    if by:
        to.print(tables.slices_table(slices(acceptance, by)))


def conclude(
    request: Request,
    acceptance: Acceptance,
    baseline: Acceptance | None,
    path: Path,
    estimates: tables.Estimates,
    *,
    to: Console,
    began: float,
    past: Sequence[Past] = (),
    quality: Mapping[str, tuple[TrunkQuality, TrunkQuality]] | None = None,
) -> int:
    """Compares a measurement with its baseline, writes what was asked for, and gives the exit code.

    Args:
        path: where the measurement was written.
        began: when the command began, by `time.monotonic`.
        past: earlier results, for `--markdown`.
    """
    judgement = judged(baseline, acceptance, request.asked, names=(str(request.against), str(path)))
    show_judged(to, judgement)
    if request.markdown is not None:
        text = outputs.markdown(
            acceptance,
            estimates,
            comparison=judgement.comparison,
            verdicts=judgement.verdicts,
            moved=judgement.moved,
            sparklines=sparklines(past, acceptance),
            quality=quality,
        )
        write_whole(request.markdown, text)
    if request.junit is not None:
        text = outputs.junit(acceptance, estimates, seconds=time.monotonic() - began, verdicts=judgement.verdicts)
        write_whole(request.junit, text)
    code = gate.exit_code(judgement.verdicts)
    if request.write_baseline is not None and code == 0:
        acceptance.save(request.write_baseline)
        to.print(f"baseline: {request.write_baseline}", highlight=False, soft_wrap=True)
    to.print(f"written: {path}", highlight=False, soft_wrap=True)
    return code


def fitting(tokenizer: Any, suites: Suites, *, context: int) -> Suites:
    """Suites with their prompts as a model with so many tokens of context is asked them."""

    def asked(name: str, suite: Suite, found: list[Question]) -> list[Question]:
        if suite.contexts:
            return join(tokenizer, name, suite, found, context=context)
        return usable(tokenizer, name, found)

    return {name: (suite, asked(name, suite, found)) for name, (suite, found) in suites.items()}


def _other_trunk(request: Request, finished: LoadedRun) -> str | None:
    """The trunk that the heads were trained for, by fingerprint, where they are measured under another; and says so."""
    trunk = read_config(request.run / request.heads).trunk
    if request.model is None or trunk in ("", finished.fingerprint):
        return None
    logger.warning(
        "--model %s: is another trunk (%s) than the heads were trained for (%s): they are measured as they are",
        request.model,
        finished.fingerprint[:12],
        trunk[:12],
    )
    return trunk


def _own(request: Request, run: RunDirectory, mode: Literal["offline", "decoded"]) -> Acceptance | None:
    """What the run has measured under its own model, if it is of the heads and prompts that are asked for."""
    path = run.evaluation_with(None, mode=mode)
    if not path.is_file():
        return None
    found = Acceptance.load(path)
    try:
        check_request(request, found)
    except UserError as error:
        logger.warning("%s is not compared: %s", path, error)
        return None
    return found


def _show_cost(to: Console, request: Request, own: Acceptance | None, acceptance: Acceptance) -> None:
    """Says what the other model costs the heads, in which slices, and what brings them back."""
    if own is None:
        to.print(
            f"mtpd eval {request.run} measures the same under the run's own model, to compare with",
            highlight=False,
            soft_wrap=True,
        )
        return
    found = cost(own, acceptance, name=str(request.model), by=request.asked.by)
    if request.against is None or not request.asked.by:
        to.print(tables.changes_table(found.changes))
    again = f"mtpd distill {request.run / RECIPE} model={request.model} heads.source={request.run} heads.init=null"
    for line in (found.line, f"to train them on for it: {again} output=..."):
        to.print(line, highlight=False, soft_wrap=True)


def _speed(acceptance: Acceptance, trace: Trace) -> str:
    prompts = acceptance.total().prompts
    text = f"measured {prompts} prompts in {trace.measuring:.1f} s, {prompts / max(trace.measuring, 1e-9):.2f} a s"
    if acceptance.mode == "decoded":
        return text + " (both baselines included)"
    return text + f"; the responses took {trace.responses:.1f} s before that (kept for later calls)"


def warn_of_control(acceptance: Acceptance) -> None:
    """Warns if drafts meet targets that are one position off: then the alignment is wrong, or the text repeats."""
    total = acceptance.total()
    if total.control is not None and total.car[0] > 0.05 and total.control.car[0] > 0.5 * total.car[0]:
        logger.warning(
            "the control has not collapsed: CAR_1 %.3f, and %.3f against targets moved by one position; "
            "either the text repeats single tokens, or the numbers are wrong",
            total.car[0],
            total.control.car[0],
        )


def _check_trunk(
    request: Request, finished: LoadedRun, suites: Suites, *, progress: bool
) -> Mapping[str, tuple[TrunkQuality, TrunkQuality]]:
    """The main head before and after the run, on the responses of the model before it."""
    # A run that trained its trunk too has another model than its recipe.
    changed = finished.model != finished.recipe.model
    after = Model(finished.trunk, finished.tokenizer, finished.fingerprint, finished.ends)
    before = after
    if changed:
        original, _ = load_trunk(finished.recipe)
        before = Model(original, finished.tokenizer, trunk_fingerprint(original.model), finished.ends)
    found = {}
    for name, (suite, asked) in suites.items():
        texts = respond(before, name, suite, asked, request.responses, progress=progress)
        first = trunk_quality(before.trunk, before.tokenizer, asked, texts, texts, match=suite.match)
        second = first
        if changed:
            own = respond(after, name, suite, asked, request.responses, progress=progress) if suite.match else texts
            second = trunk_quality(after.trunk, after.tokenizer, asked, texts, own, match=suite.match)
        found[name] = (first, second)
    return found
