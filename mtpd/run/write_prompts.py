"""Prompts of a recipe with their token ids, for another program that answers them: `mtpd data prompts`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mtpd.data.answers.conversation import Conversation, Limits, conversations
from mtpd.data.answers.file import FileAnswers
from mtpd.data.answers.task import Task
from mtpd.data.models import real_tokens
from mtpd.data.rendering import render_all
from mtpd.data.rounds import render_round
from mtpd.data.rows.left_out import LeftOut, Unusable
from mtpd.data.rows.prompt import Prompt
from mtpd.files import write_whole
from mtpd.recipe import Recipe
from mtpd.run.material import measured_prompts, split_prompts
from mtpd.run.session import with_fitting_defaults
from mtpd.run.without_weights import without_weights
from mtpd.trunk import Trunk


def write_prompts(recipe: Recipe, path: Path) -> dict[str, int]:
    """Writes every prompt that is to be answered, with its token ids and how it is to be answered, a line each.

    The model's weights are not read. With a file in `data.responses`, what it lacks is written: the next turns of
    conversations too.

    Returns:
        How many prompts there are to train on, and how many to measure on.

    Raises:
        UserError: with one line that names the cause.
    """
    recipe = with_fitting_defaults(recipe)
    model, tokenizer, ends = without_weights(recipe)
    data, context = recipe.data, Trunk(model).context
    known: FileAnswers | None = None
    if data.responses_file is not None:
        file = Path(data.responses_file).expanduser()
        tokens = real_tokens(model, tokenizer)
        known = FileAnswers(file, tokenizer, ends=ends, tokens=tokens, key="data.responses")
    split = split_prompts(recipe)
    training = {"temperature": data.temperature, "top_p": data.top_p, "max_new_tokens": data.max_new_tokens}
    greedy = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": recipe.evaluation.max_new_tokens}
    measured = measured_prompts(recipe, split.held_out)
    lines: list[str] = []
    counts: dict[str, int] = {}
    for purpose, prompts, settings, row_length in (
        ("training", split.train, training, data.row_length),
        ("measuring", measured, greedy, None),
    ):
        limits = Limits(int(settings["max_new_tokens"]), context, row_length)
        left_out = LeftOut(data.max_unusable)
        rendered = [prompt for prompt, _ in render_all(tokenizer, prompts, left_out)]
        left_out.check(len(prompts), source="data.prompts" if purpose == "training" else "data.held_out")
        tasks = list(_asked(tokenizer, rendered, limits, known, ends=ends))
        limits.report(len(rendered))
        counts[purpose] = len(tasks)
        for task in tasks:
            line: dict[str, Any] = {"id": task.prompt.id, "turn": task.turn, "for": purpose, "prompt_ids": task.ids}
            lines.append(json.dumps(line | settings | {"stop_token_ids": ends}) + "\n")
    write_whole(path, "".join(lines))
    return counts


def _asked(
    tokenizer: Any, prompts: Sequence[Prompt], limits: Limits, known: FileAnswers | None, *, ends: Sequence[int]
) -> Iterator[Task]:
    """Gives of each prompt the turn that is to be answered next."""
    for each in conversations(prompts):
        task = _next_task(tokenizer, each, limits, ends)
        while task is not None:
            answered = [response for _, response in known([task])] if known is not None else []
            if not answered:
                yield task
                break
            each.answers += answered
            task = _next_task(tokenizer, each, limits, ends)


def _next_task(tokenizer: Any, each: Conversation, limits: Limits, ends: Sequence[int]) -> Task | None:
    turn = each.next_turn
    if not turn:
        return None
    # Without a chat template there are no rounds.
    if turn > 1 and not tokenizer.chat_template:
        return None
    try:
        ids = render_round(tokenizer, each.prompt, each.answers, ends=ends)
    except Unusable:
        return None
    if not limits.hold(ids, turn):
        return None
    each.tasks.append(Task(each.prompt, ids, turn))
    return each.tasks[-1]
