"""Suites: those that come with mtpd, a user's own, the same prompts every time, and what is said of wrong ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mtpd.data.prompts import load_prompts
from mtpd.errors import UserError
from mtpd.evaluate.contamination import TrainedPrompts, read_trained, signatures, write_signatures
from mtpd.evaluate.suites import load_suite, questions, suite_names

REQUIRED = {"mt_bench", "gsm8k", "humaneval", "math500", "cnn_dm", "nq", "rag", "alpaca", "ceval", "demo"}
ROW_OF = {
    "mt_bench": {"prompt_id": 81, "prompt": ["Write a post.", "Now shorter."]},
    "gsm8k": {"question": "What is 2 + 3?", "answer": "2 + 3 = 5\n#### 5"},
    "humaneval": {"task_id": "HumanEval/0", "prompt": "def f():\n"},
    "math500": {"unique_id": "test/1.json", "problem": "What is $2^3$?"},
    "cnn_dm": {"id": "a1", "article": "It rained.", "highlights": "Rain."},
    "nq": {"question": "who wrote hamlet", "answer": ["Shakespeare"]},
    "rag": {"id": "q1", "context": "It rained.", "question": "Did it rain?"},
    "alpaca": {"instruction": "Add.", "input": "2 and 3", "output": "5"},
    "ceval": {"id": 1, "question": "1 + 1 = ?", "A": "1", "B": "2", "C": "3", "D": "4"},
}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_suites_that_come_with_mtpd() -> None:
    """Fault: a suite file that is not packaged, or that its own schema refuses."""
    assert set(suite_names()) == REQUIRED
    for name in REQUIRED:
        suite = load_suite(name)
        assert (suite.seed, suite.max_new_tokens) == (0, 256)
        assert 80 <= suite.limit <= 84


@pytest.mark.parametrize("name", sorted(ROW_OF))
def test_templates_fit_the_rows_of_their_source(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a template names a field that the rows do not have, or asks for something else than the row does."""
    row = ROW_OF[name]
    monkeypatch.setattr("mtpd.evaluate.suites.sources.read", lambda *a, **k: iter([(f"{name} row 0", row)]))
    suite = load_suite(name).model_copy(update={"subsets": []})
    (question,) = questions(name, suite)
    words = row.get("question") or row.get("instruction") or row.get("problem") or row.get("article") or row["prompt"]
    first = words[0] if isinstance(words, list) else words
    assert first.lower() in question.prompt.text.lower()
    assert question.prompt.family == name
    ids = {"mt_bench": "81", "humaneval": "HumanEval/0", "math500": "test/1.json", "cnn_dm": "a1", "rag": "q1"}
    assert question.prompt.id == ids.get(name, f"{name}-0")
    assert (question.answer is not None) == (suite.answer is not None)


def test_the_demo_suite_needs_no_network_and_is_never_trained_on() -> None:
    """Fault: the built-in suite has prompts that a run on the built-in set is trained on."""
    found = questions("demo", load_suite("demo"))
    assert len(found) == 84
    trained = {prompt.fingerprint for prompt in load_prompts("builtin")}
    assert not trained & {question.prompt.fingerprint for question in found}
    met = TrainedPrompts(frozenset(), signatures(prompt.text for prompt in load_prompts("builtin")))
    assert not [met for met in met.meets([question.prompt.text for question in found]) if met]


def test_a_suite_of_ones_own(tmp_path: Path) -> None:
    """Fault: a file beside the suite is looked for elsewhere, or the draw changes from call to call."""
    write_rows(tmp_path / "rows.jsonl", [{"q": f"Question {n}?", "a": f"so {n}"} for n in range(20)])
    (tmp_path / "mine.yaml").write_text(
        'title: mine\nsource: rows.jsonl\nprompt: "Q: {{ q }}"\nanswer: "{{ a }}"\nmatch: number\nlimit: 7\nseed: 3\n'
    )
    suite = load_suite("mine", tmp_path)
    first, second = questions("mine", suite), questions("mine", suite)
    assert first == second
    assert len(first) == 7
    assert {question.prompt.text[:13] for question in first} == {"Q: Question 1", *(q.prompt.text[:13] for q in first)}
    assert all(question.answer == f"so {question.prompt.text.split()[2][:-1]}" for question in first)
    assert suite.settings["source"] == "rows.jsonl"
    assert load_suite("mine", tmp_path, limit=2, max_new_tokens=9).settings["max_new_tokens"] == 9
    other = questions("mine", suite.model_copy(update={"seed": 4}))
    assert {q.prompt.id for q in other} != {q.prompt.id for q in first}


def test_rows_in_a_folder_take_the_place_of_the_source(tmp_path: Path) -> None:
    """Fault: `--suite-dir` is ignored, a template of the hub's rows is applied to others, or an answer is lost."""
    rows = [{"id": f"g{n}", "turns": [f"Sum {n}?", "Again."], "reference": f"#### {n}"} for n in range(3)]
    write_rows(tmp_path / "gsm8k.jsonl", rows)
    write_rows(tmp_path / "summarization.jsonl", [{"turns": ["Summarize: it rained."]}])
    write_rows(tmp_path / "house.jsonl", [{"prompt": "Say hello."}])
    gsm8k = questions("gsm8k", load_suite("gsm8k", tmp_path))
    assert [(q.prompt.id, q.prompt.text, q.answer) for q in gsm8k] == [
        (f"g{n}", f"Sum {n}?", f"#### {n}") for n in range(3)
    ]
    assert load_suite("gsm8k", tmp_path).match == "number"
    assert questions("cnn_dm", load_suite("cnn_dm", tmp_path))[0].prompt.text == "Summarize: it rained."
    assert questions("house", load_suite("house", tmp_path))[0].prompt.text == "Say hello."
    assert {"house", "gsm8k", "summarization"} <= set(suite_names(tmp_path))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "suite mine: unknown; accepted: "),
        ({"mine.yaml": "title: mine\n"}, "source: is missing; accepted: text such as openai/gsm8k"),
        (
            {"mine.yaml": "title: mine\nsource: rows.jsonl\nprompts: x\n"},
            "prompts: unknown suite key; did you mean prompt?",
        ),
        ({"mine.yaml": "title: mine\nsource: rows.jsonl\nlimit: 0\n"}, "limit: 0 is not accepted"),
        ({"mine.yaml": "title: [\n"}, "is not YAML"),
        ({"mine.jsonl": ""}, "suite mine: "),
        ({"mine.jsonl": '{"turns": []}\n'}, "`turns` must be a list of strings"),
        ({"mine.jsonl": '{"turns": ["a"'}, "not a JSON object"),
        ({"mine.yaml": "title: mine\nsource: missing.jsonl\n"}, "suite mine: missing.jsonl: no such file"),
        (
            {"mine.yaml": 'title: mine\nsource: rows.jsonl\nprompt: "{{ question }}"\n', "rows.jsonl": '{"q": "a"}\n'},
            "suite mine: prompt: 'question' is undefined",
        ),
        (
            {
                "mine.yaml": 'title: mine\nsource: rows.jsonl\nprompt: "{{ q.__class__.mro() }}"\n',
                "rows.jsonl": '{"q": "a"}\n',
            },
            "suite mine: prompt: ",
        ),
        ({"mine.jsonl": '{"prompt": "  "}\n'}, "holds no prompts"),
    ],
)
def test_wrong_suites(files: dict[str, str], message: str, tmp_path: Path) -> None:
    """Fault: a traceback, a template that reaches into Python, or a measurement on nothing."""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as raised:
        questions("mine", load_suite("mine", tmp_path))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    """Fault: a mistyped --suite-dir is ignored and the hub is asked."""
    with pytest.raises(UserError, match="--suite-dir: .*nowhere: no such folder"):
        load_suite("gsm8k", tmp_path / "nowhere")


def test_prompts_that_were_trained_on_are_found(tmp_path: Path) -> None:
    """Fault: a repetition with other punctuation or some other words is not seen, or every question is called one."""
    texts = [prompt.text for prompt in load_prompts("builtin-held-out")]
    trained, others = texts[:40], texts[40:]
    write_signatures(tmp_path / "signatures.safetensors", trained)
    exact = {load_prompts("builtin-held-out")[0].fingerprint}
    found = read_trained(exact, tmp_path / "signatures.safetensors")
    near = [
        trained[0].upper() + "!",
        f"{trained[1]} Thank you.",
        "Please: " + trained[2],
        trained[3].replace(".", ";"),
    ]
    assert found.meets([*near, *others]) == ["exact", "near", "near", "near", *[None] * len(others)]
    assert read_trained(exact, tmp_path / "none").meets(near) == ["exact", None, None, None]
    (tmp_path / "signatures.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="not a file of prompt signatures"):
        read_trained(exact, tmp_path / "signatures.safetensors")


def test_similarity_is_that_of_the_pieces() -> None:
    """Fault: signatures that do not estimate the Jaccard similarity of 5-character pieces."""
    first = "the quick brown fox jumps over the lazy dog and runs far away from the old barn"
    second = first.replace("lazy dog", "sleepy cat")
    pieces = [{text[i : i + 5] for i in range(len(text) - 4)} for text in (first, second)]
    jaccard = len(pieces[0] & pieces[1]) / len(pieces[0] | pieces[1])
    one, two = signatures([first, second])
    assert abs(float((one == two).mean()) - jaccard) < 0.15


def test_rows_of_one_id_are_numbered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fault: public sets with repeated ids are refused, two prompts share counts, or nobody is told."""
    rows = [{"id": name, "prompt": f"Say {index}."} for index, name in enumerate(["a", "a#2", "a", "b", "a"])]
    suite = load_suite("mine", write_rows(tmp_path / "mine.jsonl", rows).parent)
    expected = ["a", "a#2", "a#3", "b", "a#4"]
    assert [question.prompt.id for question in questions("mine", suite)] == expected
    assert "suite mine: 2 rows have the id of an earlier one; they are numbered (a again is a#3)" in caplog.text
    assert [prompt.id for prompt in load_prompts(str(tmp_path / "mine.jsonl"))] == expected
