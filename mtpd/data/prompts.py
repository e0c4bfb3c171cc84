"""Prompts from the built-in set, a JSONL file or a `datasets` id, and their tokens.

A row says what it is by its fields (the formats are TRL's, and suite rows beside them):

    {"prompt": str}                       an instruction: one user message
    {"turns": [str, ...]}                 a suite row: its first turn is one user message
    {"prompt": [messages]}                a conversation to be answered
    {"messages": [messages]}              a conversation; every assistant turn is a response
    {"prompt": ..., "completion": ...}    both strings (used as they are, no chat template) or both messages
    {"text": str}                         plain text, used as it is: continued by the trunk, or all of it response

`conversations` with `from`/`value` is read as `messages`. Optional fields: `id`, and `family` or
`category`, by which results are grouped.
"""

from __future__ import annotations

import logging
import random
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from mtpd.data import sources
from mtpd.errors import UserError
from mtpd.files import fingerprint, short

if TYPE_CHECKING:  # these bring in torch, and many commands read prompts before they need it
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

Message = dict[str, Any]
"""`role` and `content`, and what else a chat template reads."""
ACCEPTED = "prompt, prompt + completion, messages, text, or turns"


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the response that came with it if one did.

    `prompt` is plain text or a list of messages. `response` is of the same kind; as messages it is all
    that follows the prompt, and its assistant turns are the response.
    """

    id: str
    prompt: str | list[Message]
    response: str | list[Message] | None = None
    family: str = ""
    later: tuple[list[Message], ...] = ()
    """What is said in each further round of the conversation, after the trunk's own answer to the one before: a user
    turn, or the results of tools. Answers that came with the data are in `response` alone."""
    template: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the chat template: `tools`, and those of its own such as `enable_thinking`."""

    @property
    def text(self) -> str:
        """The words that tell prompts apart: what the user says, without system messages."""
        if isinstance(self.prompt, str):
            return self.prompt
        said = [message["content"] for message in self.prompt if message["role"] == "user"]
        return "\n".join(said or [message["content"] for message in self.prompt])

    @property
    def fingerprint(self) -> str:
        """The same for prompts that differ only in case, spaces and punctuation."""
        return prompt_fingerprint(self.text)


def load_prompts(
    source: str, *, split: str = "train", subset: str | None = None, limit: int | None = None, seed: int = 0
) -> list[Prompt]:
    """Loads prompts.

    Args:
        source: "builtin", "builtin-held-out" or "builtin-other", "stdlib" or "stdlib-held-out", a .jsonl file, or the
            id (or folder) of a `datasets` data set.
        split: which split of a `datasets` data set.
        subset: its configuration name.
        limit: at most so many, drawn with `seed`; None takes all in their order.

    Raises:
        UserError: a missing file, an unreadable line (named as file:line), a row of no known format, no rows.
    """
    prompts: list[Prompt] = []
    blank = 0
    ids = DistinctIds()
    stem = Path(source).stem
    for index, (place, row) in enumerate(sources.read(source, split=split, subset=subset)):
        prompt = read_row(row, place=place, default_id=f"{stem}-{index}", default_family=stem)
        if not prompt.text.strip() and not prompt.response:
            blank += 1
            continue
        prompts.append(ids.number(prompt))
    if ids.repeated:
        logger.warning("%s: %s", source, ids.words())
    if blank:
        logger.warning("%s: %d rows without text are left out", source, blank)
    if not prompts:
        raise UserError(f"data.prompts: {source} holds no prompts")
    if limit is not None and limit < len(prompts):
        prompts = random.Random(seed).sample(prompts, limit)
    return prompts


class DistinctIds:
    """Numbers the ids that several rows of one source have: `a`, `a#2`, `a#3`."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._next: Counter[str] = Counter()
        self.repeated = 0
        """Rows whose id an earlier row has."""
        self._example = ""

    def number(self, prompt: Prompt) -> Prompt:
        """The prompt with an id that no earlier one has."""
        name = prompt.id
        while name in self._taken:
            self._next[prompt.id] += 1
            name = f"{prompt.id}#{self._next[prompt.id] + 1}"
        self._taken.add(name)
        if name != prompt.id:
            self.repeated += 1
            self._example = self._example or f"{prompt.id} again is {name}"
        return replace(prompt, id=name)

    def words(self) -> str:
        """Words for a warning."""
        what = "row has the id" if self.repeated == 1 else "rows have the id"
        return f"{self.repeated} {what} of an earlier one; they are numbered ({self._example})"


def read_row(row: Any, *, place: str, default_id: str, default_family: str = "") -> Prompt:
    """One row of data as a Prompt.

    Raises:
        UserError: naming `place` and what is accepted.
    """
    if not isinstance(row, dict):
        raise UserError(f"{place}: expected an object with {ACCEPTED}, got {type(row).__name__}")
    row = {key: value for key, value in row.items() if value is not None}
    name = str(row.get("id", default_id))
    family = str(row.get("family", row.get("category", default_family)))
    if "conversations" in row:
        from trl import maybe_convert_to_chatml  # takes seconds to import

        row = maybe_convert_to_chatml(dict(row))

    if "turns" in row:
        turns = row["turns"]
        if not isinstance(turns, list) or not turns or not isinstance(turns[0], str):
            raise UserError(f"{place}: `turns` must be a list of strings that is not empty")
        later = tuple([_user(turn)] for turn in turns[1:] if isinstance(turn, str) and turn.strip())
        return Prompt(name, [_user(turns[0])], None, family, later)
    if "messages" in row:
        messages = _messages(row["messages"], "messages", place)
        first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
        if first == 0:
            raise UserError(f"{place}: `messages` must not begin with the assistant")
        return Prompt(name, messages[:first], messages[first:] or None, family, _rounds(messages[first:]))
    if "prompt" in row:
        prompt, completion = row["prompt"], row.get("completion")
        if isinstance(prompt, str) and completion is None:
            return Prompt(name, [_user(prompt)], None, family)
        if isinstance(prompt, str) and isinstance(completion, str):
            return Prompt(name, prompt, completion, family)
        if isinstance(prompt, str) or isinstance(completion, str):
            raise UserError(f"{place}: `prompt` and `completion` must both be strings or both be lists of messages")
        answer = None if completion is None else _messages(completion, "completion", place)
        return Prompt(name, _messages(prompt, "prompt", place), answer, family)
    if "text" in row:
        if not isinstance(row["text"], str):
            raise UserError(f"{place}: `text` must be a string, got {type(row['text']).__name__}")
        return Prompt(name, row["text"], None, family)
    raise UserError(f"{place}: no known field in {sorted(row)}; accepted are {ACCEPTED}")


@dataclass(frozen=True)
class HeldOutSplit:
    """Training and held-out prompts that share no text.

    `duplicates` counts training prompts that repeat another one, `met` those that a held-out prompt repeats.
    """

    train: list[Prompt]
    held_out: list[Prompt]
    duplicates: int
    met: int


def split_held_out(
    prompts: list[Prompt], held_out: list[Prompt] | None, *, count: int = 80, seed: int = 0
) -> HeldOutSplit:
    """Removes repeated prompts, then everything from training that is held out.

    Args:
        held_out: the prompts measured on; None takes `count` of the deduplicated `prompts` by `seed`.

    Raises:
        UserError: nothing is left to train on.
    """
    distinct = deduplicate(prompts)
    duplicates = len(prompts) - len(distinct)
    if held_out is None:
        if count >= len(distinct):
            raise UserError(
                f"data.held_out_count: {count} of {len(distinct)} distinct prompts leave none to train on; "
                "give more prompts, a smaller count, or data.held_out"
            )
        chosen = set(random.Random(seed).sample(range(len(distinct)), count))
        kept = [prompt for index, prompt in enumerate(distinct) if index not in chosen]
        return HeldOutSplit(kept, [distinct[index] for index in sorted(chosen)], duplicates, 0)
    held_out = deduplicate(held_out)
    measured = {prompt.fingerprint for prompt in held_out}
    kept = [prompt for prompt in distinct if prompt.fingerprint not in measured]
    if not kept:
        raise UserError(f"data.prompts: all {len(distinct)} distinct prompts are held out; none is left to train on")
    return HeldOutSplit(kept, held_out, duplicates, len(distinct) - len(kept))


def deduplicate(prompts: Iterable[Prompt]) -> list[Prompt]:
    """The first of each group of prompts with the same normalised text, in order."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.fingerprint, prompt)
    return list(first.values())


def normalise(text: str) -> str:
    """Lower case, and every run of punctuation and white space as one space.

    Symbols (+, =, <, $) stay, because sums differ by them. A text of punctuation alone stays as it is.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join(" " if unicodedata.category(char)[0] in "PZC" else char for char in folded)
    return " ".join(kept.split()) or folded.strip()


def prompt_fingerprint(text: str) -> str:
    """Fingerprint of a prompt's normalised text."""
    return short(fingerprint(normalise(text)))


def render(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of the prompt up to where the response begins.

    Messages go through the chat template, which writes its own special tokens; plain text gets those
    that the tokenizer puts before a text.

    Raises:
        UserError: messages for a model without chat template, or a template that refuses them.
    """
    if isinstance(prompt.prompt, str):
        return plain_ids(tokenizer, prompt.prompt)
    return rendered_ids(tokenizer, asked_text(tokenizer, prompt, prompt.prompt))


def asked_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, messages: list[Message]) -> str:
    """What the template writes for messages of a prompt's conversation, up to where the next answer begins."""
    return apply_template(tokenizer, {"prompt": messages}, prompt.id, prompt.template)["prompt"]


def apply_template(
    tokenizer: PreTrainedTokenizerBase,
    row: dict[str, list[Message]],
    name: str,
    arguments: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """TRL's rendering of a prompt, with the generation prompt, and of a completion after it."""
    from trl import apply_chat_template  # takes seconds to import

    if not tokenizer.chat_template:
        raise UserError(
            f"prompt {name} is a conversation and the model has no chat template: choose an instruction-tuned model, "
            "save a template with its tokenizer (chat_template.jinja), or give data.prompts with `text` rows"
        )
    try:
        return apply_chat_template(row, tokenizer, **(arguments or {}))
    except (TemplateError, ValueError, TypeError) as error:
        raise UserError(f"prompt {name}: the chat template refuses its messages: {error}") from error


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


def _rounds(messages: list[Message]) -> tuple[list[Message], ...]:
    """What others than the assistant say, in the groups that it answers."""
    found: list[list[Message]] = []
    answered = False
    for message in messages:
        if message["role"] == "assistant":
            answered = True
        elif answered:
            found.append([message])
            answered = False
        elif found:
            found[-1].append(message)
    return tuple(found)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _messages(value: Any, field: str, place: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{place}: `{field}` must be a string or a list of messages that is not empty")
    for message in value:
        # Pictures, tool calls and the like have other contents than text.
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise UserError(f"{place}: each message of `{field}` must have `role` and `content`, both strings")
    return [{"role": message["role"], "content": message["content"]} for message in value]
