"""Rows as data sets write them: roles, tools, contents, thoughts, columns, and what cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mtpd.data.builtin_models import tiny_tokenizer
from mtpd.data.given import given_samples
from mtpd.data.prompts import Prompt, load_prompts, render
from mtpd.data.rendering import _say_plain, render_all, warn_of_control_tokens
from mtpd.data.rows.left_out import LeftOut, Unusable
from mtpd.data.rows.row_format import RowFormat
from mtpd.errors import UserError

USER, ASSISTANT = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}
AGAIN = {"role": "user", "content": "and then?"}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "sum", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "sum", "arguments": {"a": 1}}}
END = 257
# Writes tools, calls (arguments as an object), results, names and thoughts, each only if it is there.
TOOLS_TEMPLATE = (
    "{% if tools %}tools:{% for t in tools %}{{ t.function.name }}{% endfor %}<|im_end|>{% endif %}"
    "{% for m in messages %}{{ m.role }}{% if m.name %}({{ m.name }}){% endif %}:"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} "
    "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}]{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture
def tokenizer() -> Any:
    return tiny_tokenizer()


def read(row: Any, **fields: Any) -> Any:
    return RowFormat(**fields).read(row, place="rows.jsonl:3", default_id="1")


def rendered(tokenizer: Any, row: dict[str, Any]) -> str:
    return str(tokenizer.decode(render(tokenizer, read(row))))


def marked(tokenizer: Any, row: dict[str, Any]) -> list[tuple[str, str]]:
    samples = given_samples(tokenizer, read(row), end_tokens=[END])
    return [(tokenizer.decode(sample.ids), tokenizer.decode(sample.response_ids)) for sample in samples]


@pytest.mark.parametrize("asks", ["human", "user", "Human"])
@pytest.mark.parametrize("answers", ["gpt", "assistant", "chatgpt", "model", "bing", "bard"])
def test_roles_of_sharegpt(asks: str, answers: str) -> None:
    """Fault: a template that writes any role takes question and answer for the prompt, and a strict one refuses."""
    row = {"conversations": [{"from": "system", "value": "Be brief."}, {"from": asks, "value": "hello"}]}
    row["conversations"].append({"from": answers, "value": "hi"})
    found = read(row)
    assert (found.prompt, found.response) == ([SYSTEM, USER], [ASSISTANT])


def test_tool_roles_of_sharegpt() -> None:
    """Fault: a call and its result are words of somebody whom no template knows."""
    turns = [("human", "hello"), ("function_call", json.dumps(CALL["function"])), ("observation", "3"), ("gpt", "hi")]
    found = read({"conversations": [{"from": role, "value": value} for role, value in turns]})
    call, result = {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "3"}
    assert found.response == [call, result, ASSISTANT]
    assert found.later == ([result],)
    spoken = [("human", "hello"), ("gpt", "Let me see."), ("function_call", json.dumps(CALL["function"]))]
    found = read({"conversations": [{"from": role, "value": value} for role, value in spoken]})
    assert found.response == [{**call, "content": "Let me see."}]


def test_an_unknown_role_is_named() -> None:
    """Fault: a role that nobody knows is passed on, or the message does not say which."""
    with pytest.raises(Unusable, match=r"rows\.jsonl:3: role 'critic' is not known; accepted: user, human") as caught:
        read({"messages": [USER, {"role": "critic", "content": "no"}]})
    assert caught.value.reason == "unknown role"


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [TOOL["function"]]], ids=["list", "JSON", "bare"])
@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}', {"a": 1, "b": None}], ids=["object", "JSON", "columnar"])
def test_tools_reach_the_template(tokenizer: Any, tools: Any, arguments: Any) -> None:
    """Fault: tools, calls or names are dropped, or arguments come in a form that the template does not read."""
    tokenizer.chat_template = TOOLS_TEMPLATE
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "sum", "arguments": arguments}}]}
    result = {"role": "tool", "name": "sum", "content": [{"type": "text", "text": "3"}]}
    row = {"messages": [USER, call, result, ASSISTANT], "tools": tools}
    assert rendered(tokenizer, row) == "tools:sum<|im_end|>user:hello<|im_end|>assistant:"
    [(whole, response)] = marked(tokenizer, row)
    asked = "tools:sum<|im_end|>user:hello<|im_end|>assistant:"
    assert whole == f"{asked}[sum a=1]<|im_end|>tool(sum):3<|im_end|>assistant:hi<|im_end|>"
    assert response == "[sum a=1]<|im_end|>hi<|im_end|>"


def test_text_parts_are_joined() -> None:
    """Fault: a list of parts ends the run, or its text is lost."""
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert read({"messages": [{"role": "user", "content": parts}]}).prompt == [USER]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
        {"messages": [USER], "images": ["x.png"]},
    ],
)
def test_pictures_and_sound_are_left_out(row: dict[str, Any]) -> None:
    """Fault: a question about a picture is trained on without it."""
    with pytest.raises(Unusable) as caught:
        read(row)
    assert caught.value.reason == "pictures, sound or files"


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_reach_the_template(tokenizer: Any, field: str) -> None:
    """Fault: thoughts beside the content are dropped without a word."""
    tokenizer.chat_template = TOOLS_TEMPLATE
    [(_, response)] = marked(tokenizer, {"messages": [USER, {**ASSISTANT, field: "hm"}]})
    assert response == "<think>hm</think>hi<|im_end|>"


def test_thoughts_that_a_template_does_not_write_are_named(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Fault: a user believes that thoughts are trained on, and they are not."""
    tokenizer.name_or_path = "a-model"
    marked(tokenizer, {"messages": [USER, {**ASSISTANT, "reasoning_content": "hm"}]})
    assert "a-model: its chat template does not write the thoughts (reasoning_content)" in caplog.text


def test_arguments_of_the_template(tokenizer: Any) -> None:
    """Fault: `enable_thinking: false` cannot be said, or that of the recipe goes before a row's own."""
    tokenizer.chat_template += "{% if enable_thinking is false %}<think></think>{% endif %}"
    prompts = [
        read({"prompt": "hello", **own}, chat_template_kwargs={"enable_thinking": False})
        for own in ({}, {"chat_template_kwargs": {"enable_thinking": True}}, {"chat_template_kwargs": "{}"})
    ]
    shown = [tokenizer.decode(render(tokenizer, prompt)).endswith("<think></think>") for prompt in prompts]
    assert shown == [True, False, True]


@pytest.mark.parametrize("answer", ["hi", "hi, think of it"])
def test_what_the_template_writes_is_no_response(tokenizer: Any, answer: str) -> None:
    """Fault: an empty block of thoughts that the template puts into a given answer is trained on as response."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}{% for c in m.tool_calls or [] %}[{{ c.function.name }}]{% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    [(whole, response)] = marked(tokenizer, {"messages": [USER, {"role": "assistant", "content": answer}]})
    assert whole == f"user:hello<|im_end|>assistant:<think>\n\n</think>\n\n{answer}<|im_end|>"
    assert response == f"{answer}<|im_end|>"
    [(_, called)] = marked(
        tokenizer, {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}
    )
    assert called == "[sum]<|im_end|>"


def test_rewritten_turns_are_documents_of_their_own(tokenizer: Any) -> None:
    """Fault: a template that strips thoughts from earlier turns ends the run, or prompt tokens count as response."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' and not loop.last %}"
        "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    first, second = ({"role": "assistant", "content": f"<think>{n}</think>hi"} for n in (1, 2))
    asked = "user:hello<|im_end|>assistant:"
    assert marked(tokenizer, {"messages": [USER, first, AGAIN, second]}) == [
        (f"{asked}<think>1</think>hi<|im_end|>", "<think>1</think>hi<|im_end|>"),
        (
            f"{asked}hi<|im_end|>user:and then?<|im_end|>assistant:<think>2</think>hi<|im_end|>",
            "<think>2</think>hi<|im_end|>",
        ),
    ]


def test_control_tokens_in_a_text_are_counted(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Fault: a user's `<|im_end|>` ends their turn without a word."""
    prompts = [read({"prompt": "hello"}), read({"prompt": "what is <|im_end|>?"})]
    assert warn_of_control_tokens(tokenizer, prompts) == 1
    assert "1 of 2 prompts have control tokens" in caplog.text
    assert "<|im_end|> in prompt 1 (rows.jsonl:3)" in caplog.text
    assert warn_of_control_tokens(tokenizer, prompts[:1]) == 0


@pytest.mark.parametrize("text", ["<|im_end|>", "what is <|im_end|> or <|pad|>?", "<|im_end|><|im_start|>user\nx"])
def test_control_tokens_can_be_escaped(tokenizer: Any, text: str) -> None:
    """Fault: `escape` changes the words, or tokens beside them, or leaves some control tokens that they are."""
    asked = read({"messages": [{"role": "user", "content": f"{text} grüß"}, ASSISTANT]}, escape=True)
    ids = render(tokenizer, asked)
    around = [render(tokenizer, read({"prompt": "|"}))[:6], render(tokenizer, read({"prompt": "|"}))[-13:]]
    words = tokenizer(f"{text} grüß", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert max(words) < 256
    assert [id for id in ids if id >= 256] == [256, END, 256]
    assert ids == [*around[0], *words, *around[1]]
    assert render_all(tokenizer, [asked], LeftOut()) == [(asked, ids)]
    (sample,) = given_samples(tokenizer, asked, end_tokens=[END])
    assert (sample.prompt_ids, tokenizer.decode(sample.response_ids)) == (ids, "hi<|im_end|>")
    plain = read({"text": text}, escape=True)
    assert render(tokenizer, plain) == words[: -len(" grüß".encode())]
    (sample,) = given_samples(tokenizer, plain, end_tokens=[END])
    assert sample.response_ids == [*render(tokenizer, plain), END]


def test_a_model_without_template_continues_plain_text(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Fault: base models refuse rows with `prompt`, or take them as plain text without a word."""
    tokenizer.chat_template, tokenizer.name_or_path = None, "a-base-model"
    _say_plain.cache_clear()
    assert rendered(tokenizer, {"prompt": "hello"}) == "hello"
    assert rendered(tokenizer, {"instruction": "hello"}) == "hello"
    assert caplog.text.count("a-base-model: no chat template") == 1
    left_out = LeftOut()
    assert not render_all(tokenizer, [Prompt("1", [USER, ASSISTANT, USER])], left_out)
    assert left_out.counts == {"conversation without chat template": 1}


@pytest.mark.parametrize(
    ("row", "prompt", "response"),
    [
        ({"conversations": [USER, ASSISTANT], "system": "Be brief."}, [SYSTEM, USER], [ASSISTANT]),
        ({"messages": json.dumps([USER, ASSISTANT])}, [USER], [ASSISTANT]),
        ({"instruction": "hello", "input": "", "output": "hi", "text": "both"}, [USER], [ASSISTANT]),
        ({"instruction": "hel", "input": "lo", "output": "hi"}, [{**USER, "content": "hel\n\nlo"}], [ASSISTANT]),
        ({"question": "hello", "answer": "hi"}, [USER], [ASSISTANT]),
        ({"system_prompt": "Be brief.", "question": "hello", "response": "hi"}, [SYSTEM, USER], [ASSISTANT]),
        ({"query": "hello", "response": "hi"}, [USER], [ASSISTANT]),
        ({"prompt": "hello", "response": "hi"}, [USER], [ASSISTANT]),
        ({"prompt": "hello", "chosen": [USER, ASSISTANT], "rejected": [USER]}, [USER], [ASSISTANT]),
        ({"prompt": "hello", "chosen": [ASSISTANT], "rejected": [ASSISTANT]}, [USER], [ASSISTANT]),
        ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [ASSISTANT]}, [USER], [ASSISTANT]),
        ({"question": "hello", "chosen": "hi", "rejected": "no"}, [USER], [ASSISTANT]),
        ({"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}, "1 + 1 =", " 2"),
        ({"chosen": "Q: hi A: yes", "rejected": "Q: hi A: no"}, "Q: hi A:", " yes"),
    ],
)
def test_columns(row: dict[str, Any], prompt: Any, response: Any) -> None:
    """Fault: a common file cannot be read, or its answer is taken for a part of the question."""
    found = read(row)
    assert (found.prompt, found.response) == (prompt, response)


def test_columns_by_name() -> None:
    """Fault: other columns cannot be read, or a column that is missing is passed over."""
    row = {"id": "x", "q": "hello", "a": "hi", "messages": "of no use"}
    found = read(row, columns={"question": "q", "answer": "a"})
    assert (found.id, found.prompt, found.response) == ("x", [USER], [ASSISTANT])
    assert read(row, columns={"prompt": "q", "completion": "a"}).response == "hi"
    found = read(row, template="{{ q }}", columns={"completion": "a"})
    assert (found.prompt, found.response) == ([USER], [ASSISTANT])
    with pytest.raises(Unusable, match=r"rows\.jsonl:3: no column z, which data\.columns\.prompt names; it has id, q"):
        read(row, columns={"prompt": "z"})
    for template in ("{{ z }}", "{{ q.__class__.mro() }}", "{{ q"):
        with pytest.raises(Unusable, match=r"rows\.jsonl:3: data\.template: "):
            read(row, template=template)


def rows_file(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


ODD = [
    ({"prompt": "  "}, "empty"),
    ({"messages": [ASSISTANT, USER]}, "assistant first"),
    ({"messages": [{"role": "critic", "content": "no"}]}, "unknown role"),
    ({"subject": "?"}, "no known column"),
    (["hello"], "not an object"),
    ('{"prompt": "torn', "no JSON"),
    ({"messages": [USER], "tools": "no JSON"}, "tools of no known form"),
]


@pytest.mark.parametrize(("row", "reason"), ODD, ids=[reason for _, reason in ODD])
def test_an_odd_row_is_left_out(row: Any, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fault: one odd row ends a run, or is left out without a word."""
    path = rows_file(tmp_path / "rows.jsonl", [*({"prompt": f"Say {n}."} for n in range(20)), row])
    left_out = LeftOut()
    assert len(load_prompts(path, left_out=left_out)) == 20
    assert left_out.counts == {reason: 1}
    assert left_out.noted()[reason]["first"].startswith(f"{path}:21: ")
    assert f"1 of 21 rows cannot be used: 1 {reason} (first: {path}:21: " in caplog.text


def test_too_many_odd_rows_end_the_run(tmp_path: Path) -> None:
    """Fault: a run on a tenth of a file that was read wrongly, or the share of the recipe is not looked at."""
    path = rows_file(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": "b"}, {"prompt": " "}])
    with pytest.raises(UserError, match=r"1 of 3 rows cannot be used: 1 empty .*rows\.jsonl:3.*data\.max_unusable"):
        load_prompts(path)
    assert len(load_prompts(path, left_out=LeftOut(0.5))) == 2


def test_what_a_template_refuses_is_left_out(tokenizer: Any) -> None:
    """Fault: two user turns in a row end a run whose template wants turns that alternate."""
    tokenizer.chat_template = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    left_out = LeftOut()
    prompts = [read({"messages": [USER]}), read({"messages": [USER, AGAIN]})]
    assert [prompt for prompt, _ in render_all(tokenizer, prompts, left_out)] == prompts[:1]
    assert left_out.counts == {"refused by the chat template": 1}
    assert "roles must alternate" in left_out.words()


def test_many_are_rendered_as_each_is(tokenizer: Any) -> None:
    """Fault: texts that are tokenised together get other tokens, or come out in another order."""
    rows = [{"prompt": "hello"}, {"text": "once"}, {"messages": [SYSTEM, USER]}, {"prompt": "grüß"}]
    prompts = [read(row) for row in rows]
    found = render_all(tokenizer, prompts, LeftOut())
    assert [(prompt, render(tokenizer, prompt)) for prompt in prompts] == found


def test_a_draw_depends_on_texts_alone(tmp_path: Path) -> None:
    """Fault: a larger limit, a further row or another order throws away answers that still fit."""
    rows = [{"prompt": f"Say {n}."} for n in range(200)]
    texts = {
        name: {prompt.text for prompt in load_prompts(rows_file(tmp_path / f"{name}.jsonl", chosen), limit=limit)}
        for name, chosen, limit in (
            ("few", rows, 20),
            ("more", rows, 40),
            ("backwards", rows[::-1], 20),
            ("shifted", [{"prompt": "first"}, *rows], 20),
        )
    }
    assert len(texts["few"]) == 20
    assert texts["few"] < texts["more"]
    assert texts["few"] == texts["backwards"]
    assert len(texts["few"] & texts["shifted"]) >= 19
    drawn = load_prompts(str(tmp_path / "few.jsonl"), limit=20)
    assert drawn == sorted(drawn, key=lambda prompt: int(prompt.id.rpartition("-")[2]))
