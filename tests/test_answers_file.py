"""Responses from a file that another program wrote, for the prompts that `mtpd data prompts` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mtpd.cli import main


@pytest.fixture
def recipe(tmp_path: Path) -> list[str]:
    prompts = tmp_path / "talks.jsonl"
    rows = [{"prompt": f"What is {n} plus {n + 1}?"} for n in range(8)] + [{"turns": ["Hello!", "And then?"]}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = tmp_path / "held.jsonl"
    held_out.write_text('{"prompt": "What is one plus one?"}\n{"prompt": "And two?"}\n')
    return [
        "model=tiny",
        "dtype=float32",
        f"data.prompts={prompts}",
        f"data.held_out={held_out}",
        "data.max_new_tokens=12",
        "data.row_length=256",
        "heads.depth=2",
        "heads.vocabulary=40",
        "train.max_steps=1",
        "evaluation.max_new_tokens=8",
        "evaluation.decode_prompts=0",
    ]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(recipe: list[str], output: Path, *more: str) -> int:
    """The responses of a recipe, without training."""
    return main(["data", "vocab", *recipe, f"output={output}", "--out", str(output.with_suffix(".json")), *more])


def test_responses_of_another_program_are_those_of_a_run(
    recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: prompts are written in other tokens than a run asks with, or responses go to other prompts."""
    assert run(recipe, tmp_path / "own") == 0
    own = {tuple(line["prompt_ids"]): line["response_ids"] for line in read(tmp_path / "own/responses.jsonl")[1:]}
    asked, answered = tmp_path / "asked.jsonl", tmp_path / "answered.jsonl"
    assert main(["data", "prompts", *recipe, f"output={tmp_path / 'x'}", "--out", str(asked)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("9 prompts to train on and 2 to measure on")
    lines = read(asked)
    assert [line["for"] for line in lines] == ["training"] * 9 + ["measuring"] * 2
    assert {line["max_new_tokens"] for line in lines} == {12, 8}
    assert all(line["temperature"] == 0 and 257 in line["stop_token_ids"] for line in lines)
    done = [line | {"response_ids": own[tuple(line["prompt_ids"])]} for line in lines if line["for"] == "training"]
    answered.write_text("".join(json.dumps(line) + "\n" for line in done))
    # The second turn can be asked for once there is an answer to the first.
    assert main(["data", "prompts", *recipe, f"data.responses={answered}", "--out", str(asked)]) == 0
    (later,) = [line for line in read(asked) if line["for"] == "training"]
    assert later["turn"] == 2
    later["response_ids"] = own[tuple(later["prompt_ids"])]
    with answered.open("a") as file:
        file.write(json.dumps(later) + "\n")
    assert run(recipe, tmp_path / "theirs", f"data.responses={answered}") == 0
    found = {tuple(line["prompt_ids"]): line["response_ids"] for line in read(tmp_path / "theirs/responses.jsonl")[1:]}
    assert found == own
    # The responses of a run are such a file as well, and training takes them.
    further = [f"output={tmp_path / 'third'}", f"data.responses={tmp_path / 'own/responses.jsonl'}"]
    assert main(["distill", *recipe, *further]) == 0
    noted = json.loads((tmp_path / "third" / "provenance.json").read_text())["responses"]
    assert noted["count"] == len(own) == 10


def test_a_run_without_heads_goes_on_with_other_rows(
    recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: one row on top of the file, or another limit, throws away what was answered, or refuses the run."""
    output, prompts = tmp_path / "run", tmp_path / "talks.jsonl"
    assert run(recipe, output) == 0
    before = (output / "responses.jsonl").read_text().splitlines()
    prompts.write_text('{"prompt": "A new one"}\n' + prompts.read_text())
    capsys.readouterr()
    assert run(recipe, output, "data.row_length=240") == 0
    assert "9 of 10 prompts were answered before" in capsys.readouterr().err
    after = (output / "responses.jsonl").read_text().splitlines()
    assert after[: len(before)] == before
    assert len(after) == len(before) + 1
    assert main(["distill", *recipe, f"output={output}", "data.limit=5"]) == 0
    assert (output / "responses.jsonl").read_text().splitlines() == after
    assert main(["distill", *recipe, f"output={output}", "data.limit=6"]) == 2
    assert "holds a run of another recipe (differs in data.limit)" in capsys.readouterr().err


def test_ids_alone_and_what_is_missing(recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: lines with an id alone go to no prompt; prompts without a response end the run, or vanish unsaid."""
    assert run(recipe, tmp_path / "own") == 0
    own = read(tmp_path / "own/responses.jsonl")[1:]
    answered = tmp_path / "answered.jsonl"
    first = [line for line in own if line.get("turn", 1) == 1][:6]
    answered.write_text(
        "".join(json.dumps({key: line[key] for key in ("id", "response_ids")}) + "\n" for line in first)
    )
    capsys.readouterr()
    assert run(recipe, tmp_path / "theirs", f"data.responses={answered}") == 0
    assert "3 of 9 prompts have no response in it; they are left out" in capsys.readouterr().err
    assert {line["id"] for line in read(tmp_path / "theirs/responses.jsonl")[1:]} == {line["id"] for line in first}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"id": "talks-0", "response_ids": [5, 99999]}, ":1: response_ids is no list of token ids of this model"),
        (
            {"id": "talks-0", "response_ids": [5], "prompt_ids": [1, 2]},
            ":1: its prompt_ids are not those of the prompt",
        ),
        ({"id": "talks-0"}, ":1: has neither response_ids nor text; accepted: lines with id and response_ids"),
        ({"response_ids": [5]}, ":1: has no id, or is damaged; accepted: lines with id"),
        ({"id": "elsewhere", "response_ids": [5]}, "9 of 9 prompts have no response in it; accepted: responses with"),
        ({"id": "talks-0", "response_ids": [7, 7, 7, 7, 7, 7]}, "these are not the responses of this model"),
    ],
)
def test_files_that_cannot_be_used(
    recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], line: dict[str, Any], message: str
) -> None:
    """Fault: responses of another model or to other prompts are trained on, or a traceback."""
    answered = tmp_path / "answered.jsonl"
    answered.write_text(json.dumps(line) + "\n")
    assert run(recipe, tmp_path / "run", f"data.responses={answered}") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"data.responses: {answered}" in said
    assert message in said


def test_half_a_line_is_named(recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a file that is still being written ends in a traceback."""
    answered = tmp_path / "answered.jsonl"
    answered.write_text('{"id": "talks-0", "response_ids": [5]}\n{"id": "tal')
    assert run(recipe, tmp_path / "run", f"data.responses={answered}") == 2
    assert f"data.responses: {answered}:2: no JSON; accepted: lines with id" in capsys.readouterr().err


def test_text_is_named_as_not_exact(recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: text is taken for the tokens that the model wrote, without a word and without a check."""
    answered = tmp_path / "answered.jsonl"
    answered.write_text('{"id": "talks-0", "text": "no words of a random model"}\n')
    assert run(recipe, tmp_path / "run", f"data.responses={answered}") == 2
    said = capsys.readouterr().err
    assert "1 responses are text: tokenised here, they may have other tokens than the model wrote" in said
    assert "these are not the responses of this model" in said


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nope.jsonl", "data.responses: nope.jsonl: no such file; accepted: trunk, given, the address of a server"),
        ("http://user:word@host:1", "data.responses: this address is not accepted; accepted: http://HOST:PORT"),
        ("http://host?key=word", "MTPD_API_KEY, which no file keeps"),
        ("vllm", "data.responses"),
    ],
)
def test_values_that_are_refused(
    recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str, message: str
) -> None:
    """Fault: a key in an address is written into the recipe of the run, or shown."""
    assert run(recipe, tmp_path / "run", f"data.responses={value}") == 2
    said = capsys.readouterr().err
    assert message in said
    assert "word" not in said


def test_a_recipe_of_somebody_else_names_no_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a recipe that is not trusted sends prompts, or a key, to a server of its author."""
    path = tmp_path / "recipe.yaml"
    path.write_text("model: tiny\ndata: {responses: 'http://evil.example'}\n")
    assert main(["distill", str(path), "--untrusted", f"output={tmp_path / 'run'}"]) == 2
    assert (
        "data.responses: http://evil.example is not accepted in a recipe that is not trusted" in capsys.readouterr().err
    )
