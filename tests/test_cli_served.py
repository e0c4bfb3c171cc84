"""`mtpd eval --server`: a server's acceptance is that of mtpd, and passes through the same gate."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from serving import serving as serving_run
from stand_in import StandIn
from test_cli_eval import refresh_fingerprint

from mtpd.cli import main
from mtpd.evaluate import served
from mtpd.evaluate.acceptance import Acceptance
from mtpd.recipe import load_recipe
from mtpd.run.without_weights import without_weights

TOKENS = 12
PROMPTS = 52
QUESTIONS = [f"What is {n} and {n * n}?" for n in range(PROMPTS)]


@pytest.fixture
def run(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run in float32, with a suite beside it."""
    monkeypatch.setattr(served, "SETTLED", 0.0)
    recipe = finished_run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("dtype: auto", "dtype: float32"))
    refresh_fingerprint(finished_run)
    suite = finished_run.parent / "mine.jsonl"
    suite.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in QUESTIONS))
    return finished_run


def words(run: Path, *more: str) -> list[str]:
    given = ["--suite", "mine", "--suite-dir", str(run.parent), "--max-new-tokens", str(TOKENS)]
    return ["eval", str(run), *given, "--responses", str(run.parent / "responses"), *more]


def serving(run: Path, **options: Any) -> AbstractContextManager[StandIn]:
    """A server that answers the questions with the heads of a run."""
    _, tokenizer, _ = without_weights(load_recipe(run / "recipe.yaml"))
    prompts = [
        list(
            tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
        )
        for text in QUESTIONS
    ]
    return serving_run(run, prompts, tokens=TOKENS, **options)


def test_what_a_server_accepts_is_what_was_measured(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: the number of a server and that of mtpd are counted by different rules."""
    assert main(words(run)) == 0
    with serving(run) as server, serving(run, drafts=False) as plain:
        further = ["--server", server.url, "--plain-server", plain.url, "--concurrency", "1,4"]
        assert main(words(run, *further)) == 0
    shown = " ".join(capsys.readouterr().out.split())
    offline, found = (Acceptance.load(run / f"evaluation{name}.json") for name in ("", "-served"))
    assert found.mode == "served"
    assert found.versions["server"] == "vLLM"
    theirs, ours = found.suites["mine"], offline.suites["mine"]
    assert (theirs.drafted, theirs.accepted) == (ours.drafted, ours.accepted)
    assert [row.accepted for row in theirs.rows or []] == [row.accepted for row in ours.rows or []]
    assert theirs.identical == PROMPTS
    assert found.loads is not None
    assert [load.concurrency for load in found.loads] == [1, 4]
    assert f"on the same {PROMPTS} prompts: tau {ours.tau:.3f}, served {ours.tau:.3f}, +0.0% [+0.0, +0.0]" in shown
    assert f"{PROMPTS} of {PROMPTS} texts are the same" in shown


def test_the_gate_on_a_server(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: heads that a server has lost pass, or the same ones fail."""
    baseline = str(run.parent / "served.json")
    with serving(run) as server:
        poor = server.rounds or {}
        # 1 token, then 3, 3, 3 and 2.
        server.rounds = {key: [(2, 2), (2, 2), (2, 2), (2, 1)] for key in poor}
        assert main(words(run, "--server", server.url, "--write-baseline", baseline)) == 0
        again = ["eval", str(run), "--suite-dir", str(run.parent), "--against", baseline, "--server", server.url]
        assert main(again) == 0
        assert "gate passed" in capsys.readouterr().out
        server.rounds = poor
        assert main(again) == 3
    assert "gate failed" in capsys.readouterr().out


def test_servers_of_something_else(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a server without drafts, or of another model, gets a number and a file."""

    def refused(*more: str) -> str:
        capsys.readouterr()
        assert main(words(run, *more)) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("mtpd: warning")]
        assert len(error) == 1
        assert not (run / "evaluation-served.json").exists()
        return error[0]

    assert main(words(run)) == 0
    with serving(run, drafts=False) as plain:
        assert "drafts nothing; accepted: a server that was started with" in refused("--server", plain.url)
    with serving(run, wrong=1) as other:
        assert "none of its 52 texts is the model's: it serves another model" in refused("--server", other.url)
    with serving(run) as server:
        found = refused("--server", server.url, "--plain-server", server.url)
        assert "--plain-server" in found
        assert "drafts too; accepted: a server without --speculative-config" in found
        assert "--drafts: 1 is not accepted, the server drafts 2" in refused("--server", server.url, "--drafts", "1")


MISTAKES = {
    "address": (["--server", "localhost:8000"], "--server: localhost:8000 is not accepted"),
    "plain alone": (["--plain-server", "http://a"], "--plain-server: goes with --server"),
    "mode": (["--server", "http://a", "--mode", "decoded"], "--mode: decoded is not accepted with --server"),
    "none at a time": (["--server", "http://a", "--concurrency", "0"], "--concurrency: 0 is not accepted"),
    "words": (["--server", "http://a", "--concurrency", "many"], "--concurrency: many is not accepted"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: options that do not go together are found after the model is loaded, or never."""
    more, line = MISTAKES[mistake]
    assert main(words(run, *more)) == 2
    assert line in capsys.readouterr().err


def test_a_baseline_of_a_server_needs_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: what a server had is compared with what is measured here."""
    with serving(run) as server:
        assert main(words(run, "--server", server.url)) == 0
    capsys.readouterr()
    assert main(words(run, "--against", str(run / "evaluation-served.json"))) == 2
    assert "was measured on a server; accepted: with --server" in capsys.readouterr().err
