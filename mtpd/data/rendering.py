"""Prompts as token ids: through the model's chat template, or as plain text."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
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
        return plain_ids(tokenizer, words, escape=prompt.escape)
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
                ids[number] = plain_ids(tokenizer, words, escape=prompt.escape)
            else:
                assert not isinstance(prompt.prompt, str)
                text = asked_text(tokenizer, prompt, prompt.prompt)
                if MARK in text:
                    ids[number] = rendered_ids(tokenizer, text)
                else:
                    conversations.append((number, text))
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
    if prompt.escape:
        row = {key: [_marked(tokenizer, message) for message in messages] for key, messages in row.items()}
    try:
        return apply_chat_template(dict(row), tokenizer, **prompt.template)
    except (TemplateError, ValueError, TypeError, LookupError) as error:
        raise Unusable(
            "refused by the chat template", f"{prompt.name}: the chat template refuses its messages: {error}"
        ) from error


def rendered_ids(tokenizer: PreTrainedTokenizerBase, rendered: str) -> list[int]:
    """Tokens of text that a template has written.

    Raises:
        Unusable: its control tokens that are to be characters cannot be read so by this tokenizer.
    """
    if MARK in rendered:
        return _escaped_ids(tokenizer, rendered)
    # The template has written the special tokens: a second BOS would put the model where it never was.
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, escape: bool = False) -> list[int]:
    """Tokens of plain text with what the tokenizer puts before it, without what some put after it.

    Args:
        escape: reads control tokens as the characters that they are.
    """
    bare = list(tokenizer(text, add_special_tokens=False, split_special_tokens=escape)["input_ids"])
    ids = list(tokenizer(text, split_special_tokens=escape)["input_ids"])
    extra = len(ids) - len(bare)
    for before in range(extra, -1, -1):
        if ids[before : before + len(bare)] == bare:
            return ids[: before + len(bare)]
    return ids


MARK = "\ue001"
"""A character of private use. Behind the first character of a control token it keeps it from being one."""


def _marked(tokenizer: PreTrainedTokenizerBase, message: Message) -> Message:
    """The message with its control tokens marked."""
    pattern = control_tokens(tokenizer)
    if pattern is None:
        return message
    texts = {key: message[key] for key in ("content", "reasoning_content") if key in message}
    return message | {
        key: pattern.sub(lambda found: found[0][:1] + MARK + found[0][1:], text) for key, text in texts.items()
    }


def _escaped_ids(tokenizer: PreTrainedTokenizerBase, rendered: str) -> list[int]:
    """Tokens of text in which marked control tokens are characters, and the others control tokens.

    Tokenizers read what stands between two control tokens by itself, so that it can be read here alone.
    """
    pattern = control_tokens(tokenizer)
    assert pattern is not None
    runs, end = [""], 0
    for found in [*pattern.finditer(rendered), None]:
        between = rendered[end : found.start() if found else len(rendered)]
        control = found[0] if found else ""
        end = found.end() if found else end
        # What is marked is a run of its own; all others go on with the one before.
        runs[-1:] = [runs[-1], between, control] if MARK in between else [runs[-1] + between + control]
    ids: list[int] = []
    checked: list[int] = []
    for run in runs:
        same = list(tokenizer(run, add_special_tokens=False)["input_ids"])
        checked += same
        marked = MARK in run
        ids += list(
            tokenizer(run.replace(MARK, ""), add_special_tokens=False, split_special_tokens=True)["input_ids"]
            if marked
            else same
        )
    if checked != list(tokenizer(rendered, add_special_tokens=False)["input_ids"]):
        raise Unusable(
            "with control tokens that cannot be escaped",
            "data.special_tokens_in_text: escape is not accepted for this tokenizer, which reads pieces of a text "
            "otherwise than the whole; accepted: keep",
        )
    return ids


@lru_cache(maxsize=8)
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
            "%d of %d prompts have control tokens of the model in their text, read as %s (first: %s)",
            count,
            len(prompts),
            "the characters that they are"
            if prompts[0].escape
            else "control tokens; data.special_tokens_in_text: escape reads them as characters",
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
