"""Responses by the trunk itself, many at a time, into a file that an interrupted or changed run continues.

An answer is kept by what it depends on: the tokens of its prompt, and the settings (see `mtpd.data.answers.kept`).
Each prompt is sampled with a seed of its own, so a run that was interrupted and continued gives the responses of one
that was not: in float32 to the token, in 16 bits up to what rounds differently next to other prompts.

A conversation of several rounds is answered round by round, each with the trunk's own earlier answers before it.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mtpd.data.answers.check import FIRST, check_answers
from mtpd.data.answers.conversation import Conversation, Limits, conversations
from mtpd.data.answers.kept import collect, header, line_of, of_rank, read
from mtpd.data.answers.task import Answered, Answerer, Task, is_cut, until_end
from mtpd.data.generation import answers, plain_answers
from mtpd.data.packing import Sample
from mtpd.data.rounds import render_round
from mtpd.data.rows.left_out import Unusable
from mtpd.data.rows.prompt import Prompt
from mtpd.decode.choice import Choice, Greedy
from mtpd.decode.sampling import Sampling, temperature_and_top_p
from mtpd.errors import MtpdError, UserError
from mtpd.files import write_whole, writing
from mtpd.parallel import ranks
from mtpd.progress import Bar
from mtpd.trunk import Trunk

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 1.0
"""What ends within this time is written to the file together."""
MANY_CUT = 0.2
"""Share of cut answers above which a warning says so."""


def generate_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    path: str | Path,
    *,
    trunk: str,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_new_tokens: int = 160,
    batch: int = 64,
    seed: int = 0,
    max_length: int,
    row_length: int | None = None,
    fresh: bool = False,
    together: bool = False,
    progress: bool = True,
    others: Others | None = None,
) -> list[Sample]:
    """Answers prompts with the model, or reads the answers that `path` already holds.

    Sampling is from the model's own distribution at this temperature and top-p: penalties and cuts that
    a checkpoint's generation settings ask for are left out. A response ends with the end token if the
    model wrote one. Prompts with more than `max_length - max_new_tokens` tokens are left out with a warning, and so
    are those that leave no room for a response in a row.

    Args:
        path: the JSONL file of responses; it is continued if its settings are the same.
        trunk: fingerprint of the model.
        temperature: 0 is greedy.
        batch: prompts decoded at a time, at most.
        max_length: the model's context in tokens.
        row_length: tokens of a row in training; None where the responses are not trained on.
        fresh: starts anew whatever `path` holds.
        together: all ranks call this, and each answers its share of the prompts.
        others: another program that writes the answers; they are checked against the model.

    Returns:
        Samples in the order of the prompts; those of a conversation are one, unless its template writes earlier turns
        otherwise once others follow.

    Raises:
        UserError: `path` was made with other settings, prompts share an id, all are too long, or answers of others are
            not the model's.
        MtpdError: the model ended every response at once, or the disk is full.
    """
    ends = frozenset(end_tokens(model, tokenizer))
    talks = conversations(prompts)
    limits = Limits(max_new_tokens, max_length, row_length)
    answerer = _by_slots(model, temperature, top_p, max_new_tokens=max_new_tokens, ends=ends, batch=batch, seed=seed)
    if others is not None:
        answerer = _by_others(Trunk(model), others, answerer, temperature, top_p)
    settings: dict[str, Any] = {
        "trunk": trunk,
        "temperature": float(temperature),
        "top_p": float(top_p) if temperature > 0 else 1.0,
        "seed": seed if temperature > 0 else 0,
    }
    file: _File | None = None
    refused: list[str] = []
    turn = 1
    while asked := [each for each in talks if each.next_turn == turn]:
        tasks = []
        for each in asked:
            try:
                ids = render_round(tokenizer, each.prompt, each.answers, ends=ends)
            except Unusable as error:
                if turn == 1:
                    raise
                refused.append(str(error))
                continue
            if limits.hold(ids, turn):
                each.tasks.append(Task(each.prompt, ids, turn))
                tasks.append(each.tasks[-1])
        if file is None:
            # Prompts that cannot be rendered leave nothing behind.
            limits.report(len(prompts))
            file = _File(Path(path), settings, limits, ends, fresh=fresh, together=together, progress=progress)
        found = file.answer(tasks, answerer)
        for each in asked:
            if each.tasks[turn - 1 :] and (response := found.get(each.tasks[-1].key)) is not None:
                each.answers.append(response)
        if turn == 1:
            _report_unanswered(talks, others)
        turn += 1
    if refused:
        logger.warning("%d conversations end before their last turn: %s", len(refused), refused[0])
    if others is not None:
        answered = [pair for each in talks for pair in zip(each.tasks, each.answers, strict=False)]
        check_answers(Trunk(model), answered, temperature=temperature, top_p=top_p, source=others.source)
    _warn_of_cut(talks, ends, max_new_tokens)
    samples = [sample for each in talks for sample in each.samples()]
    if all(not set(sample.response_ids) - ends for sample in samples):
        raise MtpdError(f"{path}: every response is empty: the model ends each answer at once; check its chat template")
    return samples


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a text: those of the checkpoint's generation settings and the tokenizer's."""
    settings: Any = getattr(model, "generation_config", None)
    named = getattr(settings, "eos_token_id", None)
    ids = [] if named is None else [named] if isinstance(named, int) else list(named)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids.append(tokenizer.eos_token_id)
    return ids


def cut_responses(samples: Sequence[Sample], ends: Collection[int]) -> tuple[int, int]:
    """Counts responses that stop where nothing ended them, and all; those of a conversation one by one."""
    cut = total = 0
    known = frozenset(ends)
    for sample in samples:
        following = [*sample.response_mask[1:], False]
        last = [
            token
            for token, response, further in zip(sample.ids, sample.response_mask, following, strict=True)
            if response and not further
        ]
        total += len(last)
        cut += sum(is_cut([token], known) for token in last)
    return cut, total


@dataclass(frozen=True)
class Others:
    """Another program that writes the model's answers.

    Attributes:
        source: where they come from, for messages.
        rest: whether the model answers in this process what the program does not.
    """

    answerer: Answerer
    source: str
    rest: bool = False


class _File:
    """The file of responses in this call."""

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        limits: Limits,
        ends: frozenset[int],
        *,
        fresh: bool,
        together: bool,
        progress: bool,
    ) -> None:
        self.path, self.settings, self.ends, self.progress = path, settings, ends, progress
        self.max_new_tokens = limits.max_new_tokens
        self.shared = together and ranks.count() > 1
        self.own = of_rank(path, ranks.rank()) if self.shared else path
        if not self.shared or ranks.is_main():
            collect(path, settings, fresh=fresh)
        if self.shared:
            ranks.barrier()
            ranks.wait_for(path)
        self.done = read(path, settings)

    def answer(self, tasks: Sequence[Task], answerer: Answerer) -> dict[str, list[int]]:
        """Answers of tasks by their names: those that are known, and those that `answerer` gives now."""
        distinct = list({task.key: task for task in tasks}.values())
        missing = [task for task in distinct if not self._knows(task)]
        known, left = len(distinct) - len(missing), len(missing)
        if self.progress and known:
            Bar.write(f"{known:,} of {len(distinct):,} prompts were answered before", file=sys.stderr)
        if self.shared and missing:
            # Longest first, so that shares are alike.
            missing = ranks.share(sorted(missing, key=lambda task: -len(task.ids)))
            write_whole(self.own, header(self.settings))
        # A rank without a share still has to keep step with the others.
        if left:
            turn = f", turn {tasks[0].turn}" if tasks[0].turn > 1 else ""
            share = f"responses (1 of {ranks.count()} shares)" if self.shared else "responses"
            total, begun = (len(missing), 0) if self.shared else (len(distinct), known)
            with Bar(total=total, initial=begun, desc=share + turn, unit="prompt", disable=not self.progress) as bar:
                self._write(answerer(missing), bar)
        if self.shared and left:
            ranks.barrier()
            if ranks.is_main():
                collect(self.path, self.settings)
            ranks.barrier()
            self.done = read(self.path, self.settings)
        found = {task.key: self.done[task.key] for task in distinct if task.key in self.done}
        return {key: until_end(response, self.ends)[: self.max_new_tokens] for key, response in found.items()}

    def _write(self, found: Iterator[Answered], bar: Any) -> None:
        tokens = answered = cut = 0
        started = time.monotonic()
        for ended in _gathered(found):
            for task, response in ended:
                self.done[task.key] = response
                tokens += len(response)
                cut += is_cut(response, self.ends)
            answered += len(ended)
            _append(
                self.own,
                "".join(line_of(task.prompt.id, task.turn, task.ids, response) for task, response in ended),
            )
            bar.update(len(ended))
            bar.set_postfix_str(f"{tokens / (time.monotonic() - started):.0f} tokens/s, {cut / answered:.0%} cut")

    def _knows(self, task: Task) -> bool:
        """Whether there is an answer from before that is whole, or as long as it may be."""
        found = until_end(self.done.get(task.key, []), self.ends)
        return len(found) >= self.max_new_tokens or not is_cut(found, self.ends)


def _by_slots(
    model: PreTrainedModel,
    temperature: float,
    top_p: float,
    *,
    max_new_tokens: int,
    ends: frozenset[int],
    batch: int,
    seed: int,
) -> Answerer:
    """Answers by the model in this process."""
    frozen = Trunk(model)
    if frozen.recurrent and frozen.partitioned:
        raise UserError(
            f"train.deepspeed: stage 3 is not accepted for {frozen.name}, whose responses come from transformers, "
            "which does not keep ranks in step; accepted: null, zero1, zero2"
        )

    def answer(tasks: Sequence[Task]) -> Iterator[Answered]:
        if frozen.recurrent:
            # Their states have no slots: one prompt at a time, by transformers.
            warped = (temperature, top_p) if temperature > 0 else None
            return plain_answers(model, tasks, warped, max_new_tokens=max_new_tokens, ends=sorted(ends), seed=seed)
        choice: Choice = Greedy() if temperature == 0 else Sampling(temperature_and_top_p(temperature, top_p))
        return answers(frozen, tasks, choice, max_new_tokens=max_new_tokens, ends=sorted(ends), slots=batch, seed=seed)

    return answer


def _by_others(trunk: Trunk, others: Others, slots: Answerer, temperature: float, top_p: float) -> Answerer:
    """Answers of another program, of which the first are checked before any is kept; then, where asked for, the rest.

    A trunk whose layers are shared out over ranks has to run on all of them: there the check comes at the end alone.
    """

    def answer(tasks: Sequence[Task]) -> Iterator[Answered]:
        found = iter(others.answerer(tasks))
        first = list(islice(found, FIRST))
        if first and not trunk.partitioned:
            check_answers(trunk, first, temperature=temperature, top_p=top_p, source=others.source)
        left = {task.key: task for task in tasks}
        for task, response in chain(first, found):
            left.pop(task.key, None)
            yield task, response
        if others.rest:
            yield from slots(list(left.values()))

    return answer


def _report_unanswered(talks: Sequence[Conversation], others: Others | None) -> None:
    """Warns of prompts that another program has not answered, which are left out.

    Raises:
        UserError: it has answered none.
    """
    asked = sum(bool(each.tasks) for each in talks)
    missing = asked - sum(bool(each.answers) for each in talks)
    if others is None or not missing:
        return
    told = f"data.responses: {others.source}: {missing} of {asked} prompts have no response in it"
    if missing == asked:
        raise UserError(f"{told}; accepted: responses with the ids, or prompt_ids, that `mtpd data prompts` writes")
    logger.warning("%s; they are left out", told)


def _warn_of_cut(talks: Sequence[Conversation], ends: frozenset[int], max_new_tokens: int) -> None:
    """Warns where many answers were cut. Plain text that is continued has no end of its own."""
    responses = [response for each in talks if not isinstance(each.prompt.prompt, str) for response in each.answers]
    cut = sum(is_cut(response, ends) for response in responses)
    if cut > MANY_CUT * len(responses):
        logger.warning(
            "%d of %d responses (%.0f%%) reached %d tokens without an end; raise data.max_new_tokens",
            cut,
            len(responses),
            100 * cut / len(responses),
            max_new_tokens,
        )


def _gathered(answers: Iterator[Answered]) -> Iterator[list[Answered]]:
    """Groups responses that end within FLUSH_SECONDS."""
    together: list[Answered] = []
    last = time.monotonic()
    try:
        for answer in answers:
            together.append(answer)
            if time.monotonic() - last >= FLUSH_SECONDS:
                yield together
                together, last = [], time.monotonic()
    except (Exception, KeyboardInterrupt):
        if together:
            yield together
        raise
    if together:
        yield together


def _append(path: Path, lines: str) -> None:
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())
