"""Checkpoints, signals and losses that are no number, in runs of a second."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_crash import words

from mtpd.cli import main
from mtpd.errors import OutOfMemory, enough_memory
from mtpd.files import fingerprint_file, sealed
from mtpd.train import checkpoints
from mtpd.train.trainer import HeadTrainer, Metrics


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = [json.dumps({"prompt": f"Say {number} words."}) for number in range(14)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Ctrl-C as in a terminal, whatever the tests run under."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def at_step(step: int, act: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Does something when the loss of a step is logged, amid training."""
    on_log = Metrics.on_log

    def logged(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_log(self, args, state, control, **kwargs)
        if state.global_step == step and "loss" in kwargs["logs"]:
            act()

    monkeypatch.setattr(Metrics, "on_log", logged)


def whole(run: Path) -> list[int]:
    """Steps of the checkpoints that are whole."""
    return sorted(int(mark.parent.name.rpartition("-")[2]) for mark in run.glob("checkpoint-*/complete.json"))


def heads(run: Path) -> bytes:
    return (run / "heads" / "model.safetensors").read_bytes()


def test_signals_and_named_checkpoints(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: SIGTERM or Ctrl-C lose steps, another exit code, a second Ctrl-C that waits, a resume that differs."""
    run = folder / "run"
    # The best heads are chosen, whatever the step at which a checkpoint was asked for.
    arguments = words(folder, run, "train.arguments.save_total_limit=3")
    for number, step, code in ((signal.SIGTERM, 2, 143), (signal.SIGINT, 4, 130)):
        with monkeypatch.context() as patch:
            at_step(step, lambda number=number: signal.raise_signal(number), patch)
            assert main(arguments) == code
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.endswith("the same command resumes where this one stopped"), said
        assert whole(run)[-1] == step + 1, "saved at the end of the step after it was logged"
        assert not (run / "heads").exists()

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        at_step(6, twice, patch)
        assert main(arguments) == 130
    assert 6 not in whole(run)
    assert main(arguments) == 0
    peaceful = folder / "peaceful"
    assert main(words(folder, peaceful, "train.arguments.save_total_limit=3")) == 0
    assert heads(run) == heads(peaceful)

    # The heads are there: nothing is left to go on with.
    capsys.readouterr()
    assert main([*arguments, "--resume", "checkpoint-2"]) == 2
    assert "the run has its trained heads" in capsys.readouterr().err
    for file in (peaceful / "heads").iterdir():
        file.unlink()
    arguments[2] = f"output={peaceful}"
    for name, accepted in (("checkpoint-5", "auto, checkpoint-2, checkpoint-4, checkpoint-6"), ("/", "auto, ")):
        assert main([*arguments, "--resume", name]) == 2
        assert f"--resume: {name} is no whole checkpoint of {peaceful}; accepted: {accepted}" in capsys.readouterr().err
    assert main([*arguments, "--resume", "checkpoint-2", "--fresh"]) == 2
    assert main([*arguments, "--resume", "checkpoint-2"]) == 0
    assert heads(run) == heads(peaceful)


def test_a_checkpoint_at_the_end_is_not_trained_further(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a run that ended between its last checkpoint and its heads trains a step too many when it is resumed."""
    peaceful, broken = folder / "peaceful", folder / "broken"
    # Three steps and a half of an epoch: transformers goes on to its end.
    further = ["train.max_steps=3", "evaluation.steps=0", "train.save_steps=2"]
    assert main(words(folder, peaceful, *further)) == 0

    def lost(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(HeadTrainer, "flush", lost)
        patch.setattr(HeadTrainer, "_save", HeadTrainer._save)
        at_end = words(folder, broken, *further, "data.hidden_states=recompute")
        code = main(at_end)
    assert code == 130
    # The flush of the first checkpoint was interrupted already: this one is saved, and then everything is there.
    assert whole(broken) == []
    assert main(at_end) == 0
    (broken / "heads" / "model.safetensors").unlink()
    assert checkpoints.ended(broken / "checkpoint-3")
    assert main(at_end) == 0
    assert heads(broken) == heads(peaceful)


def test_a_damaged_checkpoint_is_named_and_left_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: a flipped bit in some file of a checkpoint is trained on, or ends the run though an older one is whole."""
    run = folder / "run"
    arguments = words(folder, run, "train.arguments.save_total_limit=4")
    with monkeypatch.context() as patch:
        at_step(4, lambda: signal.raise_signal(signal.SIGTERM), patch)
        assert main(arguments) == 143
    newest = run / "checkpoint-5"
    files = [file for file in sorted(newest.iterdir()) if file.name != checkpoints.COMPLETE]
    assert len(files) >= 6
    for file in files:
        content = file.read_bytes()
        place = len(content) // 2
        for damaged in (content[:place], content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :], None):
            if damaged is None:
                file.unlink()
            else:
                file.write_bytes(damaged)
            found = checkpoints.damage(newest)
            assert found is not None
            assert str(file) in found
            assert checkpoints.last_checkpoint(run) == run / "checkpoint-4"
        file.write_bytes(content)
        assert checkpoints.damage(newest) is None
    # The best heads so far are lost: what comes after them is, too.
    best = checkpoints.best_step(newest)
    assert best in (2, 4)
    (run / f"checkpoint-{best}" / "model.safetensors").write_bytes(b"")
    assert checkpoints.last_checkpoint(run) == (None if best == 2 else run / "checkpoint-2")
    capsys.readouterr()
    assert main(arguments) == 0
    assert f"checkpoint-{best}/model.safetensors is damaged" in capsys.readouterr().err.replace("\n", "")
    peaceful = folder / "peaceful"
    assert main(words(folder, peaceful, "train.arguments.save_total_limit=4")) == 0
    assert heads(run) == heads(peaceful)


def test_links_are_not_followed_into_other_folders(tmp_path: Path) -> None:
    """Fault: a pickle of somebody else is loaded as the state of one's own optimizer."""
    outside = tmp_path / "outside.pt"
    outside.write_bytes(b"anything")
    folder = tmp_path / "run" / "checkpoint-1"
    folder.mkdir(parents=True)
    (folder / "optimizer.pt").write_bytes(b"anything")
    checkpoints.complete(folder, 1)
    assert checkpoints.damage(folder) is None
    (folder / "optimizer.pt").unlink()
    (folder / "optimizer.pt").symlink_to(outside)
    assert "is a link" in str(checkpoints.damage(folder))


def test_old_checkpoints_go_after_the_new_one_is_whole(tmp_path: Path) -> None:
    """Fault: the last whole checkpoint is deleted for one that is not, or the best one is."""
    for step in (1, 2, 3, 4):
        folder = checkpoints.folder_of(tmp_path, step)
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes([step]))
        if step < 4:
            checkpoints.complete(folder, step)
    checkpoints.rotate(tmp_path, keep=1, best=None)
    assert whole(tmp_path) == [3]
    assert (tmp_path / "checkpoint-4").exists(), "one that is being written"
    checkpoints.complete(checkpoints.folder_of(tmp_path, 4), 4)
    checkpoints.rotate(tmp_path, keep=1, best=3)
    assert whole(tmp_path) == [3, 4]
    checkpoints.rotate(tmp_path, keep=1, best=None)
    assert whole(tmp_path) == [4]


def test_a_loss_that_is_no_number(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: one bad row makes all weights NaN, ends without its batch, or is skipped without being counted."""
    common = ["heads.init=identity", "evaluation.steps=0", "train.save_steps=2", "data.held_out_count=4"]
    run = folder / "run"
    assert main(["data", "store", *words(folder, run, *common)[1:]]) == 0
    # States that overflowed, in one row.
    shard = run / "hidden-states" / "hidden-00000.safetensors"
    tensors = load_file(shard)
    tensors["hidden"] = tensors["hidden"].clone()
    tensors["hidden"][1, 5] = float("nan")
    save_file(tensors, shard)
    index = json.loads((shard.parent / "index.json").read_text())
    index["shards"][shard.name]["sha256"] = fingerprint_file(shard)
    (shard.parent / "index.json").write_text(json.dumps(sealed({k: v for k, v in index.items() if k != "sha256"})))
    row = index["shards"][shard.name]["rows"][1]

    capsys.readouterr()
    assert main(words(folder, run, *common)) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    kept = sorted((run / "bad-batches").glob("*.safetensors"))
    assert len(kept) == 1
    assert str(kept[0]) in said
    assert "hidden not finite" in said
    assert row in load_file(kept[0])["row"].tolist()
    about = json.loads(kept[0].with_suffix(".json").read_text())
    assert (about["loss"], row in about["rows"], about["not_finite"]) == ("nan", True, ["hidden"])

    states = folder / "states"
    (run / "hidden-states").rename(states)
    patient = [*common, "train.skip_bad_batches=9", f"data.hidden_states={states}"]
    assert main(words(folder, folder / "patient", *patient)) == 0
    logged = [json.loads(line) for line in (folder / "patient" / "metrics.jsonl").read_text().splitlines()]
    left_out = len(list((folder / "patient" / "bad-batches").glob("*.json")))
    assert left_out >= 1
    assert max(line.get("skipped_batches", 0) for line in logged) == left_out
    weights = load_file(folder / "patient" / "heads" / "model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values() if weight.is_floating_point())


def test_memory_that_is_full(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: the allocator's own words, and nothing about what to make smaller."""
    with (
        pytest.raises(OutOfMemory, match=r"out of memory while loading .*; take less"),
        enough_memory("loading", "take less"),
    ):
        torch.empty(2**59)
    with pytest.raises(RuntimeError, match="size"), enough_memory("loading", "take less"):
        torch.ones(2) @ torch.ones(3)

    def compute_loss(*_: Any, **__: Any) -> None:
        torch.empty(2**59)

    monkeypatch.setattr(HeadTrainer, "compute_loss", compute_loss)
    assert main(words(folder, folder / "run")) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "out of memory while training" in said
    assert "train.micro_batch_rows (2 now" in said
