"""`mtpd eval --server`: a server's acceptance is that of mtpd, and passes through the same gate."""

from __future__ import annotations

import json
import shlex
import xml.etree.ElementTree as ET
from contextlib import AbstractContextManager
from pathlib import Path
from string import Template
from typing import Any

import pytest
import yaml
from serving import serving as serving_run
from stand_in import StandIn
from test_cli_eval import refresh_fingerprint

from mtpd.cli import main
from mtpd.evaluate import served
from mtpd.evaluate.acceptance import Acceptance
from mtpd.evaluate.measure import prompts_with_room
from mtpd.evaluate.suites import load_suite, questions
from mtpd.recipe import load_recipe
from mtpd.run.evaluate import fitting
from mtpd.run.without_weights import without_weights
from mtpd.trunk import Trunk

CI = Path(__file__).parents[1] / "examples" / "ci"
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


def gates() -> dict[str, list[str]]:
    """The served gate of each example, as words with variables in them."""
    workflow = yaml.safe_load((CI / "github-actions.yml").read_text())["jobs"]["gate"]
    [step] = [step["run"] for step in workflow["steps"] if step.get("name") == "Gate, as served"]
    job = yaml.safe_load((CI / "gitlab-ci.yml").read_text())["served"]
    assert job["variables"].keys() < workflow["env"].keys()
    return {
        name: shlex.split(text.replace("\\\n", " ")) for name, text in (("workflow", step), ("job", *job["script"]))
    }


def test_the_served_gate_of_the_examples(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: the examples have an option that mtpd does not, or stay green while a server accepts nothing."""
    suite = load_suite("demo")
    model, tokenizer, _ = without_weights(load_recipe(run / "recipe.yaml"))
    context = Trunk(model).context
    found = fitting(tokenizer, {"demo": (suite, questions("demo", suite))}, context=context)["demo"][1]
    prompts = [ids for _, ids in prompts_with_room(tokenizer, "demo", suite, found, context=context)]
    variables = {"RUN": str(run), "BASELINE_SERVED": str(tmp_path / "served.json"), "BY": "family"}
    variables |= {"MAX_DROP": "0.01", "MAX_DROP_WORST": "0.1"}
    with serving_run(run, prompts, tokens=TOKENS) as server:
        # As many accepted drafts as there can be, so that there is something to lose in every slice.
        good = {key: [(2, 2)] * 4 for key in server.rounds or {}}
        poor = {key: [(2, 0)] * (TOKENS - 1) for key in good}
        server.rounds = good
        words = ["eval", str(run), "--server", server.url, "--max-new-tokens", str(TOKENS)]
        assert main([*words, "--write-baseline", variables["BASELINE_SERVED"]]) == 0
        for name, step in gates().items():
            assert step.pop(0) == "mtpd"
            step = [Template(word).substitute(variables, SERVER=server.url) for word in step]
            step = [str(tmp_path / word) if word.startswith("served.") else word for word in step]
            for rounds, code in ((good, 0), (poor, 3)):
                server.rounds = rounds
                capsys.readouterr()
                assert main(step) == code, name
                shown = capsys.readouterr().out
                outcome = "passed" if code == 0 else "failed"
                assert f"gate {outcome}" in shown
                assert f"slices {outcome}" in shown
                failures = ET.parse(tmp_path / "served.xml").getroot().get("failures")
                assert failures == ("0" if code == 0 else "2")


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
