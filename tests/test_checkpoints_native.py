"""A checkpoint's own heads: trained again and put back, grafted, and what is wrong with them said in one line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import native_checkpoints as native
import pytest
import torch
from safetensors.torch import load_file, save_file

from mtpd.cli import main
from mtpd.evaluate.acceptance import Acceptance
from mtpd.formats.directory import Checkpoint, write_sharded
from mtpd.formats.find_heads import find_heads
from mtpd.formats.importing import import_heads
from mtpd.formats.tensors import stored

DISTILL = [
    "heads=native",
    "dtype=float32",
    "device=cpu",
    "data.max_new_tokens=8",
    "data.row_length=256",
    "data.limit=6",
    "data.max_unusable=1",
    "train.max_steps=3",
    "train.learning_rate=0.01",
    "evaluation.prompts_limit=2",
    "evaluation.max_new_tokens=8",
    "evaluation.decode_prompts=0",
]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["glm4moe", "qwen3.5"])
def test_native_heads_are_distilled_and_put_back(name: str, tmp_path: Path) -> None:
    """Fault: heads that start at random; a written checkpoint that differs from the original in more than its heads."""
    original = tmp_path / "original"
    native.native_checkpoint(name, original, dtype=torch.bfloat16)
    (original / "README.md").write_text("the original's own card")
    run = tmp_path / "run"
    assert main(["distill", f"model={original}", f"output={run}", *DISTILL]) == 0
    start = load_file(run / "heads-before" / "model.safetensors")
    for key, tensor in find_heads(Checkpoint(original)).tensors.items():
        assert torch.equal(start[key], tensor.load().float()), key
    assert Acceptance.load(run / "acceptance-before.json").total().prompts == 2
    assert Acceptance.load(run / "acceptance.json").total().prompts == 2
    out = tmp_path / "out"
    assert main(["export", str(run), "--to", "vllm", "-o", str(out)]) == 0
    before, after = files(original), files(out)
    assert set(after) == set(before) | {"README-mtpd.md", "mtpd.json", "vllm.yaml"}
    assert (original / "README.md").read_text() == "the original's own card"
    card = (out / "README-mtpd.md").read_text()
    assert "vllm serve" in card
    assert ("use_mtp=True" in card) == (name == "glm4moe"), "the engines that have the family"
    assert {file for file in before if before[file] != after[file]} == {"model-mtp.safetensors"}
    assert os.path.samefile(original / "model-base.safetensors", out / "model-base.safetensors")
    old, new = load_file(original / "model-mtp.safetensors"), load_file(out / "model-mtp.safetensors")
    trained = load_file(run / "heads" / "model.safetensors")
    assert {key: tensor.dtype for key, tensor in new.items()} == dict.fromkeys(old, torch.bfloat16)
    assert any(not torch.equal(old[key], new[key]) for key in old)
    for key, tensor in find_heads(Checkpoint(out)).tensors.items():
        assert torch.equal(tensor.load(), trained[key].bfloat16()), key


def test_a_plan_counts_native_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a plan for the recipe's default depth, whatever the checkpoint has."""
    native.native_checkpoint("transformers", tmp_path / "model", count=2)
    words = [f"model={tmp_path / 'model'}", "heads=native", "data.row_length=256", "--dry-run"]
    # Byte tokens: many prompts are longer than its context.
    words += ["data.max_new_tokens=8", "data.max_unusable=0.9"]

    def planned(*more: str) -> str:
        assert main(["distill", *words, *more]) == 0
        # DeepSpeed may say something before.
        return "".join(capsys.readouterr().out.partition("plan   ")[1:])

    assert planned() == planned("heads.depth=2") != planned("heads.depth=1")


def test_untrained_heads_give_the_original_back(tmp_path: Path) -> None:
    """Fault: import and in-place export that are not the reverse of each other, byte for byte."""
    original = tmp_path / "original"
    native.native_checkpoint("deepseek-v3", original, dtype=torch.bfloat16)
    assert main(["import", str(original), "-o", str(tmp_path / "run")]) == 0
    assert main(["export", str(tmp_path / "run"), "--to", "transformers", "-o", str(tmp_path / "out")]) == 0
    before, after = files(original), files(tmp_path / "out")
    assert {file: after[file] for file in before} == before


def test_imported_heads_are_a_run_that_is_not_trained_in_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: `mtpd distill` that takes imported heads for trained ones and trains nothing."""
    original = tmp_path / "original"
    native.native_checkpoint("qwen3.5", original)
    assert main(["import", str(original), "-o", str(tmp_path / "run"), "--depth", "3"]) == 0
    assert main(["inspect", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "depth 3, one shared block" in said
    assert "imported from" in said
    assert main(["distill", str(tmp_path / "run" / "recipe.yaml")]) == 2
    assert "holds imported heads; choose another output" in capsys.readouterr().err


def test_graft_puts_heads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: heads grafted under other names or bits; a tuned base whose own tensors or files change."""
    original, tuned = tmp_path / "original", tmp_path / "tuned"
    heads = native.native_checkpoint("glm4moe", original, count=2)
    native.save_model(native.base_model("glm4moe"), tuned)
    native.edit_config(tuned, num_nextn_predict_layers=0)
    weights = {key: value * 2 for key, value in load_file(tuned / "model.safetensors").items()}
    save_file(weights, tuned / "model.safetensors", metadata={"format": "pt"})
    assert main(["graft", str(tuned), "--from", str(original), "-o", str(tmp_path / "out")]) == 0
    grafted = Checkpoint(tmp_path / "out")
    for key, value in {**weights, **heads}.items():
        assert torch.equal(grafted.tensors[key].load(), value), key
    assert find_heads(grafted).count == 2
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tuned / "tokenizer.json").read_bytes()
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "2 MTP heads, family glm4moe" in capsys.readouterr().out
    assert main(["graft", str(tmp_path / "out"), "--from", str(original), "-o", str(tmp_path / "again")]) == 2
    assert "has MTP heads already" in capsys.readouterr().err


def broken(case: str, folder: Path) -> list[str]:
    """A checkpoint with one thing wrong. Gives what the message has to say."""
    if case == "unknown family":
        native.save_model(native.base_model("transformers"), folder)
        native.add_tensors(folder, {"model.nextn.0.enorm.weight": torch.ones(4)})
        return ["no known family (llama)", "model.nextn.0.enorm.weight", "mtpd/formats/families"]
    if case == "none":
        native.save_model(native.base_model("transformers"), folder)
        return ["has no MTP heads"]
    native.native_checkpoint("glm4moe", folder)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    if case == "no tensors":
        (folder / "model-mtp.safetensors").unlink()
        weights = {key: file for key, file in content["weight_map"].items() if "mtp" not in file}
        index.write_text(json.dumps({"weight_map": weights}))
        return ["declares 1 MTP heads", "tensors are missing", "mtpd graft"]
    if case == "not declared":
        native.edit_config(folder, num_nextn_predict_layers=0)
        return ["tensors of 1 MTP heads", "does not declare", "set num_nextn_predict_layers to 1"]
    if case == "too few":
        native.edit_config(folder, num_nextn_predict_layers=2)
        return ["declares 2 MTP heads", "tensors of 1"]
    if case == "no shard":
        (folder / "model-mtp.safetensors").unlink()
        return ["names 1 files that are not there, among them model-mtp.safetensors"]
    if case == "index":
        content["weight_map"].popitem()
        index.write_text(json.dumps(content))
        return ["says that", "is in no file"]
    if case == "index names more":
        content["weight_map"]["model.extra"] = "model-base.safetensors"
        index.write_text(json.dumps(content))
        return ["names 1 tensors that their files lack, among them model.extra"]
    if case == "pickled":
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"x")
        return ["pytorch_model.bin: pickled weights are not read", "save_pretrained"]
    if case == "cut off":
        whole = (folder / "model-mtp.safetensors").read_bytes()
        (folder / "model-mtp.safetensors").write_bytes(whole[:-10])
        return ["model-mtp.safetensors: cannot be read as safetensors", "is cut off"]
    if case == "quantised":
        tensors = load_file(folder / "model-mtp.safetensors")
        key = f"model.layers.{native.L}.eh_proj.weight"
        tensors[key] = tensors[key].to(torch.float8_e4m3fn)
        save_file(tensors, folder / "model-mtp.safetensors", metadata={"format": "pt"})
        return ["MTP heads are quantised", "float8_e4m3fn", "beside a quantised base"]
    assert case == "no config"
    (folder / "config.json").unlink()
    return ["config.json: cannot be read as a checkpoint's config: no such file"]


@pytest.mark.parametrize(
    "case",
    [
        "unknown family",
        "none",
        "no tensors",
        "not declared",
        "too few",
        "no shard",
        "index",
        "index names more",
        "pickled",
        "cut off",
        "quantised",
        "no config",
    ],
)
def test_broken_checkpoints_are_refused_in_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: heads that are skipped without a word, or half of a directory left behind."""
    expected = broken(case, tmp_path / "checkpoint")
    capsys.readouterr()
    assert main(["import", str(tmp_path / "checkpoint"), "-o", str(tmp_path / "run")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert all(words in lines[0] for words in expected), lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_an_output_that_exists_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: someone's directory written into or deleted."""
    native.native_checkpoint("glm4moe", tmp_path / "checkpoint")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("x")
    assert main(["import", str(tmp_path / "checkpoint"), "-o", str(tmp_path / "run")]) == 2
    assert "exists; choose another output" in capsys.readouterr().err
    assert files(tmp_path / "run") == {"mine": b"x"}


def peak(work: Callable[[], object]) -> int:
    """Bytes of memory that the process had more at its highest point in `work` than before."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the highest point
    status = Path("/proc/self/status")

    def bytes_of(key: str) -> int:
        return int(next(line for line in status.read_text().splitlines() if line.startswith(key)).split()[1]) * 1024

    before = bytes_of("VmRSS")
    work()
    return bytes_of("VmHWM") - before


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_tensors_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a checkpoint that is read into memory: the peak has to stay far below its size."""
    folder = tmp_path / "checkpoint"
    native.native_checkpoint("transformers", folder)
    tensors = {name: tensor.load() for name, tensor in Checkpoint(folder).tensors.items()}
    # A head of 115 MB in shards of 40 MB: its layer's tensors are wide, not deep.
    wide = {key: torch.ones(300_000, native.D) for key in tensors if f"layers.{native.L}.mlp" in key}
    for file in folder.glob("model*"):
        file.unlink()
    write_sharded(folder, {name: stored(wide.get(name, tensor)) for name, tensor in tensors.items()}, limit=4 * 10**7)
    del wide
    assert len(list(folder.glob("*.safetensors"))) >= 3
    monkeypatch.setattr("mtpd.formats.tensors.CHUNK", 2**20)
    grown = peak(lambda: import_heads(str(folder), tmp_path / "run"))
    written = (tmp_path / "run" / "heads" / "model.safetensors").stat().st_size
    assert written > 110e6
    assert grown < 35e6, f"{grown / 1e6:.0f} MB for {written / 1e6:.0f} MB"
    grown = peak(lambda: write_sharded(tmp_path, Checkpoint(folder).tensors, limit=4 * 10**7))
    assert grown < 35e6, f"{grown / 1e6:.0f} MB"
