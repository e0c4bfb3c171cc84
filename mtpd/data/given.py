"""Prompts with the responses that came with them, as samples to train on: which tokens are response."""

from __future__ import annotations

from collections.abc import Collection

from transformers import PreTrainedTokenizerBase

from mtpd.data.packing import Sample
from mtpd.data.prompts import Message, Prompt, apply_template, plain_ids, rendered_ids
from mtpd.errors import UserError


def given_sample(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, end_tokens: Collection[int]) -> Sample:
    """A prompt with the response that came with it, tokenised together.

    In a conversation every assistant turn after the prompt is response: its text and the end token that
    the template writes. What the template writes after the end token is no response, because a model
    that is asked stops there. Plain text ends with the tokenizer's end token.

    Args:
        end_tokens: ids that end a turn (`mtpd.data.responses.end_tokens`).

    Raises:
        UserError: no response in the row, or a template that leaves no response token or renders
            the same turns differently when others follow.
    """
    if isinstance(prompt.prompt, str):
        assert prompt.response is None or isinstance(prompt.response, str)
        sample = _given_text(tokenizer, prompt.id, prompt.prompt, prompt.response, prompt.family)
    elif prompt.response is None:
        raise UserError(f"prompt {prompt.id}: it has no response, which data.responses=given needs")
    else:
        assert not isinstance(prompt.response, str)
        sample = _given_messages(tokenizer, prompt.id, prompt.prompt, prompt.response, end_tokens, prompt.family)
    if not any(sample.response_mask):
        raise UserError(f"prompt {prompt.id}: its response mask is empty: no token of it would be trained on")
    return sample


def _given_text(
    tokenizer: PreTrainedTokenizerBase, name: str, prompt: str, completion: str | None, family: str
) -> Sample:
    whole = prompt if completion is None else prompt + completion
    ids = plain_ids(tokenizer, whole)
    # Text alone is all response; only what the tokenizer puts before it is not.
    start = max(0, len(ids) - len(rendered_ids(tokenizer, whole)))
    if completion is not None:
        if not completion.strip():
            raise UserError(f"prompt {name}: its completion is empty")
        start = max(start, _common_prefix(plain_ids(tokenizer, prompt), ids)) if prompt else start
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    return Sample(name, ids, [index >= start for index in range(len(ids))], family)


def _given_messages(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    prompt: list[Message],
    response: list[Message],
    ends: Collection[int],
    family: str,
) -> Sample:
    messages = [*prompt, *response]
    turns = [turn for turn in range(len(prompt), len(messages)) if messages[turn]["role"] == "assistant"]
    if not any(messages[turn]["content"].strip() for turn in turns):
        raise UserError(f"prompt {name}: its response is empty")
    rendered = [_turn(tokenizer, messages[: turn + 1], name) for turn in turns]
    whole = "".join(rendered[-1])
    ids = rendered_ids(tokenizer, whole)
    mask = [False] * len(ids)
    last = 0
    for turn, (before, after) in zip(turns, rendered, strict=True):
        written = before + after[: _end_of(messages[turn]["content"], after)]
        if not whole.startswith(written):
            raise UserError(
                f"prompt {name}: the chat template writes earlier turns differently once others follow, so response "
                "tokens cannot be told; give conversations of one turn (prompt + completion)"
            )
        start = _common_prefix(rendered_ids(tokenizer, before), ids)
        # Up to the end token; where the template writes none, as far as it wrote the same for this turn.
        stop = next((i + 1 for i in range(start, len(ids)) if ids[i] in ends), None)
        last = stop or _common_prefix(rendered_ids(tokenizer, before + after), ids)
        mask[start:last] = [True] * (last - start)
    return Sample(name, ids[:last], mask[:last], family)


def _turn(tokenizer: PreTrainedTokenizerBase, messages: list[Message], name: str) -> tuple[str, str]:
    """Splits what the template writes: before the last message, and for it.

    A template may begin an answer that it is given otherwise than the one it asks for (with an opened
    block of thoughts, say): the response then starts where the two part. They must not part earlier.
    """
    asked, answer = messages[:-1], messages[-1:]
    before = apply_template(tokenizer, {"prompt": asked}, name)["prompt"]
    parts = apply_template(tokenizer, {"prompt": asked, "completion": answer}, name)
    if len(parts["prompt"]) < _end_of(asked[-1]["content"], before):
        raise UserError(f"prompt {name}: the chat template writes the prompt differently once an answer follows")
    return parts["prompt"], parts["completion"]


def _end_of(content: str, rendered: str) -> int:
    """Finds the end of a message's words in rendered text; the end of the text if the template changed the words."""
    at = rendered.rfind(content.strip())
    return len(rendered) if at < 0 else at + len(content.strip())


def _common_prefix(ids: list[int], others: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), min(len(ids), len(others)))
