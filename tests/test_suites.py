"""Suites: those that come with mtpd, a user's own, the same prompts every time, and what is said of wrong ones."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mtpd.data import stdlib
from mtpd.data.prompts import load_prompts
from mtpd.errors import UserError
from mtpd.evaluate.contamination import TrainedPrompts, read_trained, signatures, write_signatures
from mtpd.evaluate.slices import template_mode
from mtpd.evaluate.suites import check_names, load_suite, questions, suite_names
from mtpd.evaluate.suites.joined import join

FROM_PAPERS = {"mt_bench", "gsm8k", "humaneval", "math500", "cnn_dm", "nq", "rag", "alpaca", "ceval"}
OWN = {"demo", "long", "tools", "multilingual"}
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
    assert set(suite_names()) == FROM_PAPERS | OWN
    for name in FROM_PAPERS | {"demo"}:
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


@pytest.mark.parametrize("name", ["tools", "multilingual"])
def test_own_suites_are_never_trained_on(name: str) -> None:
    """Fault: a suite of ours repeats a prompt that runs on the built-in set are trained on, or itself."""
    found = questions(name, load_suite(name))
    assert len(found) == 40
    assert len({question.prompt.fingerprint for question in found}) == 40
    trained = [prompt for source in ("builtin", "builtin-other") for prompt in load_prompts(source)]
    met = TrainedPrompts(
        frozenset(prompt.fingerprint for prompt in trained), signatures(prompt.text for prompt in trained)
    )
    assert set(met.meets([question.prompt.text for question in found])) == {None}


def test_what_the_own_suites_are_of() -> None:
    """Fault: a language or a kind of tool call without prompts, or rows whose tools are lost."""
    tools = questions("tools", load_suite("tools"))
    assert {question.family for question in tools} == {"call", "result", "none"}
    assert all(question.prompt.template["tools"] and question.language == "en" for question in tools)
    results = [question.prompt.prompt for question in tools if question.family == "result"]
    assert all([message["role"] for message in prompt] == ["user", "assistant", "tool"] for prompt in results)
    counts = Counter(question.language for question in questions("multilingual", load_suite("multilingual")))
    assert counts == dict.fromkeys(["de", "fr", "es", "pt", "ru", "tr", "ar", "hi", "zh", "ja"], 4)


def test_modes_are_suites_of_the_same_prompts(tmp_path: Path) -> None:
    """Fault: a mode draws other prompts, is measured with the arguments of another, or is compared with it."""
    write_rows(tmp_path / "mine.jsonl", [{"prompt": f"Question {n}?"} for n in range(20)])
    (tmp_path / "mine.yaml").write_text(
        "title: mine\nsource: mine.jsonl\nlimit: 5\nchat_template_kwargs: {date: today}\n"
        "modes:\n  short: {effort: low}\n"
    )
    suites = {name: load_suite(name, tmp_path) for name in ("mine", "mine[thinking]", "mine[direct]", "mine[short]")}
    asked = {name: questions(name, suite) for name, suite in suites.items()}
    assert len({tuple(question.prompt.text for question in each) for each in asked.values()}) == 1
    modes = {name: template_mode(each[0].prompt.template) for name, each in asked.items()}
    assert modes["mine"] == 'date="today"'
    assert modes["mine[thinking]"] == 'date="today", enable_thinking=true, thinking=true'
    assert modes["mine[short]"] == 'date="today", effort="low"'
    assert len({json.dumps(suite.settings) for suite in suites.values()}) == 4
    check_names(list(suites), tmp_path)
    check_names(["gsm8k[thinking]", "gsm8k[direct]"], None)
    for name, message in (
        ("mine[slow]", r"suite mine\[slow\]: unknown mode; accepted: thinking, direct, short"),
        ("yours[direct]", "suite yours: unknown"),
    ):
        with pytest.raises(UserError, match=message):
            check_names([name], tmp_path)
        with pytest.raises(UserError, match=message):
            load_suite(name, tmp_path)


class Characters:
    """A tokenizer of characters, without a chat template."""

    chat_template = None
    name_or_path = "characters"

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def test_documents_are_joined_to_lengths(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fault: prompts longer than they are called, or that the model cannot read, or other ones in the next call."""
    lines = [
        {"text": "\n".join(f"Line {line} of document {n} says {n * line}." for line in range(40))} for n in range(30)
    ]
    write_rows(tmp_path / "docs.jsonl", lines)
    (tmp_path / "mine.yaml").write_text(
        "title: mine\nsource: docs.jsonl\ncontexts: [1024, 4096, 16384]\nlimit: 12\nmax_new_tokens: 100\n"
    )
    suite = load_suite("mine", tmp_path)
    documents = questions("mine", suite)
    assert len(documents) == 30
    found = join(Characters(), "mine", suite, documents, context=5000)
    assert [(question.prompt.id, question.family) for question in found[::4]] == [("1k-0", "1k"), ("4k-0", "4k")]
    assert len(found) == 8
    assert "suite mine: 16384 tokens do not fit into the model's context of 5000" in caplog.text
    for question in found:
        length = 1024 if question.family == "1k" else 4096
        assert 0.7 * length < len(question.prompt.text) + 100 <= length
    assert len({question.prompt.text for question in found}) == 8
    more = join(Characters(), "mine", suite, documents, context=20000)
    assert more[:8] == found
    assert len(more) == 12
    quoted = next(question.prompt.text for question in found if "following line" in question.prompt.text)
    line = quoted.split("\n\n")[-1]
    assert quoted.count(line) >= 2
    with pytest.raises(UserError, match="no length of 1024, 4096, 16384 tokens fits into the model's context of 512"):
        join(Characters(), "mine", suite, documents, context=512)
    with pytest.raises(UserError, match="documents do not fill 4096 tokens"):
        join(Characters(), "mine", suite, documents[:1], context=5000)


def test_the_long_suite_reads_files_that_are_never_trained_on() -> None:
    """Fault: long prompts are made of fragments, or of modules that runs on the library are trained on."""
    found = questions("long", load_suite("long"))
    texts = {question.prompt.text for question in found}
    assert texts == {text for _, text in stdlib.documents(stdlib.HELD_OUT)}
    assert not texts & {text for _, text in stdlib.documents(stdlib.SOURCE)}
    assert sum(map(len, texts)) > 400_000
