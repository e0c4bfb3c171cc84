"""Prompts: formats, held-out sets, rendering and response masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from mtpd.data import sources
from mtpd.data.builtin_models import tiny_tokenizer
from mtpd.data.given import given_samples
from mtpd.data.prompts import Prompt, load_prompts, read_row, render, split_held_out
from mtpd.data.rows.prompt import normalise
from mtpd.errors import UserError

USER = {"role": "user", "content": "hello"}
ASSISTANT = {"role": "assistant", "content": "hi"}


@pytest.fixture
def tokenizer() -> Any:
    return tiny_tokenizer()


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def asked(text: str, id: str = "") -> Prompt:
    return Prompt(id or text, [{"role": "user", "content": text}])


FAMILIES = {"chat", "code", "extraction", "math", "qa", "summarising", "translation"}


def test_builtin_sets_are_disjoint_and_large_enough() -> None:
    """Fault: a prompt that is in two built-in sets makes the held-out figures too high, or a family is missing."""
    train, held_out, other = (load_prompts(name) for name in ("builtin", "builtin-held-out", "builtin-other"))
    everything = [*train, *held_out, *other]
    assert len({prompt.fingerprint for prompt in everything}) == len(everything)
    assert len({prompt.id for prompt in everything}) == len(everything)
    assert (len(train) >= 400, len(held_out) >= 80, len(other)) == (True, True, 24)
    assert {prompt.family for prompt in train} == {prompt.family for prompt in held_out} == FAMILIES
    assert {prompt.family for prompt in other} == {"other"}
    for family in FAMILIES:
        assert sum(prompt.family == family for prompt in train) >= 50
        assert sum(prompt.family == family for prompt in held_out) >= 10


@pytest.mark.parametrize(
    ("row", "prompt", "response"),
    [
        ({"prompt": "hello"}, [USER], None),
        ({"turns": ["hello", "and then?"], "reference": "x"}, [USER], None),
        ({"prompt": [USER]}, [USER], None),
        ({"messages": [USER, ASSISTANT, USER, ASSISTANT]}, [USER], [ASSISTANT, USER, ASSISTANT]),
        ({"conversations": [{"from": "user", "value": "hello"}]}, [USER], None),
        ({"prompt": "1 + 1 =", "completion": " 2"}, "1 + 1 =", " 2"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, [USER], [ASSISTANT]),
        ({"text": "once"}, "once", None),
    ],
)
def test_each_accepted_format(row: dict[str, Any], prompt: Any, response: Any) -> None:
    """A format that is read as another one trains on the wrong tokens without a word."""
    found = read_row(row, place="here", default_id="7", default_family="f")
    assert (found.id, found.prompt, found.response, found.family) == ("7", prompt, response, "f")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"subject": "hello"}, "turns"),
        (["hello"], "expected an object"),
        ({"prompt": "a", "completion": [ASSISTANT]}, "both be strings"),
        ({"prompt": []}, "not empty"),
        ({"messages": [ASSISTANT]}, "must not begin"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "part of type image"),
        ({"messages": [{"role": "user", "content": 3}]}, "both strings"),
        ({"turns": []}, "list of strings"),
        ({"text": 3}, "string"),
    ],
)
def test_rows_of_no_known_format_are_refused(row: Any, message: str) -> None:
    """Skipping such rows in silence trains on a part of the data."""
    with pytest.raises(UserError, match=message) as caught:
        read_row(row, place="data.jsonl:3", default_id="0")
    assert str(caught.value).startswith("data.jsonl:3: ")
    assert "\n" not in str(caught.value)


def test_bad_files_are_named_with_the_line(tmp_path: Path) -> None:
    """A message without file and line is useless in a file of a million rows."""
    torn = tmp_path / "torn.jsonl"
    torn.write_text('{"prompt": "a"}\n\n{"prompt": \n')
    with pytest.raises(UserError, match=r"torn\.jsonl:3"):
        load_prompts(str(torn))
    with pytest.raises(UserError, match="no such file"):
        load_prompts(str(tmp_path / "missing.jsonl"))
    with pytest.raises(UserError, match="holds no prompts"):
        load_prompts(write(tmp_path / "blank.jsonl", [{"prompt": " "}]))
    with pytest.raises(UserError, match="no file of rows"):
        load_prompts(write(tmp_path / "rows.txt", []))
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match="UTF-8"):
        load_prompts(str(tmp_path / "bytes.jsonl"))


def test_a_missing_network_is_one_line_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client alone retries for half a minute and ends in a traceback."""
    monkeypatch.setattr(sources, "hub_reachable", lambda: False)
    with pytest.raises(UserError, match="without network these work"):
        load_prompts("nobody/nothing")


def test_a_local_folder_of_data_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking the hub for a local folder makes machines without network fail."""
    monkeypatch.setattr(sources, "hub_reachable", lambda: pytest.fail("the hub was asked"))
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.jsonl", [{"id": "a", "prompt": "one"}, {"id": "a", "prompt": "two"}])
    assert [prompt.id for prompt in load_prompts(str(folder))] == ["a", "a#2"]
    with pytest.raises(UserError, match="split dev"):
        load_prompts(str(folder), split="dev")


def test_limit_draws_by_seed(tmp_path: Path) -> None:
    """The first rows of a sorted file are one family; a draw that changes between runs cannot be resumed."""
    path = write(tmp_path / "many.jsonl", [{"prompt": str(number)} for number in range(100)])
    first = load_prompts(path, limit=10, seed=1)
    assert first == load_prompts(path, limit=10, seed=1) != load_prompts(path, limit=10, seed=2)
    assert len(first) == 10
    assert first != load_prompts(path)[:10]


def test_normalised_text() -> None:
    """Prompts that differ in case, spaces or punctuation are the same; sums that differ by a sign are not."""
    assert normalise("  What's UP,\n doc?! ") == normalise("what s up doc")
    assert normalise("3 + 4 =") != normalise("3 < 4 =")
    assert normalise("?!") == "?!"
    assert normalise("हिन्दी") != normalise("हन्द")


def test_held_out_prompts_never_train() -> None:
    """Training on repeated test prompts makes tau a third too high."""
    prompts = [asked("Hello, World!", "1"), asked("hello world", "2"), asked("other", "3"), asked("third", "4")]
    split = split_held_out(prompts, [asked("HELLO world?", "h"), asked("hello world", "h2")])
    assert [prompt.id for prompt in split.train] == ["3", "4"]
    assert [prompt.id for prompt in split.held_out] == ["h"]
    assert (split.duplicates, split.met) == (1, 1)
    drawn = split_held_out(prompts * 3, None, count=1, seed=3)
    assert len(drawn.train) == 2
    assert len(drawn.held_out) == 1
    assert drawn.duplicates == 9
    assert not {prompt.fingerprint for prompt in drawn.train} & {prompt.fingerprint for prompt in drawn.held_out}
    with pytest.raises(UserError, match="held_out_count"):
        split_held_out(prompts, None, count=3)
    with pytest.raises(UserError, match="none is left"):
        split_held_out(prompts[:2], prompts)


def test_rendering_writes_no_second_bos(tokenizer: Any) -> None:
    """A template that writes BOS and a tokenizer that adds another one put the model where it never was."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 256), ("<|im_end|>", 257)]
    )
    ids = render(tokenizer, asked("hello"))
    assert tokenizer.decode(ids) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    # Plain text gets what comes before a text, and no end token that would stop the answer.
    assert tokenizer.decode(render(tokenizer, Prompt("1", "hello"))) == "<|im_start|>hello"


def test_conversations_need_a_template(tokenizer: Any) -> None:
    """Without it transformers raises from deep inside, or a default template is used that the model never saw."""
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        render(tokenizer, Prompt("1", [USER, ASSISTANT, USER]))
    assert render(tokenizer, Prompt("1", "hello"))
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="roles must alternate"):
        render(tokenizer, asked("hello"))


def marked(tokenizer: Any, row: dict[str, Any]) -> tuple[str, str]:
    (sample,) = given_samples(tokenizer, read_row(row, place="here", default_id="1"), end_tokens=[257])
    return tokenizer.decode(sample.ids), tokenizer.decode(sample.response_ids)


def test_given_responses_are_masked_turn_by_turn(tokenizer: Any) -> None:
    """Masks that are off by one lose the first response token, or train on what the template writes."""
    whole, response = marked(tokenizer, {"messages": [USER, ASSISTANT, USER, {"role": "assistant", "content": "yes"}]})
    turn = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert whole == f"{turn}hi<|im_end|>\n{turn}yes<|im_end|>"
    assert response == "hi<|im_end|>yes<|im_end|>"
    assert marked(tokenizer, {"prompt": [USER], "completion": [ASSISTANT]}) == (f"{turn}hi<|im_end|>", "hi<|im_end|>")
    assert marked(tokenizer, {"prompt": "1 + 1 =", "completion": " 2"}) == ("1 + 1 = 2<|im_end|>", " 2<|im_end|>")
    assert marked(tokenizer, {"text": "once"}) == ("once<|im_end|>", "once<|im_end|>")


def test_a_template_that_adds_an_end_of_text_still_gives_masks(tokenizer: Any) -> None:
    """Phi-3's template ends every rendering that asks for no answer with a further token."""
    tokenizer.chat_template += "{% if not add_generation_prompt %}<|pad|>{% endif %}"
    _, response = marked(tokenizer, {"messages": [USER, ASSISTANT, USER, ASSISTANT]})
    assert response == "hi<|im_end|>hi<|im_end|>"


def test_a_template_that_opens_thoughts_still_gives_masks(tokenizer: Any) -> None:
    """The generation prompt of reasoning models holds more than the rendering of a given answer."""
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif"
    )
    assert "<think>" in tokenizer.decode(render(tokenizer, asked("hello")))
    assert marked(tokenizer, {"prompt": [USER], "completion": [ASSISTANT]})[1] == "hi<|im_end|>"


def test_templates_that_rewrite_the_prompt_are_refused(tokenizer: Any) -> None:
    """Where earlier turns are rewritten, the difference of two renderings marks prompt tokens as response."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}{% if loop.last %} last{% endif %}:{{ m['content'] }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}assistant last:{% endif %}"
    )
    with pytest.raises(UserError, match="differently once"):
        marked(tokenizer, {"prompt": [USER], "completion": [ASSISTANT]})


def test_empty_responses_are_an_error(tokenizer: Any) -> None:
    """An empty mask trains on nothing, in silence."""
    for row in (
        {"prompt": [USER], "completion": [{"role": "assistant", "content": " "}]},
        {"prompt": "a", "completion": " "},
        {"prompt": [USER]},
        {"prompt": [USER], "completion": [USER]},
    ):
        with pytest.raises(UserError, match=r"response|completion"):
            marked(tokenizer, row)
    tokenizer.chat_template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="mask is empty"):
        marked(tokenizer, {"prompt": [USER], "completion": [ASSISTANT]})
