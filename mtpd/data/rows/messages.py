"""Messages as data sets write them, in the form that chat templates read.

Roles have the names of the OpenAI format, arguments of tool calls are objects, contents are text: parts are joined.
"""

from __future__ import annotations

import json
from typing import Any

from mtpd.data.rows.left_out import Unusable
from mtpd.data.rows.prompt import Message

SYNONYMS = {
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "model", "bing", "bard", "bot", "ai"),
    "system": ("system", "developer"),
    "tool": ("tool", "observation", "function", "function_response", "tool_response", "ipython"),
    "function_call": ("function_call", "tool_call"),
}
ROLES = {synonym: role for role, synonyms in SYNONYMS.items() for synonym in synonyms}
TEXTS = ("text", "input_text", "output_text")
"""Kinds of parts whose `text` is content."""
OTHER_MEDIA = ("image", "audio", "video", "sound", "file")
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Fields of a message that hold thoughts."""


def read_messages(value: Any, field: str, place: str) -> list[Message]:
    """Reads a conversation, in the OpenAI or the ShareGPT form.

    Raises:
        Unusable: naming `place`, `field`, and what is accepted.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = from_json(value)
    if not isinstance(value, list) or not value:
        raise Unusable(
            "not a conversation", f"{place}: `{field}` must be a string or a list of messages that is not empty"
        )
    found: list[Message] = []
    for message in (_message(message, field, place) for message in value):
        last = found[-1] if found else {}
        if (
            last.get("role") == "assistant"
            and "tool_calls" not in last
            and not message["content"]
            and ("tool_calls" in message)
        ):
            # ShareGPT rows have words and calls of one turn in two entries.
            found[-1] = {**last, "tool_calls": message["tool_calls"]}
        else:
            found.append(message)
    return found


def read_tools(value: Any, place: str) -> list[dict[str, Any]]:
    """Reads the tools of a row: a list of JSON schemas, or such a list as a JSON string.

    Raises:
        Unusable: naming `place` and what is accepted.
    """
    tools = from_json(value) if isinstance(value, str) and value.strip() else value or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Unusable("tools of no known form", f"{place}: `tools` must be a list of objects, or one as a JSON string")
    found = [_without_none(tool) for tool in tools]
    return [{"type": "function", "function": tool} if _is_bare(tool) else tool for tool in found]


def _message(message: Any, field: str, place: str) -> Message:
    if not isinstance(message, dict):
        raise Unusable("message of no known form", f"{place}: each message of `{field}` must have `role` and `content`")
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not isinstance(role, str):
        raise Unusable("message of no known form", f"{place}: each message of `{field}` must have `role` and `content`")
    known = ROLES.get(role.strip().lower())
    if known is None:
        raise Unusable("unknown role", f"{place}: role {role!r} is not known; accepted: {', '.join(ROLES)}")
    calls = message.get("tool_calls") or message.get("function_call")
    if known == "function_call":
        calls, known = calls or content, "assistant"
        # What is no call in JSON stays the text that it is.
        content = None if _calls(calls) else content
    found: Message = {"role": known, "content": _text(content, field, place, optional=bool(calls))}
    for key in ("name", "tool_call_id"):
        if isinstance(message.get(key), str):
            found[key] = message[key]
    thoughts = next((message[key] for key in REASONING if isinstance(message.get(key), str)), "")
    if thoughts.strip():
        found["reasoning_content"] = thoughts
    if calls and (read := _calls(calls)):
        found["tool_calls"] = read
    elif calls and known == "assistant" and not found["content"]:
        raise Unusable(
            "tool calls of no known form",
            f"{place}: `tool_calls` must be a list of objects with `name` and `arguments`, or with `function`",
        )
    return found


def _text(content: Any, field: str, place: str, *, optional: bool) -> str:
    """The text of a message: a string, or the text of all parts."""
    if isinstance(content, str):
        return content
    if content is None and optional:
        return ""
    if not isinstance(content, list):
        raise Unusable(
            "message of no known form",
            f"{place}: each message of `{field}` must have `role` and `content`, both strings, or text parts",
        )
    parts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if any(word in str(kind) for word in OTHER_MEDIA):
            raise Unusable("pictures, sound or files", f"{place}: a message has a part of type {kind}; accepted: text")
        if kind not in TEXTS or not isinstance(text, str):
            raise Unusable("message of no known form", f"{place}: a message has a part of type {kind}; accepted: text")
        parts.append(text)
    return "".join(parts)


def _calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects; none where it is no such thing."""
    found = from_json(value) if isinstance(value, str) else value
    calls = []
    for call in found if isinstance(found, list) else [found]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return []
        arguments = function.get("arguments", function.get("parameters"))
        parsed = from_json(arguments) if isinstance(arguments, str) else arguments
        arguments = _without_none(parsed) if isinstance(parsed, dict) else arguments or {}
        whole = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        if isinstance(call.get("id"), str):
            whole["id"] = call["id"]
        calls.append(whole)
    return calls


def _is_bare(tool: dict[str, Any]) -> bool:
    """Whether a tool is the function alone, without the object around it that templates read."""
    return "function" not in tool and isinstance(tool.get("name"), str)


def _without_none(value: Any) -> Any:
    """Objects without the keys that columnar files fill with null in every row."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def from_json(text: str) -> Any:
    """The value of a JSON string; None for what is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
