"""One row of data as a prompt, by the columns that it has.

    {"messages": [messages]}                     a conversation; every assistant turn is a response
    {"conversations": [messages]}                the same; `from` and `value` are read as `role` and `content`
    {"turns": [str, ...]}                        user messages of one conversation
    {"prompt": str}                              an instruction: one user message
    {"prompt": [messages]}                       a conversation to be answered
    {"prompt": ..., "completion": ...}           both strings (used as they are, no chat template) or both messages
    {"prompt": ..., "chosen": ..., "rejected"}   preferences: `chosen` is the completion, or the whole conversation
    {"instruction", "input", "output"}           a user message and its answer; so are question and answer, query and
                                                 response, prompt and response
    {"text": str}                                plain text, used as it is: the trunk continues it, or all is response

Beside them: `system`, `tools`, `chat_template_kwargs`; `id`, and `family` or `category`, by which results are grouped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtpd.data.rows.left_out import Unusable
from mtpd.data.rows.messages import from_json, read_messages, read_tools
from mtpd.data.rows.prompt import Message, Prompt

ASKED = {
    "instruction": ("output", "response", "answer", "chosen"),
    "question": ("answer", "response", "output", "chosen"),
    "query": ("response", "answer", "output", "chosen"),
    "prompt": ("response", "answer"),
}
"""Columns with a user message, and those that may hold its answer."""
MORE_OF = ("input", "context")
"""Columns with what an instruction is about."""
ACCEPTED = (
    "messages, conversations, turns, prompt, prompt + completion, prompt + chosen, instruction + output, question + "
    "answer, query + response, or text"
)
KNOWN = ("messages", "conversations", "turns", "chosen", "text", *ASKED)
"""Columns of which one says what a row is."""
MEDIA = ("image", "images", "audio", "audios", "video", "videos")


def read_row(
    row: Any,
    *,
    place: str,
    default_id: str,
    default_family: str = "",
    template: Mapping[str, Any] | None = None,
) -> Prompt:
    """One row of data as a Prompt.

    Args:
        place: where it stands (file:line), named in messages.
        template: arguments of the chat template for rows that say nothing else.

    Raises:
        Unusable: naming `place` and what is accepted.
    """
    if not isinstance(row, dict):
        raise Unusable("not an object", f"{place}: expected an object with {ACCEPTED}, got {type(row).__name__}")
    row = {key: value for key, value in row.items() if value is not None}
    if any(row.get(column) for column in MEDIA):
        raise Unusable("pictures, sound or files", f"{place}: it has pictures or sound; accepted: text")
    arguments = dict(template or {}) | _arguments(row.get("chat_template_kwargs"), place)
    if tools := read_tools(row.get("tools"), place):
        arguments["tools"] = tools
    prompt, response, later = _content(row, place)
    system = row.get("system", row.get("system_prompt"))
    if isinstance(prompt, list) and isinstance(system, str) and system.strip() and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": system}, *prompt]
    return Prompt(
        str(row.get("id", default_id)),
        prompt,
        response,
        str(row.get("family", row.get("category", default_family))),
        later,
        arguments,
        place=place,
    )


Content = tuple[str | list[Message], str | list[Message] | None, tuple[list[Message], ...]]
"""Prompt, response, and later rounds."""


def _content(row: Mapping[str, Any], place: str) -> Content:
    for column in ("messages", "conversations", "conversation"):
        if column in row:
            return _conversation(read_messages(row[column], column, place), column, place)
    if "turns" in row:
        turns = row["turns"]
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
            raise Unusable("turns of no known form", f"{place}: `turns` must be a list of strings that is not empty")
        return [_user(turns[0])], None, tuple([_user(turn)] for turn in turns[1:] if turn.strip())
    if "chosen" in row and not any(column in row for column in ("instruction", "question", "query")):
        return _preference(row, place)
    for column, answers in ASKED.items():
        if column in row and not (column == "prompt" and ("completion" in row or not isinstance(row[column], str))):
            asked, answer = row[column], next((row[name] for name in answers if name in row), None)
            return _asked(column, asked, [row.get(name) for name in MORE_OF], answer, place)
    if "prompt" in row:
        return _completed(row["prompt"], row.get("completion"), place)
    if "text" in row:
        if not isinstance(row["text"], str):
            raise Unusable(
                "text of no known form", f"{place}: `text` must be a string, got {type(row['text']).__name__}"
            )
        return row["text"], None, ()
    raise Unusable(
        "no known column",
        f"{place}: no known field in {sorted(map(str, row))}; accepted are {ACCEPTED}, or data.columns",
    )


def _conversation(messages: list[Message], field: str, place: str) -> Content:
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    if not any(message["role"] != "system" for message in messages[:first]):
        if first == len(messages):
            raise Unusable("no user turn", f"{place}: `{field}` must have a user turn")
        raise Unusable("assistant first", f"{place}: `{field}` must not begin with the assistant")
    return messages[:first], messages[first:] or None, _rounds(messages[first:])


def _asked(column: str, asked: Any, more: list[Any], answer: Any, place: str) -> Content:
    if not isinstance(asked, str):
        raise Unusable("column of no known form", f"{place}: `{column}` must be a string, got {type(asked).__name__}")
    parts = [asked, *(part for part in more if column == "instruction" and isinstance(part, str) and part.strip())]
    if answer is not None and not isinstance(answer, str):
        raise Unusable(
            "column of no known form",
            f"{place}: the answer to `{column}` must be a string, got {type(answer).__name__}",
        )
    response = [{"role": "assistant", "content": answer}] if answer is not None and answer.strip() else None
    return [_user("\n\n".join(parts))], response, ()


def _completed(prompt: Any, completion: Any, place: str) -> Content:
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt, completion, ()
    if isinstance(prompt, str) or isinstance(completion, str):
        raise Unusable(
            "column of no known form",
            f"{place}: `prompt` and `completion` must both be strings or both be lists of messages",
        )
    answer = None if completion is None else read_messages(completion, "completion", place)
    return read_messages(prompt, "prompt", place), answer, _rounds(answer or [])


def _preference(row: Mapping[str, Any], place: str) -> Content:
    prompt, chosen = row.get("prompt"), row["chosen"]
    if isinstance(chosen, str):
        if prompt is None and isinstance(row.get("rejected"), str):
            from trl import extract_prompt  # takes seconds to import

            split = extract_prompt({"chosen": chosen, "rejected": row["rejected"]})
            prompt, chosen = split["prompt"], split["chosen"]
        return _completed(prompt or "", chosen, place)
    messages = read_messages(chosen, "chosen", place)
    if messages[0]["role"] != "assistant":
        # The whole conversation, the prompt among it.
        return _conversation(messages, "chosen", place)
    asked = [_user(prompt)] if isinstance(prompt, str) else read_messages(prompt, "prompt", place)
    return asked, messages, _rounds(messages)


def _arguments(value: Any, place: str) -> dict[str, Any]:
    found = from_json(value) if isinstance(value, str) and value.strip() else value or {}
    if not isinstance(found, dict):
        raise Unusable(
            "template arguments of no known form",
            f'{place}: `chat_template_kwargs` must be an object, such as {{"enable_thinking": false}}',
        )
    return {str(key): item for key, item in found.items() if item is not None}


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
