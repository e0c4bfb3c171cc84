"""What somebody else's files must not be able to do."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mtpd.cli import main
from mtpd.errors import UserError
from mtpd.evaluate.suites import load_suite
from mtpd.files import sealed
from mtpd.formats.layout import Layout
from mtpd.formats.model_card import model_card
from mtpd.recipe import load_recipe
from mtpd.report.samples import Samples, SampleText
from mtpd.run.loading import load
from mtpd.run.report import report_run
from mtpd.train import checkpoints

SCRIPT = "</td><script>alert(1)</script><img src=x onerror=alert(1)>\"'|\n# heading"


class Payload:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_no_pickle_is_read_where_weights_are(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: a model, heads or a checkpoint in pickle form is loaded, and runs what is in it."""
    mark = tmp_path / "was-run"
    pickled = pickle.dumps(Payload(mark))
    from mtpd.data.builtin_models import tiny

    model, tokenizer = tiny()
    checkpoint = tmp_path / "model"
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.safetensors"):
        (checkpoint / name).write_bytes(pickled)
        assert main(["distill", f"model={checkpoint}", f"output={tmp_path / 'run'}"]) == 2
        (checkpoint / name).unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(pickled)
    assert main(["inspect", str(checkpoint)]) == 2
    assert "pickled weights are not read" in capsys.readouterr().err

    heads = finished_run / "heads" / "model.safetensors"
    whole = heads.read_bytes()
    for name in ("model.safetensors", "pytorch_model.bin"):
        heads.unlink(missing_ok=True)
        (heads.parent / name).write_bytes(pickled)
        with pytest.raises(UserError):
            load(finished_run)
        (heads.parent / name).unlink()
    heads.write_bytes(whole)
    load(finished_run)

    # Of one's own run, and marked as whole: even then transformers unpickles tensors and plain values alone.
    newest = finished_run / "checkpoint-8"
    torch.save({"state": Payload(mark)}, newest / "scheduler.pt")
    checkpoints.complete(newest, 8)
    assert checkpoints.damage(newest) is None
    with pytest.raises(pickle.UnpicklingError):
        torch.load(newest / "scheduler.pt", weights_only=True)
    assert not mark.exists()
    assert load_file(heads)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("model: /etc", "model"),
        ("model: ~/model", "model"),
        ("model: ../model", "model"),
        ("model: linked", "model"),
        ("model: folder", "model"),
        ("model: tiny\noutput: /tmp/run", "output"),
        ("model: tiny\noutput: a/../../run", "output"),
        ("model: tiny\ntrust_remote_code: true", "trust_remote_code"),
        ("model: tiny\ndata.prompts: linked/rows.jsonl", "data.prompts"),
        ("model: tiny\ndata.prompts: https://example.org/rows.jsonl", "data.prompts"),
        ("model: tiny\ndata: {held_out: /etc/passwd}", "data.held_out"),
        ("model: tiny\ndata.hidden_states: /mnt/states", "data.hidden_states"),
        ("model: tiny\ndata.given: [{prompts: ../texts.jsonl}]", "data.given.0.prompts"),
        ("model: tiny\nheads.source: /heads", "heads.source"),
        ("model: tiny\nheads.vocabulary: /vocabulary.json", "heads.vocabulary"),
        ("model: tiny\nevaluation.extra: [builtin-other, ../x.jsonl]", "evaluation.extra.1"),
        ("model: tiny\ntrain.report_to: [wandb]", "train.report_to.0"),
        ("model: tiny\ntrain.arguments: {deepspeed: evil.json}", "train.arguments.deepspeed"),
        ("model: tiny\ntrain.arguments: {logging_dir: /tmp}", "train.arguments.logging_dir"),
        ("model: tiny\ntrain.arguments: {adam_beta1: text}", "train.arguments.adam_beta1"),
    ],
)
def test_recipes_that_are_not_trusted(
    text: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: somebody else's recipe reads or writes outside of the folder, runs code, or sends data away."""
    work, outside = tmp_path / "work", tmp_path / "outside"
    work.mkdir()
    outside.mkdir()
    (work / "linked").symlink_to(outside)
    (work / "folder").mkdir()
    (work / "folder" / "model.safetensors").symlink_to(outside / "secret")
    monkeypatch.chdir(work)
    Path("recipe.yaml").write_text(text + "\n")
    assert main(["recipe", "check", "recipe.yaml", "--untrusted"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"mtpd: error: {key}: ")
    assert "not trusted" in said
    assert said.count("\n") == 1
    assert main(["distill", "recipe.yaml", "--untrusted"]) == 2
    assert list(outside.iterdir()) == []


def test_what_a_recipe_that_is_not_trusted_may_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a check that refuses harmless recipes, or what the user says on the command line."""
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(
        "model: org/name\noutput: runs/x\ndata.prompts: rows.jsonl\nevaluation.extra: [builtin-other]\n"
        "train.arguments: {adam_beta1: 0.8}\ntrust_remote_code: false\n"
    )
    assert load_recipe("recipe.yaml", untrusted=True) == load_recipe("recipe.yaml")
    mine = [f"output={tmp_path.parent / 'runs'}", "trust_remote_code=true"]
    assert load_recipe("recipe.yaml", mine, untrusted=True).trust_remote_code


def test_runs_that_are_not_trusted(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a run directory from somewhere says that code of its model is to be run, and it is."""
    recipe = finished_run / "recipe.yaml"
    load(finished_run, untrusted=True)
    recipe.write_text(recipe.read_text().replace("trust_remote_code: false", "trust_remote_code: true"))
    commands = [["generate", "--prompt", "x"], ["chat"], ["bench"], ["eval"], ["extend", "--to", "4"]]
    for command in [*commands, ["export", "--to", "transformers", "-o", str(finished_run.parent / "out")]]:
        assert main([command[0], str(finished_run), *command[1:], "--untrusted"]) == 2
        assert "trust_remote_code: true is not accepted" in capsys.readouterr().err.lower()


def test_what_a_run_that_is_not_trusted_names(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: more heads are made of a run from somewhere, out of any file of the machine that its recipe names."""
    recipe = finished_run / "recipe.yaml"
    text = recipe.read_text()
    recipe.write_text(text.replace("prompts: builtin\n", "prompts: /etc/prompts.jsonl\n", 1))
    assert recipe.read_text() != text
    assert main(["extend", str(finished_run), "--to", "4", "--untrusted"]) == 2
    said = capsys.readouterr().err
    assert "data.prompts: /etc/prompts.jsonl is not accepted in a recipe that is not trusted" in said
    # Where it lies is the user's word.
    recipe.write_text(text)
    assert main(["extend", str(finished_run), "--to", "4", "--steps", "0", "--untrusted"]) == 0


def test_recipes_of_pretraining_that_are_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: somebody else's recipe of a pretraining reads or writes outside of the folder."""
    monkeypatch.chdir(tmp_path)
    for line, key in (
        ("data.texts: /etc/texts.jsonl", "data.texts"),
        ("data.held_out: ../texts.jsonl", "data.held_out"),
        ("tokenizer: /etc", "tokenizer"),
        ("output: /tmp/run", "output"),
    ):
        Path("recipe.yaml").write_text(f"model: {{model_type: llama}}\n{line}\n")
        assert main(["pretrain", "recipe.yaml", "--untrusted"]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"mtpd: error: {key}: ")
        assert "not trusted" in said
    assert list(tmp_path.iterdir()) == [tmp_path / "recipe.yaml"]


def test_suites_that_are_not_trusted(tmp_path: Path) -> None:
    """Fault: somebody else's suites read any file of the machine into prompts and reports."""
    folder = tmp_path / "suites"
    folder.mkdir()
    (tmp_path / "secret.jsonl").write_text('{"prompt": "secret"}\n')
    row = '{"prompt": "Say it."}\n'
    (folder / "rows.jsonl").write_text(row)
    (folder / "good.yaml").write_text("title: good\nsource: rows.jsonl\n")
    (folder / "path.yaml").write_text("title: x\nsource: ../secret.jsonl\n")
    (folder / "absolute.yaml").write_text(f"title: x\nsource: {tmp_path / 'secret.jsonl'}\n")
    (folder / "link.yaml").write_text("title: x\nsource: link-rows.jsonl\n")
    (folder / "link-rows.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (folder / "linked.jsonl").symlink_to(tmp_path / "secret.jsonl")
    assert load_suite("good", folder, untrusted=True).source == str(folder / "rows.jsonl")
    for name in ("path", "absolute", "link", "linked", "../suites/good"):
        load_suite(name, folder)
        with pytest.raises(UserError, match="not trusted"):
            load_suite(name, folder, untrusted=True)


class Tags(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.seen |= {name for name, _ in attrs if name.startswith("on")}


def test_reports_show_what_models_write(finished_run: Path) -> None:
    """Fault: a generated token, a suite, a logged name or the recipe becomes markup of the report or its charts."""
    text = SampleText(suite=SCRIPT, id=SCRIPT, prompt=SCRIPT, pieces=[SCRIPT, "<b>"], depths=[0, 1])
    (finished_run / "samples.json").write_text(json.dumps(sealed(Samples(texts=[text]).model_dump(mode="json"))))
    for name in ("acceptance.json", "acceptance-before.json"):
        content = json.loads((finished_run / name).read_text())
        del content["sha256"]
        content["suites"] = {SCRIPT: next(iter(content["suites"].values()))}
        (finished_run / name).write_text(json.dumps(content))
    lines = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    lines = [{**line, f"ce_{SCRIPT}": 1.0 + number} for number, line in enumerate(lines)]
    (finished_run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = finished_run.parent / "<script>alert(2)</script>"
    shutil.move(finished_run, run)
    page = report_run(run).read_text()
    tags = Tags()
    tags.feed(page)
    assert not tags.seen & {"script", "img", "b", "onerror"}, tags.seen
    assert "&lt;script&gt;alert(1)" in page
    assert "svg" in tags.seen


def test_model_cards_show_names_as_words(finished_run: Path) -> None:
    """Fault: the name of a suite or a model becomes metadata, markup or another column of the card."""
    content = json.loads((finished_run / "acceptance.json").read_text())
    del content["sha256"]
    content["suites"] = {SCRIPT: next(iter(content["suites"].values()))}
    (finished_run / "acceptance.json").write_text(json.dumps(content))
    (finished_run / "acceptance-decoded.json").unlink()
    recipe = load_recipe(finished_run / "recipe.yaml", ["seed=3"]).model_copy(update={"model": "x\nlicense: mit\n```"})
    run: Any = SimpleNamespace(
        path=finished_run,
        model=recipe.model,
        recipe=recipe,
        depth=2,
        blocks=2,
        written=2,
        recycles=False,
        config=SimpleNamespace(vocabulary_size=0, shared=False),
    )
    layout = Layout("mtpd", "heads", lambda run: None, lambda run, folder: None, {})
    card = model_card(run, layout, finished_run / "out", finished_run / "out")
    tags = Tags()
    tags.feed(card)
    assert not tags.seen & {"script", "img"}, tags.seen
    assert "\nlicense:" not in card
    assert card.count("\n# heading") == 0
    table = [line for line in card.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1
