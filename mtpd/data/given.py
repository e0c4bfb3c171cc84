"""Prompts with the responses that came with them, as samples to train on: which tokens are response."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache

from transformers import PreTrainedTokenizerBase

from mtpd.data.packing import Sample
from mtpd.data.rendering import MARK, apply_template, asked_text, plain_ids, rendered_ids
from mtpd.data.rows.left_out import Unusable
from mtpd.data.rows.prompt import Message, Prompt

logger = logging.getLogger(__name__)


def given_samples(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, end_tokens: Collection[int]) -> list[Sample]:
    """A prompt with the response that came with it, tokenised together.

    In a conversation every assistant turn after the prompt is response: its text and the end token that
    the template writes. What the generation prompt or the template writes by itself (an empty block of thoughts, or
    what follows the end token) is no response. Plain text ends with the tokenizer's end token.

    A conversation is one document, or where the template writes earlier turns otherwise once others follow, one for
    each assistant turn, as a model that is asked there would see it.

    Args:
        end_tokens: ids that end a turn (`mtpd.data.responses.end_tokens`).

    Raises:
        Unusable: no response in the row, or a template that leaves no response token.
    """
    if isinstance(prompt.prompt, str):
        assert prompt.response is None or isinstance(prompt.response, str)
        samples = [_given_text(tokenizer, prompt, prompt.prompt, prompt.response)]
    elif prompt.response is None:
        raise Unusable("without response", f"{prompt.name}: it has no response, which data.responses=given needs")
    else:
        assert not isinstance(prompt.response, str)
        samples = _given_messages(tokenizer, prompt, prompt.prompt, prompt.response, end_tokens)
    if not all(any(sample.response_mask) for sample in samples):
        raise Unusable(
            "without response", f"{prompt.name}: its response mask is empty: no token of it would be trained on"
        )
    return samples


def _given_text(tokenizer: PreTrainedTokenizerBase, row: Prompt, prompt: str, completion: str | None) -> Sample:
    whole = prompt if completion is None else prompt + completion
    ids = plain_ids(tokenizer, whole, escape=row.escape)
    # Text alone is all response; only what the tokenizer puts before it is not.
    bare = tokenizer(whole, add_special_tokens=False, split_special_tokens=row.escape)["input_ids"]
    start = max(0, len(ids) - len(bare))
    if completion is not None:
        if not completion.strip():
            raise Unusable("without response", f"{row.name}: its completion is empty")
        start = max(start, _common_prefix(plain_ids(tokenizer, prompt, escape=row.escape), ids)) if prompt else start
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    return Sample(row.id, ids, [index >= start for index in range(len(ids))], row.family)


def _given_messages(
    tokenizer: PreTrainedTokenizerBase,
    row: Prompt,
    prompt: list[Message],
    response: list[Message],
    ends: Collection[int],
) -> list[Sample]:
    messages = [*prompt, *response]
    turns = [turn for turn in range(len(prompt), len(messages)) if messages[turn]["role"] == "assistant"]
    said = [turn for turn in turns if messages[turn]["content"].strip() or messages[turn].get("tool_calls")]
    if not said:
        raise Unusable("without response", f"{row.name}: its response is empty")
    if any(messages[turn - 1]["role"] == "assistant" for turn in turns):
        raise Unusable("two assistant turns in a row", f"{row.name}: has two assistant turns in a row")
    rendered = [_turn(tokenizer, messages[: turn + 1], row) for turn in turns]
    whole = rendered[-1].before + rendered[-1].after
    if all(whole.startswith(turn.before + turn.after[: turn.stop]) for turn in rendered):
        return [_document(tokenizer, row, row.id, rendered, ends)]
    return [
        _document(tokenizer, row, f"{row.id}:{number}", [turn], ends)
        for number, (place, turn) in enumerate(zip(turns, rendered, strict=True))
        if place in said
    ]


@dataclass(frozen=True)
class _Turn:
    """An assistant turn as the template writes it, with all that is before it."""

    before: str
    after: str
    start: int
    """Characters of `after` that the template writes by itself."""
    stop: int
    """Where the words of the turn end in `after`."""


def _document(
    tokenizer: PreTrainedTokenizerBase, row: Prompt, name: str, turns: Sequence[_Turn], ends: Collection[int]
) -> Sample:
    """One document that ends with the last of the turns, which are its responses."""
    ids = rendered_ids(tokenizer, turns[-1].before + turns[-1].after)
    mask = [False] * len(ids)
    last = 0
    for turn in turns:
        start = _common_prefix(rendered_ids(tokenizer, turn.before + turn.after[: turn.start]), ids)
        # Up to the end token; where the template writes none, as far as it wrote the same for this turn.
        stop = next((i + 1 for i in range(start, len(ids)) if ids[i] in ends), None)
        last = stop or _common_prefix(rendered_ids(tokenizer, turn.before + turn.after), ids)
        mask[start:last] = [True] * (last - start)
    return Sample(name, ids[:last], mask[:last], row.family)


SENTINEL = "\ue000"
"""A character of private use, which no template writes."""


def _turn(tokenizer: PreTrainedTokenizerBase, messages: list[Message], row: Prompt) -> _Turn:
    """Splits what the template writes: before the last message, and for it.

    A template may begin an answer that it is given otherwise than the one it asks for (with an opened
    block of thoughts, say): the response then starts where the two part. They must not part earlier.
    """
    asked, answer = messages[:-1], messages[-1]
    before = asked_text(tokenizer, row, asked)
    parts = apply_template(tokenizer, {"prompt": asked, "completion": [answer]}, row)
    if len(parts["prompt"]) < _end_of(asked[-1], before):
        raise Unusable(
            "rendered differently once answered",
            f"{row.name}: the chat template writes the prompt differently once an answer follows",
        )
    after, thoughts = parts["completion"], answer.get("reasoning_content", "").strip()
    thought = bool(thoughts) and thoughts in after
    if thoughts and not thought:
        _say_no_thoughts(str(tokenizer.name_or_path))
    start = 0
    if not thought and not (answer["content"] and after.startswith(answer["content"])):
        # Another answer in its place shows what the template writes before any.
        other = apply_template(
            tokenizer, {"prompt": asked, "completion": [{"role": "assistant", "content": SENTINEL}]}, row
        )
        own = (other["prompt"] + other["completion"]).partition(SENTINEL)[0]
        if (parts["prompt"] + after).startswith(own):
            start = max(0, len(own) - len(parts["prompt"]))
    return _Turn(parts["prompt"], after, start, _end_of(answer, after))


@cache
def _say_no_thoughts(model: str) -> None:
    logger.warning(
        "%s: its chat template does not write the thoughts (reasoning_content) of assistant turns, which are left out",
        model or "the model",
    )


def _end_of(message: Message, rendered: str) -> int:
    """Finds the end of a message's words in rendered text; the end of the text if the template changed the words."""
    words, rendered = message["content"].strip(), rendered.replace(MARK, "")
    at = rendered.rfind(words) if words and not message.get("tool_calls") else -1
    # What tools say is often written as JSON, and then not found.
    return at + len(words) if at >= 0 else 0 if message["role"] == "tool" else len(rendered)


def _common_prefix(ids: list[int], others: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), min(len(ids), len(others)))
