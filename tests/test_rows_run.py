"""Runs on data as people have it: what is trained on, what is left out, and where it says so."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from mtpd.cli import main
from mtpd.cli.generate import token_ids
from mtpd.data.builtin_models import tiny_tokenizer
from mtpd.errors import UserError
from mtpd.evaluate.suites import load_suite, questions, usable
from mtpd.files import read_sealed
from mtpd.recipe import parse_recipe
from mtpd.recipe.text import read_mapping

SMALL = [
    "heads.depth=1",
    "data.max_new_tokens=8",
    "train.max_steps=1",
    "train.micro_batch_rows=2",
    "train.logging_steps=1",
]
SMALL += [
    "evaluation.prompts_limit=4",
    "evaluation.max_new_tokens=8",
    "evaluation.decode_prompts=1",
    "data.held_out=builtin",
]


def said(role: str, value: str) -> dict[str, str]:
    return {"from": role, "value": value}


def conversations() -> list[dict[str, Any]]:
    rows: list[Any] = [
        {
            "conversations": [
                said("human", f"Say {n}."),
                said("gpt", f"{n}."),
                said("human", "Again."),
                said("gpt", f"{n}!"),
            ]
        }
        for n in range(20)
    ]
    return [
        *rows,
        {"conversations": [said("gpt", "Hello!"), said("human", "Hi.")]},
        {"conversations": [said("elf", "x")]},
    ]


@pytest.mark.parametrize("responses", ["trunk", "given"])
def test_what_is_left_out_is_said_everywhere(
    responses: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Fault: rows vanish without a trace in the plan, the log or the provenance, or one of them ends the run."""
    path, run = tmp_path / "chats.json", tmp_path / "run"
    path.write_text(json.dumps(conversations()))
    words = ["distill", "model=tiny", f"output={run}", f"data.prompts={path}", f"data.responses={responses}", *SMALL]
    words += ["data.chat_template_kwargs={enable_thinking: false}"]
    assert main([*words, "--dry-run"]) == 0
    plan = " ".join(capsys.readouterr().out.split())
    assert "rows that cannot be used, left out: 1 assistant first (first: " in plan
    assert "1 unknown role" in plan
    assert main(words) == 0
    provenance = read_sealed(run / "provenance.json", refusal="no provenance")
    assert {reason: found["rows"] for reason, found in provenance["left_out"].items()} == {
        "assistant first": 1,
        "unknown role": 1,
    }
    assert provenance["left_out"]["unknown role"]["first"].startswith(f"{path}[21]: role 'elf' is not known")
    assert "2 of 22 rows cannot be used" in caplog.text
    accepted = read_sealed(run / "acceptance.json", refusal="no acceptance")
    assert accepted["settings"]["chat_template_kwargs"] == '{"enable_thinking": false}'
    assert main([*words, "data.max_unusable=0.01", "--fresh"]) == 2
    assert "2 of 22 rows cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"columns": {"question": "q"}}, "data.columns: does nothing with prompts: builtin"),
        ({"template": "{{ q }}"}, "data.template: does nothing with prompts: builtin"),
        (
            {"prompts": "a.csv", "columns": {"promt": "q"}},
            "data.columns.promt: q is not accepted; accepted: prompt, mess",
        ),
        (
            {"prompts": "a.csv", "columns": {"prompt": "q"}, "template": "{{ q }}"},
            "data.columns.prompt: q is not accepted with data.template",
        ),
        ({"prompts": "a.csv", "template": "{{ q"}, "data.template: "),
        ({"max_unusable": 1.5}, "data.max_unusable: 1.5 is not accepted"),
        ({"special_tokens_in_text": "drop"}, "data.special_tokens_in_text: drop is not accepted"),
        ({"chat_template_kwargs": {"tools": []}}, "data.chat_template_kwargs.tools: is not accepted"),
    ],
)
def test_keys_that_cannot_be(data: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Fault: a wrong key is found when the rows are read, or never."""
    with pytest.raises(UserError) as caught:
        parse_recipe({"model": "tiny", "output": str(tmp_path), "data": data})
    assert message in str(caught.value)


def test_generate_and_chat_ask_as_the_run_was_trained(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: heads trained without thoughts are asked with them, or a template that refuses ends in a traceback."""
    recipe = finished_run / "recipe.yaml"
    values = read_mapping(recipe, what="recipe", example="recipe.yaml")
    values["data"]["chat_template_kwargs"] = {"enable_thinking": False}
    recipe.write_text(json.dumps(values))
    asked: list[dict[str, Any]] = []
    plain = PreTrainedTokenizerFast.apply_chat_template

    def recorded(self: Any, messages: Any, **arguments: Any) -> Any:
        asked.append(arguments)
        return plain(self, messages, **arguments)

    monkeypatch.setattr(PreTrainedTokenizerFast, "apply_chat_template", recorded)
    assert main(["generate", str(finished_run), "--prompt", "hello", "--max-new-tokens", "2"]) == 0
    lines = iter(["hello", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert main(["chat", str(finished_run), "--max-new-tokens", "2"]) == 0
    assert [arguments["enable_thinking"] for arguments in asked] == [False, False]
    monkeypatch.setattr("mtpd.data.builtin_models.CHATML", "{{ raise_exception('roles must alternate') }}")
    assert main(["generate", str(finished_run), "--prompt", "hello"]) == 2
    assert "the chat template refuses its messages: roles must alternate" in capsys.readouterr().err


def test_generate_reads_a_prompt_as_a_row(finished_run: Path) -> None:
    """Fault: a prompt that ends with the end token of its tokenizer, or control tokens that a recipe reads as text."""
    ends: Any = SimpleNamespace(tokenizer=ByT5Tokenizer(extra_ids=0))
    assert ends.tokenizer("ab")["input_ids"][-1] == ends.tokenizer.eos_token_id
    assert token_ids(ends, finished_run, "ab") == ends.tokenizer("ab", add_special_tokens=False)["input_ids"]
    tiny: Any = SimpleNamespace(tokenizer=tiny_tokenizer())
    end = tiny.tokenizer.eos_token
    assert token_ids(tiny, finished_run, end) == [tiny.tokenizer.eos_token_id]
    recipe = finished_run / "recipe.yaml"
    values = read_mapping(recipe, what="recipe", example="recipe.yaml")
    values["data"]["special_tokens_in_text"] = "escape"
    recipe.write_text(json.dumps(values))
    ids = token_ids(tiny, finished_run, end)
    assert tiny.tokenizer.eos_token_id not in ids
    assert tiny.tokenizer.decode(ids) == end


def suite_of(folder: Path, rows: list[Any], text: str = "") -> list[Any]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.yaml").write_text(f"title: mine\nsource: rows.jsonl\n{text}")
    suite = load_suite("mine", folder, chat_template_kwargs={"enable_thinking": True, "level": 1})
    return [suite, questions("mine", suite)]


def test_suites_leave_odd_rows_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fault: one odd row ends a measurement, or is left out of it without a word."""
    rows = [*({"q": f"Say {n}."} for n in range(20)), {"other": 1}]
    _, found = suite_of(tmp_path, rows, 'prompt: "{{ q }}"\n')
    assert len(found) == 20
    assert "1 of 21 rows cannot be used: 1 refused by the template of prompt" in caplog.text
    with pytest.raises(UserError, match="5 of 10 rows cannot be used"):
        suite_of(tmp_path, [{"q": "a"}, {"z": 1}] * 5, 'prompt: "{{ q }}"\n')


def test_suites_leave_out_what_a_template_refuses(tmp_path: Path) -> None:
    """Fault: a conversation that the model's template refuses ends the measurement of all."""
    tokenizer: Any = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[0].content }}"
    )
    rows = [*({"prompt": f"Say {n}."} for n in range(20)), {"prompt": "hi", "system": "Be brief."}]
    _, found = suite_of(tmp_path, rows)
    assert len(usable(tokenizer, "mine", found)) == 20


def test_arguments_of_the_template_in_suites(tmp_path: Path) -> None:
    """Fault: a suite is asked otherwise than the run was trained, a row's own is lost, or the file does not say so."""
    rows = [{"prompt": "a"}, {"prompt": "b", "chat_template_kwargs": {"enable_thinking": "b"}}]
    suite, found = suite_of(tmp_path, rows, "chat_template_kwargs: {enable_thinking: false}\n")
    assert [question.prompt.template for question in found] == [
        {"enable_thinking": False, "level": 1},
        {"enable_thinking": "b", "level": 1},
    ]
    assert suite.settings["chat_template_kwargs"] == '{"enable_thinking": false, "level": 1}'
    assert "chat_template_kwargs" not in load_suite("gsm8k").settings
