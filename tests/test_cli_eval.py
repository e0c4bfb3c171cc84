"""`mtpd eval` on a run with a tiny random model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from seals import edited, with_its_weights

from mtpd.cli import main
from mtpd.data.models import load_model
from mtpd.evaluate.acceptance import Acceptance
from mtpd.evaluate.intervals import intervals
from mtpd.evaluate.other_model import cost
from mtpd.evaluate.slices import slices
from mtpd.run.report import report_run


@pytest.fixture
def run(finished_run: Path) -> Path:
    return finished_run


def measure(run: Path, *words: str) -> int:
    """`mtpd eval` with the suites' responses kept in the run's parent."""
    return main(["eval", str(run), "--responses", str(run.parent / "responses"), *words])


SHORT = ["--suite", "demo", "--max-new-tokens", "16"]


def error_of(run: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    capsys.readouterr()
    code = measure(run, *words)
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert "Traceback" not in "".join(lines)
    return code, lines[-1] if lines else ""


def test_an_evaluation(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: the file, the tables and the exit code do not belong together, or responses are written twice."""
    file = run.parent / "acceptance.json"
    assert measure(run, *SHORT, "-o", str(file)) == 0
    shown = capsys.readouterr().out
    found = Acceptance.load(file)
    assert (found.mode, found.schema_version, list(found.suites)) == ("offline", 4, ["demo"])
    suite = found.suites["demo"]
    assert suite.rows is not None
    assert (suite.prompts, len(suite.rows)) == (84, 84)
    assert suite.settings is not None
    assert suite.settings["max_new_tokens"] == 16
    assert found.settings == {"dtype": "bfloat16" if "bfloat16" in file.read_text() else "float32", "drafts": 2}
    estimates = intervals(found)[None]
    for name in ("tau", "car_1", "expected_1"):
        assert estimates[name].text() in shown
    assert "control CAR_1" in shown
    kept = {path: path.stat().st_mtime_ns for path in (run.parent / "responses").iterdir()}
    assert measure(run, *SHORT, "-o", str(run.parent / "again.json")) == 0
    assert {path: path.stat().st_mtime_ns for path in (run.parent / "responses").iterdir()} == kept
    assert Acceptance.load(run.parent / "again.json") == found


def test_decoded_and_offline_agree(run: Path) -> None:
    """Fault: the number that CI takes because it is fast is not the one that decoding has."""
    for mode in ("offline", "decoded"):
        words = [*SHORT, "--limit", "6", "--mode", mode, "-o", str(run.parent / f"{mode}.json")]
        # In float32 both, so that no tie falls the other way.
        recipe = run / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace("dtype: auto", "dtype: float32"))
        refresh_fingerprint(run)
        assert measure(run, *words) == 0
    offline, decoded = (Acceptance.load(run.parent / f"{mode}.json").suites["demo"] for mode in ("offline", "decoded"))
    assert (offline.drafted, offline.accepted) == (decoded.drafted, decoded.accepted)
    assert decoded.speed_up is not None
    assert decoded.identical == 6


def refresh_fingerprint(run: Path) -> None:
    """Heads know the fingerprint of their trunk, which depends on its number format."""
    from mtpd.data.models import trunk_fingerprint

    model, _ = load_model("tiny", dtype="float32")
    for folder in ("heads", "heads-before"):
        path = run / folder / "config.json"
        edited(path, trunk=trunk_fingerprint(model))


def test_the_gate(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: equal heads fail, damaged ones pass, or a failed gate overwrites the baseline."""
    baseline = run.parent / "baseline.json"
    assert measure(run, *SHORT, "--write-baseline", str(baseline)) == 0
    before = baseline.read_bytes()
    # Suites, lengths and mode follow from the baseline.
    assert measure(run, "--against", str(baseline), "--max-drop", "0.01") == 0
    assert "gate passed" in capsys.readouterr().out
    damage(run)
    code = measure(run, "--against", str(baseline), "--write-baseline", str(baseline))
    assert code == 3
    assert "gate failed" in capsys.readouterr().out
    assert baseline.read_bytes() == before
    assert measure(run, *SHORT, "--limit", "20", "--write-baseline", str(baseline)) == 0
    assert measure(run, "--against", str(baseline)) == 4


def damage(run: Path) -> None:
    path = run / "heads" / "model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith("project.weight")]:
        tensors[name] = torch.randn(tensors[name].shape, generator=generator)
    save_file(tensors, path, metadata={"format": "pt"})
    with_its_weights(path.parent)


def cut_tensor(run: Path) -> None:
    path = run / "heads" / "model.safetensors"
    tensors = load_file(path)
    name = next(iter(sorted(tensors)))
    save_file({**tensors, name: tensors[name][:1].clone()}, path, metadata={"format": "pt"})
    with_its_weights(path.parent)


def other_trunk(run: Path) -> None:
    path = run.parent / "base.json"
    edited(path, trunk="0" * 64)


def first_schema(run: Path) -> None:
    path = run.parent / "base.json"
    content = json.loads(path.read_text())
    content["schema"] = 1
    del content["sha256"]
    for suite in content["suites"].values():
        suite["rows"] = suite["settings"] = suite["control"] = None
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (cut_tensor, [*SHORT], "tensors missing, unexpected or of another shape"),
        (lambda run: shutil.rmtree(run / "heads"), [*SHORT], "heads: holds no heads"),
        (lambda run: (run / "recipe.yaml").unlink(), [*SHORT], "holds no run"),
        (None, ["--suite", "nothing"], "suite nothing: unknown; accepted: alpaca, ceval"),
        (None, ["--suite", ","], "--suite: names no suite"),
        (None, ["--suite", "demo,demo"], "--suite: demo is named twice"),
        (None, [*SHORT, "--drafts", "3"], "--drafts: 3 is not accepted; accepted: 1 to 2"),
        (None, [*SHORT, "--max-drop", "5", "--against", "BASE"], "--max-drop: 5"),
        (None, ["--suite", "demo", "--max-new-tokens", "8", "--against", "BASE"], "max_new_tokens is 16 and 8"),
        (None, ["--mode", "decoded", "--against", "BASE"], "different modes"),
        (None, ["--drafts", "1", "--against", "BASE"], "decoding settings differ: drafts is 2 and 1"),
        (other_trunk, ["--against", "BASE"], "different trunks"),
        (first_schema, ["--against", "BASE"], "no counts by prompt (schema 1)"),
        (
            lambda run: (run.parent / "base.json").write_text('{"schema": 2,'),
            ["--against", "BASE"],
            "not an acceptance file",
        ),
        (
            None,
            ["--against", "missing.json"],
            "missing.json: no such file; accepted: an acceptance file",
        ),
        (lambda run: (run / "provenance.json").write_text("{"), [*SHORT], "not a provenance"),
        (
            lambda run: (run / "trained-prompts.safetensors").write_text("x"),
            [*SHORT],
            "not a file of prompt signatures",
        ),
    ],
)
def test_mistakes(
    change: Callable[[Path], Any] | None,
    words: list[str],
    message: str,
    run: Path,
    finished_run_made: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Fault: a traceback, a failure's exit code, or a green gate on files that do not belong together."""
    base = run.parent / "base.json"
    if "BASE" in words:
        cached = finished_run_made.parent / "base.json"
        if not cached.is_file():
            # Measuring keeps texts in the run: the one that all tests copy stays as it is.
            measured = shutil.copytree(finished_run_made, run.parent / "measured")
            assert measure(measured, *SHORT, "--limit", "60", "-o", str(cached)) == 0
        shutil.copy(cached, base)
    if change is not None:
        change(run)
    code, said = error_of(run, capsys, *[str(base) if word == "BASE" else word for word in words])
    assert code == 2, said
    assert message in said
    assert said.startswith("mtpd: error: ")


def test_prompts_of_the_training_are_flagged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: acceptance on prompts that the heads learned is reported without a word."""
    lines = (run / "responses.jsonl").read_text().splitlines()
    assert len(lines) > 10
    from mtpd.data.prompts import load_prompts

    trained = {prompt.id: prompt.text for prompt in load_prompts("builtin")}
    chosen = [trained[json.loads(line)["id"]] for line in lines[1:4]]
    texts = [chosen[0], chosen[1] + " Thank you.", "What is the colour of a ripe lemon in the evening?"]
    folder = run.parent / "suites"
    folder.mkdir()
    (folder / "mixed.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    file = run.parent / "out.json"
    words = ["--suite", "mixed", "--suite-dir", str(folder), "--max-new-tokens", "8", "-o", str(file)]
    assert measure(run, *words) == 0
    said = capsys.readouterr()
    assert "suite mixed: the run was trained on 2 of its 3 prompts (1 word for word, 1 nearly)" in said.err
    assert "3 (2 trained on)" in said.out
    assert [row.trained for row in Acceptance.load(file).suites["mixed"].rows or []] == ["exact", "near", None]


def test_the_main_head_before_and_after(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a run that trained the trunk too, and lost what the model could, is not told from one that did not."""
    folder = run.parent / "suites"
    folder.mkdir()
    rows = [{"prompt": f"What is {n} + 1?", "reference": f"#### {n + 1}"} for n in range(4)]
    (folder / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--suite", "gsm8k", "--suite-dir", str(folder), "--max-new-tokens", "8", "--check-trunk"]
    file = run.parent / "out.md"
    assert measure(run, *words, "--markdown", str(file)) == 0
    first = re.search(r"gsm8k[^\d]+32[^\d]+([\d.]+) → ([\d.]+)[^\d]+0\.000 → 0\.000", capsys.readouterr().out)
    assert first is not None
    assert first[1] == first[2]
    # The same model with other weights, as a run that trains more than heads leaves it.
    model, tokenizer = load_model("tiny")
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(run / "trunk")
    tokenizer.save_pretrained(run / "trunk")
    code, said = error_of(run, capsys, *words)
    assert (code, "belong to another trunk" in said) == (2, True)
    from mtpd.data.models import trunk_fingerprint

    for folder_name in ("heads",):
        path = run / folder_name / "config.json"
        changed, _ = load_model(str(run / "trunk"))
        edited(path, trunk=trunk_fingerprint(changed))
    assert measure(run, *words, "--markdown", str(file)) == 0
    line = next(line for line in file.read_text().splitlines() if line.startswith("| gsm8k |") and "→" in line)
    before, after = map(float, re.findall(r"([\d.]+) → ([\d.]+)", line)[0])
    assert before == pytest.approx(float(first[1]), abs=1e-3)
    assert after > 1.5 * before


def save_tuned(folder: Path) -> None:
    """Writes the tiny model as a fine-tuning could have left it."""
    model, tokenizer = load_model("tiny", dtype="float32", device="cpu")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(1.2)
    for part in (model, tokenizer):
        part.save_pretrained(folder)


def test_other_models_under_the_same_heads(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a fine-tuned model is refused, taken for the run's own, or not to be told from it in what is written."""
    save_tuned(tmp_path / "tuned")
    assert measure(run, *SHORT, "--limit", "4") == 0
    own = Acceptance.load(run / "evaluation.json")
    samples = (run / "samples.json").read_bytes()
    words = ["--model", str(tmp_path / "tuned"), "--against", str(run)]
    assert measure(run, *words) == 4, "4 prompts never decide"
    shown = capsys.readouterr()
    found = Acceptance.load(run / "evaluation-tuned.json")
    assert Acceptance.load(run / "evaluation.json") == own
    assert (run / "samples.json").read_bytes() == samples
    assert (own.heads_trunk, found.heads_trunk, found.heads) == (None, own.trunk, own.heads)
    assert found.trunk != own.trunk
    assert f"is another trunk ({found.trunk[:12]}) than the heads were trained for ({own.trunk[:12]})" in shown.err
    assert "heads under another trunk than their own" in " ".join(shown.out.split())
    assert "costs these heads" in " ".join(shown.out.split())
    # Without a baseline it is compared with the run's own, on its suites, and nothing is judged.
    assert measure(run, "--model", str(tmp_path / "tuned"), "--by", "family") == 0
    shown = capsys.readouterr()
    said = " ".join(shown.out.split())
    expected = cost(own, Acceptance.load(run / "evaluation-tuned.json"), name=str(tmp_path / "tuned"), by=["family"])
    assert expected.line in said
    assert "Change of tau in each slice" in said
    assert f"model={tmp_path / 'tuned'} heads.source={run} heads.init=null" in said
    assert "gate" not in said
    page = report_run(run).read_text()
    assert "Under another model: tuned" in page
    assert page.count('<tr data-suite="family ') == len({row.family for row in own.suites["demo"].rows or []})
    # Another limit than the run's own: there is nothing to compare with.
    assert measure(run, *SHORT, "--limit", "3", "--model", str(tmp_path / "tuned")) == 0
    shown = capsys.readouterr()
    assert "is not compared: " in shown.err
    assert "under the run's own model, to compare with" in " ".join(shown.out.split())
    # The other way round the heads do not belong to what they are compared with.
    assert main(["compare", str(run / "evaluation-tuned.json"), str(run / "evaluation.json")]) == 2
    assert "measured with different trunks" in capsys.readouterr().err
    assert measure(run, *SHORT, "--limit", "4", "--model", "tiny", "-o", str(tmp_path / "same.json")) == 0
    assert Acceptance.load(tmp_path / "same.json").heads_trunk is None
    code, line = error_of(run, capsys, *SHORT, "--model", str(tmp_path / "none"))
    assert (code, "no such directory" in line) == (2, True)
    code, line = error_of(run, capsys, *SHORT, "--model", "tiny", "--heads", "none")
    assert code == 2


def test_heads_are_trained_on_for_another_model(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: heads of the model before its fine-tuning are refused as a start, or start from other weights."""
    save_tuned(tmp_path / "tuned")
    words = ["distill", str(run / "recipe.yaml"), f"model={tmp_path / 'tuned'}", f"output={tmp_path / 'again'}"]
    words += [f"heads.source={run}", "heads.init=null", "evaluation.decode_prompts=0", "evaluation.steps=0"]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert f"heads.source: {run / 'heads'}: were trained for another trunk" in shown.err
    old, started, trained = (
        load_file(folder / "model.safetensors")
        for folder in (run / "heads", tmp_path / "again" / "heads-before", tmp_path / "again" / "heads")
    )
    assert all(torch.equal(old[name], started[name]) for name in old)
    assert not all(torch.equal(old[name], trained[name]) for name in old)
    own = json.loads((tmp_path / "again" / "heads" / "config.json").read_text())["trunk"]
    assert own not in ("", json.loads((run / "heads" / "config.json").read_text())["trunk"])


def test_slices_of_an_evaluation(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: what prompts are or where rounds were is not in the file, or the options of slices do nothing."""
    file = run.parent / "acceptance.json"
    past = run.parent / "past"
    past.mkdir()
    words = ["--suite", "demo,multilingual", "--limit", "14", "--max-new-tokens", "16", "-o", str(file)]
    assert measure(run, *words, "--by", "family,language,position,mode") == 0
    shown = capsys.readouterr().out
    found = Acceptance.load(file)
    rows = {name: suite.rows or [] for name, suite in found.suites.items()}
    assert len({row.family for row in rows["demo"]}) > 3
    assert {row.family for row in rows["multilingual"]} == {None}
    assert len({row.language for row in rows["multilingual"]} - {None}) > 3
    assert all(
        row.places and sum(each[0] for each in row.places["text"].values()) == row.drafted[0] for row in rows["demo"]
    )
    for part in slices(found, ["family", "language", "position"]):
        ratio = part.ratios()["tau"].text()
        assert re.search(rf"{part.axis} +│ {re.escape(part.name)} +│ +{part.prompts} │.*{re.escape(ratio)}", shown), (
            part
        )
    shutil.copy(file, past / "2026-01-01.json")
    page = run.parent / "out.md"
    further = ["--against", str(file), "--max-drop-worst", "0.1", "--by", "suite", "--min-tau", "9"]
    assert measure(run, *words[:-2], *further, "--history", str(past), "--markdown", str(page)) == 3
    shown = capsys.readouterr().out
    assert "gate on 2 slices passed" in shown
    assert "gate on the floor of tau undecided" in shown or "gate on the floor of tau failed" in shown
    assert re.search(r"\| demo \| ▄▄ (\d\.\d\d) → \1 \|", page.read_text())
    for words, message in (
        (["--max-drop-worst", "0.1"], "--max-drop-worst: 0.1 needs --against"),
        (["--min-tau", "0.5"], "--min-tau: 0.5 is not accepted"),
        (["--by", "depth"], "--by: depth is not accepted"),
        (["--suite", "demo[slow]"], "suite demo[slow]: unknown mode"),
        (["--history", str(run.parent / "none")], "none: no such folder"),
    ):
        code, said = error_of(run, capsys, *words)
        assert code == 2
        assert message in said


def test_long_prompts_are_measured_as_far_as_the_context_reaches(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a suite of joined documents is not measured, or its lengths cannot be told apart."""
    (run.parent / "suites").mkdir()
    (run.parent / "suites" / "mine.yaml").write_text(
        "title: mine\nsource: stdlib-held-out\ncontexts: [400, 900, 1048576]\nlimit: 18\nmax_new_tokens: 12\n"
    )
    file = run.parent / "acceptance.json"
    words = ["--suite", "mine", "--suite-dir", str(run.parent / "suites"), "-o", str(file), "--by", "family,context"]
    assert measure(run, *words) == 0
    rows = Acceptance.load(file).suites["mine"].rows or []
    assert [row.family for row in rows] == ["400"] * 6 + ["900"] * 6
    assert all(row.places and min(row.places["context"]) >= 512 for row in rows[6:])
