"""Models as people have them: adapters, pickled weights, tokenizers and contexts of other sizes."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from mtpd.cli import main
from mtpd.data import builtin_models
from mtpd.data.models import context_of, load_model, real_tokens, trunk_fingerprint
from mtpd.data.prompts import Prompt, render
from mtpd.errors import UserError
from mtpd.recipe import parse_recipe
from mtpd.run.check import check_recipe
from mtpd.run.session import check_row_length, with_fitting_defaults
from mtpd.trunk import Trunk

TEXT = torch.arange(40).view(2, 20)


def load(name: str | Path, **options: Any) -> tuple[Any, Any]:
    return load_model(str(name), dtype="float32", device="cpu", **options)


def refused(name: str | Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    for part in load("tiny"):
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def randomised(model: Any, **options: Any) -> Any:
    """A model with a LoRA adapter that changes what it computes, and an output head trained as a whole."""
    options = {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["lm_head"], **options}
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                # An adapter starts from random numbers of its own.
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1
                parameter.copy_(noise if "lora_" in name else parameter + noise)
    return wrapped.eval()


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    randomised(load(saved)[0]).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_is_merged_into_its_base(
    saved: Path, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Fault: an adapter that is read as its base alone, or without the modules that were trained as a whole."""
    plain, _ = load(saved)
    with torch.no_grad():
        base = plain(TEXT).logits
        wanted = randomised(plain)(TEXT).logits
    model, tokenizer = load(adapter)
    with torch.no_grad():
        found = model(TEXT).logits
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (found - base).abs().max() > 0.1
    assert f"model {adapter}: is an adapter for {saved}; the two are merged in memory" in caplog.text
    assert tokenizer.chat_template
    Trunk(model, tokens=real_tokens(model, tokenizer)).check()
    assert not any("lora" in name or parameter.requires_grad for name, parameter in model.named_parameters())
    # Saved as one model it is the same trunk, so that its heads go on with it.
    model.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    assert trunk_fingerprint(load(tmp_path / "merged")[0]) == trunk_fingerprint(model)


def test_the_base_of_an_adapter_may_lie_elsewhere(saved: Path, adapter: Path, tmp_path: Path) -> None:
    """Fault: an adapter that was trained on another machine, and whose base cannot be named."""
    with torch.no_grad():
        wanted = load(adapter)[0](TEXT).logits
    moved = saved.rename(tmp_path / "moved")
    message = refused(adapter)
    assert "is an adapter for" in message
    assert "model_base" in message
    check_recipe(parse_recipe({"model": str(adapter), "model_base": str(moved), "output": str(tmp_path / "run")}))
    with torch.no_grad():
        assert torch.equal(load(adapter, base=str(moved))[0](TEXT).logits, wanted)
    assert context_of(str(adapter), base=str(moved)) == 1024
    assert load(adapter, base=str(moved), config_only=True)[0].device.type == "meta"
    assert "model_base: tiny is not accepted, since model tiny is no adapter" in refused("tiny", base="tiny")


def test_an_adapter_with_further_tokens(saved: Path, tmp_path: Path) -> None:
    """Fault: tokens that a fine-tune has added are lost, or its embedding does not fit the base."""
    model, tokenizer = load(saved)
    tokenizer.add_tokens(["<tool>", "</tool>"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    wrapped = randomised(model, modules_to_save=["embed_tokens", "lm_head"])
    with torch.no_grad():
        wanted = wrapped(TEXT + 221).logits
    wrapped.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    merged, own = load(tmp_path / "adapter")
    assert own("<tool>")["input_ids"] == [259]
    with torch.no_grad():
        assert (merged(TEXT + 221).logits - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert load(tmp_path / "adapter", config_only=True)[0].get_input_embeddings().weight.shape[0] == 261
    assert load(tmp_path / "adapter", empty=True)[0].get_input_embeddings().weight.shape[0] == 261


def test_adapters_that_cannot_be_merged(saved: Path, adapter: Path, tmp_path: Path) -> None:
    """Fault: an adapter that is loaded in part, or not at all, without a word."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    some = {name: tensor for name, tensor in tensors.items() if "layers.1" not in name}
    save_file(some, adapter / "adapter_model.safetensors")
    assert "does not fit" in refused(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    assert "is an adapter without weights" in refused(adapter)
    torch.save(tensors, adapter / "adapter_model.bin")
    message = refused(adapter)
    run_command(message)
    assert load(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    assert "does not say for which model" in refused(adapter)
    (adapter / "adapter_config.json").write_text("{")
    assert "adapter_config.json cannot be read" in refused(adapter)
    prompts = get_peft_model(load(saved)[0], PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    prompts.save_pretrained(tmp_path / "prompts")
    assert "is an adapter of kind PROMPT_TUNING, which cannot be merged" in refused(tmp_path / "prompts")


def run_command(message: str) -> None:
    """Runs the command that a refusal ends with."""
    words = shlex.split(message[message.index("python -c ") :])
    subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True, timeout=240)


def test_pickled_weights_come_with_the_command_that_converts_them(saved: Path) -> None:
    """Fault: something is unpickled, or the user is told a command that does not do it."""
    weights = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    torch.save(weights, saved / "pytorch_model.bin")
    message = refused(saved)
    assert "has pickled weights alone (pytorch_model.bin), which are not read" in message
    run_command(message)
    found = load(f"{saved}-safetensors")[0]
    assert trunk_fingerprint(found) == trunk_fingerprint(load("tiny")[0])


def test_a_tokenizer_may_have_more_tokens_than_the_model(saved: Path) -> None:
    """Fault: a text model that was cut out of a larger one is refused, or one of its other tokens is a crash."""
    tokenizer = builtin_models.tiny_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(saved)
    model, found = load(saved)
    assert real_tokens(model, found) == 259
    render(found, Prompt("one", [{"role": "user", "content": "What is this?"}]))
    said = "text has token 259 \\('<image>'\\).*embeds 259 tokens"
    with pytest.raises(UserError, match=said):
        render(found, Prompt("one", [{"role": "user", "content": "What is <image>?"}]))
    with pytest.raises(UserError, match=said):
        found(["text", "<image>"], return_tensors="pt", padding=True)
    with pytest.raises(UserError, match=said):
        found.encode("<image>")


def short(saved: Path, context: int) -> Path:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "max_position_embeddings": context}))
    return saved


def test_rows_are_as_long_as_a_short_context(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fault: a default that the model cannot have is refused as if the user had chosen it, or a choice is changed."""
    short(saved, 128)
    fitted = with_fitting_defaults(parse_recipe({"model": str(saved)}))
    assert (fitted.data.row_length, fitted.data.max_new_tokens, fitted.evaluation.max_new_tokens) == (128, 64, 64)
    assert "has a context of 128 tokens: data.row_length=128, data.max_new_tokens=64" in caplog.text
    assert with_fitting_defaults(fitted) == fitted, "a resumed run has another recipe"
    own = parse_recipe({"model": str(saved), "data": {"max_new_tokens": 100}})
    assert with_fitting_defaults(own).data.max_new_tokens == 100
    trunk = Trunk(load(saved)[0])
    chosen = parse_recipe({"model": str(saved), "data": {"row_length": 512}})
    assert with_fitting_defaults(chosen) is chosen
    with pytest.raises(UserError, match="data.row_length: 512 is longer than the context"):
        check_row_length(chosen, trunk)
    short(saved, 4096)
    long = parse_recipe({"model": str(saved)})
    assert with_fitting_defaults(long) is long


def test_a_run_with_an_adapter_of_a_short_context(
    saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Fault: steps of a run that know of no adapter, or of other rows than its recipe says."""
    randomised(load(short(saved, 96))[0]).save_pretrained(tmp_path / "adapter")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {n} and {n}?"}) + "\n" for n in range(12)))
    words = [f"model={tmp_path / 'adapter'}", f"output={tmp_path / 'run'}", f"data.prompts={prompts}", "data.limit=6"]
    words += ["data.held_out_count=2", "train.max_steps=2", "evaluation.decode_prompts=0", "evaluation.prompts_limit=2"]
    words += ["device=cpu", "dtype=float32"]
    assert main(["distill", *words, "--dry-run"]) == 0
    assert main(["distill", *words]) == 0
    assert "the two are merged in memory" in capfd.readouterr().err
    assert "row_length: 96" in (tmp_path / "run" / "recipe.yaml").read_text()
    assert main(["distill", *words]) == 0
    assert main(["generate", str(tmp_path / "run"), "--prompt", "What?", "--max-new-tokens", "4"]) == 0
    capfd.readouterr()
    assert main(["export", str(tmp_path / "run"), "--to", "transformers", "-o", str(tmp_path / "out")]) == 2
    assert "holds an adapter" in capfd.readouterr().err
