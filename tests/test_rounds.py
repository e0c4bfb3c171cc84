"""Conversations of several rounds: every user turn is answered, after the trunk's own answers."""

from __future__ import annotations

from typing import Any

import pytest

from mtpd.data.builtin_models import tiny_tokenizer
from mtpd.data.prompts import read_row, render
from mtpd.data.rounds import render_round

USER, ASSISTANT = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}
AGAIN = {"role": "user", "content": "and then?"}
END = 257


@pytest.fixture
def tokenizer() -> Any:
    return tiny_tokenizer()


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT, AGAIN, ASSISTANT, USER]},
        {"messages": [USER, ASSISTANT, AGAIN, ASSISTANT, USER, ASSISTANT]},
        {"turns": ["hello", "and then?", "hello"]},
    ],
)
def test_all_user_turns_are_kept(row: dict[str, Any]) -> None:
    """Fault: only the first turn of a conversation is answered, and the rest vanishes."""
    prompt = read_row(row, place="here", default_id="1")
    assert prompt.prompt == [USER]
    assert prompt.later == ([AGAIN], [USER])


@pytest.mark.parametrize("end", [[END], []], ids=["ended", "cut"])
def test_rounds_are_one_document(tokenizer: Any, end: list[int]) -> None:
    """Fault: an answer is tokenised anew, so that what was answered is not what is trained on; or two end tokens."""
    prompt = read_row({"turns": ["hello", "and then?", "bye"]}, place="here", default_id="1")
    # No text at all: decoded and tokenised again these are other tokens.
    first, second = [200, 201, *end], [*ids_of(tokenizer, "so"), *end]
    start = render(tokenizer, prompt)
    one = render_round(tokenizer, prompt, [first], ends=[END])
    two = render_round(tokenizer, prompt, [first, second], ends=[END])
    assert render_round(tokenizer, prompt, [], ends=[END]) == start
    assert one[: len(start) + len(first)] == [*start, *first]
    assert two[: len(one) + len(second)] == [*one, *second]
    shown = tokenizer.decode(one[len(start) + 2 :])
    assert shown == "<|im_end|>\n<|im_start|>user\nand then?<|im_end|>\n<|im_start|>assistant\n"


def test_rewritten_turns_are_a_document_of_their_own(tokenizer: Any) -> None:
    """Fault: thoughts that the template strips from earlier turns stay in the history, as no server shows it."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'].split('</think>')[-1] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    prompt = read_row({"turns": ["hello", "and then?"]}, place="here", default_id="1")
    answer = ids_of(tokenizer, "<think>hm</think>hi")
    shown = tokenizer.decode(render_round(tokenizer, prompt, [[*answer, END]], ends=[END]))
    assert shown == "user:hello<|im_end|>assistant:hi<|im_end|>user:and then?<|im_end|>assistant:"
