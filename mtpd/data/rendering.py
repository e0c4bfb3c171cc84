"""Prompts as token ids: through the model's chat template, or as plain text."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from mtpd.data.rows.left_out import LeftOut, Unusable
from mtpd.data.rows.prompt import Message, Prompt

if TYPE_CHECKING:  # these bring in torch, and many commands read prompts before they need it
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def render(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of the prompt up to where the response begins.

    Messages go through the chat template, which writes its own special tokens; plain text gets those
    that the tokenizer puts before a text. So does an instruction for a model without chat template.

    Raises:
        Unusable: a conversation for a model without chat template, or a template that refuses it.
    """
    words = plain_words(tokenizer, prompt)
    if words is not None:
        return plain_ids(tokenizer, words)
    assert not isinstance(prompt.prompt, str)
    return rendered_ids(tokenizer, asked_text(tokenizer, prompt, prompt.prompt))


def render_all(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], left_out: LeftOut
) -> list[tuple[Prompt, list[int]]]:
    """Prompts with their token ids, many at a time; those that cannot be rendered are left out and counted."""
    conversations: list[tuple[int, str]] = []
    ids: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        try:
            words = plain_words(tokenizer, prompt)
            if words is not None:
                ids[number] = plain_ids(tokenizer, words)
            else:
                assert not isinstance(prompt.prompt, str)
                conversations.append((number, asked_text(tokenizer, prompt, prompt.prompt)))
        except Unusable as error:
            left_out.add(error)
    for start in range(0, len(conversations), BATCH):
        batch = conversations[start : start + BATCH]
        tokens = tokenizer([text for _, text in batch], add_special_tokens=False)["input_ids"]
        ids |= {number: list(found) for (number, _), found in zip(batch, tokens, strict=True)}
    return [(prompts[number], ids[number]) for number in sorted(ids)]


BATCH = 1024
"""Texts that are tokenised at a time."""


def plain_words(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str | None:
    """The words of a prompt that no template writes: plain text, or an instruction for a model without template."""
    if isinstance(prompt.prompt, str):
        return prompt.prompt
    if tokenizer.chat_template or [message["role"] for message in prompt.prompt] != ["user"]:
        return None
    _say_plain(str(tokenizer.name_or_path))
    return str(prompt.prompt[0]["content"])


@cache
def _say_plain(model: str) -> None:
    logger.warning("%s: no chat template, so that prompts are plain text that it continues", model or "the model")


def asked_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, messages: list[Message]) -> str:
    """What the template writes for messages of a prompt's conversation, up to where the next answer begins.

    Raises:
        Unusable: as `apply_template`.
    """
    return apply_template(tokenizer, {"prompt": messages}, prompt)["prompt"]


def apply_template(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, list[Message]], prompt: Prompt
) -> dict[str, str]:
    """TRL's rendering of messages of a prompt's conversation, and of a completion after them.

    Raises:
        Unusable: there is no template, or it refuses the messages.
    """
    from trl import apply_chat_template  # takes seconds to import

    if not tokenizer.chat_template:
        raise Unusable(
            "conversation without chat template",
            f"{prompt.name} is a conversation and the model has no chat template: choose an instruction-tuned model, "
            "save a template with its tokenizer (chat_template.jinja), or give data.prompts with `text` rows",
        )
    try:
        return apply_chat_template(dict(row), tokenizer, **prompt.template)
    except (TemplateError, ValueError, TypeError, LookupError) as error:
        raise Unusable(
            "refused by the chat template", f"{prompt.name}: the chat template refuses its messages: {error}"
        ) from error


def rendered_ids(tokenizer: PreTrainedTokenizerBase, rendered: str) -> list[int]:
    """Tokens of text that a template has written."""
    # The template has written the special tokens: a second BOS would put the model where it never was.
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of plain text with what the tokenizer puts before it, without what some put after it."""
    bare = rendered_ids(tokenizer, text)
    ids = list(tokenizer(text)["input_ids"])
    extra = len(ids) - len(bare)
    for before in range(extra, -1, -1):
        if ids[before : before + len(bare)] == bare:
            return ids[: before + len(bare)]
    return ids


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """A pattern of the tokens that are control tokens wherever they stand; None where there are none."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    words = sorted({*tokenizer.all_special_tokens, *added} - {""}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, words))) if words else None


def warn_of_control_tokens(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> int:
    """Warns of texts that hold what the tokenizer takes for control tokens.

    Returns:
        How many prompts there are.
    """
    pattern, count, example = control_tokens(tokenizer), 0, ""
    if pattern is None:
        return 0
    for prompt in prompts:
        found = next((match[0] for text in _texts(prompt) if (match := pattern.search(text))), None)
        if found is not None:
            count += 1
            example = example or f"{found} in {prompt.name}"
    if count:
        logger.warning(
            "%d of %d prompts have control tokens of the model in their text, which are read as such (first: %s)",
            count,
            len(prompts),
            example,
        )
    return count


def _texts(prompt: Prompt) -> list[str]:
    """All text of a row that came with the data."""
    parts: list[Any] = [prompt.prompt, prompt.response or "", *prompt.later]
    return [
        text
        for part in parts
        for text in ([part] if isinstance(part, str) else [message["content"] for message in part])
    ]
