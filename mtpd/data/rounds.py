"""Conversations of several rounds, answered by the trunk: what stands before its next answer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from mtpd.data.rendering import asked_text, render, rendered_ids
from mtpd.data.rows.prompt import Prompt

if TYPE_CHECKING:  # brings in torch
    from transformers import PreTrainedTokenizerBase


def render_round(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, answers: Sequence[Sequence[int]], *, ends: Collection[int]
) -> list[int]:
    """Token ids of a conversation up to where the trunk's next answer begins.

    They begin with the very tokens of the rounds before, prompts and answers, so that all rounds are one document.
    Where the template writes earlier turns otherwise once others follow (it strips thoughts, say), they are the
    conversation as a model that is asked now would see it: a document of its own. The caller tells the two apart by
    whether the ids begin with those of the round before and its answer.

    Args:
        answers: token ids of the trunk's answers so far, with or without their end token; at most as many as `later`.
        ends: ids that end an answer.

    Raises:
        UserError: the template refuses the conversation.
    """
    ids = render(tokenizer, prompt)
    if not answers:
        return ids
    assert not isinstance(prompt.prompt, str)
    messages, text = list(prompt.prompt), asked_text(tokenizer, prompt, prompt.prompt)
    for answer, said in zip(answers, prompt.later, strict=False):
        ended = bool(answer) and answer[-1] in ends
        words = str(tokenizer.decode(answer[:-1] if ended else answer, skip_special_tokens=False))
        messages = [*messages, {"role": "assistant", "content": words}, *said]
        before, text = text, asked_text(tokenizer, prompt, messages)
        if not text.startswith(before + words):
            ids = rendered_ids(tokenizer, text)
            continue
        # The document ends with the answer: what the template writes after it follows, its end token once.
        further = text[len(before + words) :]
        end = str(tokenizer.decode(answer[-1:], skip_special_tokens=False)) if ended else ""
        ids = [*ids, *answer, *rendered_ids(tokenizer, further.removeprefix(end))]
    return ids
