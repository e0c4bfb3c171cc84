"""Quantised checkpoints as trunk and teacher: what heads see of them is what they compute with."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import native_checkpoints as native
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mtpd import quantised
from mtpd.cli import main
from mtpd.data.builtin_models import tiny
from mtpd.data.models import load_model, real_tokens, trunk_fingerprint
from mtpd.decode.greedy import generate
from mtpd.errors import UserError
from mtpd.formats.importing import exclude_from_quantisation
from mtpd.trunk import Trunk


class Int8Linear(nn.Module):
    """A linear layer that keeps whole numbers and a scale for each row, in buffers, as several libraries do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.abs().amax(1) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("numbers", torch.round(linear.weight / scale[:, None]).to(torch.int8))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def worth(self) -> Tensor:
        return self.numbers.float() * self.scale[:, None]  # type: ignore[operator, no-any-return]

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, self.worth().to(inputs.dtype), self.bias)


def int8_trunk(name: str) -> Trunk:
    """A model whose every linear layer is quantised, the output head too."""
    model = copy.deepcopy(architectures.tiny_trunk(name).model)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            with torch.no_grad():
                model.set_submodule(path, Int8Linear(module))
    return Trunk(model, tokens=architectures.TOKENS)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_heads_see_what_a_quantised_trunk_computes_with(name: str) -> None:
    """Fault: packed numbers copied into heads as weights, a bias counted twice, or a teacher without its scales."""
    trunk = int8_trunk(name)
    assert trunk.quantised
    trunk.check()
    head: Any = trunk.model.get_output_embeddings()
    assert torch.allclose(trunk.unembedding.weight, head.worth(), atol=1e-6)
    ids = torch.arange(3, 20)[None]
    logits = trunk.model(input_ids=ids).logits
    assert torch.allclose(trunk.unembedding(trunk.hidden(ids)), logits, atol=1e-4)
    heads = architectures.new_heads(trunk, "copy_last_k", depth=2)
    for number, each in enumerate(heads.layers):  # type: ignore[arg-type]
        layer: Any = trunk.decoder.layers[trunk.depth - 2 + number]
        for path, module in each.block.layers[0].named_modules():
            if isinstance(module, nn.Linear):
                own = layer.get_submodule(path)
                assert torch.allclose(module.weight, own.worth(), atol=1e-6), path
                assert (module.bias is None) == (own.bias is None)
                assert own.bias is None or torch.equal(module.bias, own.bias)
    prompt = torch.tensor([5, 9, 30, 11])
    text = generate(trunk, heads, prompt, max_new_tokens=12)[0]
    plain = trunk.model.generate(prompt[None], max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
    assert text[: len(plain)] == plain


def test_ordinary_models_are_not_called_quantised() -> None:
    """Fault: a model of ordinary weights asked for its products, which takes a moment for each layer."""
    for name in ("llama", "qwen2", "granite", "qwen3_moe"):
        assert not architectures.tiny_trunk(name).quantised


def _bitsandbytes(four: bool) -> Any:
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if four else {"load_in_8bit": True}
    return transformers.BitsAndBytesConfig(**settings)


def _torchao() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return transformers.TorchAoConfig(Int8WeightOnlyConfig())


LIBRARIES: dict[str, tuple[str, Callable[[], Any]]] = {
    "bitsandbytes nf4": ("bitsandbytes", lambda: _bitsandbytes(True)),
    "bitsandbytes int8": ("bitsandbytes", lambda: _bitsandbytes(False)),
    "torchao int8": ("torchao", _torchao),
}


def absent(package: str) -> bool:
    return importlib.util.find_spec(package) is None


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """`tiny` as a checkpoint."""
    model, tokenizer = tiny()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("library", LIBRARIES)
def test_checkpoints_of_libraries_load(library: str, checkpoint: Path, tmp_path: Path) -> None:
    """Fault: a checkpoint that transformers loads, and mtpd casts, refuses, or gives another fingerprint each time."""
    package, config = LIBRARIES[library]
    if absent(package):
        pytest.skip(f"{package} is not installed")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config(), dtype=torch.float32)
    model.save_pretrained(tmp_path / "quantised")
    load_model(str(checkpoint))[1].save_pretrained(tmp_path / "quantised")
    prints = set()
    for _ in range(2):
        loaded, tokenizer = load_model(str(tmp_path / "quantised"), dtype="float32", device="cpu")
        prints.add(trunk_fingerprint(loaded))
    trunk = Trunk(loaded, tokens=real_tokens(loaded, tokenizer))
    assert trunk.quantised
    assert len(prints) == 1
    trunk.check()
    ids = torch.arange(40, 60)[None]
    layer: Any = loaded.get_decoder().layers[0].mlp.up_proj
    inputs = torch.randn(3, layer.in_features)
    product = inputs @ quantised.matrix(layer, dtype=torch.float32, device=trunk.device).T
    assert torch.allclose(product, layer(inputs), atol=2e-2 * product.abs().max().item())
    assert trunk.hidden(ids).isfinite().all()


def test_what_transformers_cannot_load_is_named(checkpoint: Path) -> None:
    """Fault: a traceback, or an error that names neither the way of quantising nor the package."""
    settings = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
    native.edit_config(checkpoint, quantization_config=settings)
    if not absent("gptqmodel"):
        pytest.skip("gptqmodel is installed")
    with pytest.raises(UserError, match=r"quantised \(awq\).*gptqmodel.*in 16 bits or as a \.gguf file"):
        load_model(str(checkpoint), device="cpu")


def test_a_run_on_an_fp8_checkpoint_goes_back_into_it(checkpoint: Path, tmp_path: Path) -> None:
    """Fault: packed weights changed by an export, or heads that a loader takes for FP8."""
    tensors = load_file(checkpoint / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name], tensors[f"{name}_scale_inv"] = native.in_blocks(tensors[name].float(), 32, 32)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    native.edit_config(checkpoint, quantization_config=settings)
    run, out = tmp_path / "run", tmp_path / "out"
    words = ["distill", f"model={checkpoint}", f"output={run}", "heads.depth=2", "data.limit=8", "device=cpu"]
    words += ["data.max_new_tokens=12", "train.max_steps=2", "evaluation.prompts_limit=4", "heads.vocabulary=0"]
    words += ["evaluation.max_new_tokens=8", "evaluation.decode_prompts=1"]
    assert main(words) == 0
    assert main(["export", str(run), "--to", "hf-mtp", "-o", str(out)]) == 0
    assert (out / "model-base.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    layers = json.loads((checkpoint / "config.json").read_text())["num_hidden_layers"]
    excluded = json.loads((out / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert excluded == [f"model.layers.{layers}", f"model.layers.{layers + 1}"]
    heads = load_file(out / "model-mtp.safetensors")
    assert {tensor.dtype for tensor in heads.values()} <= set(quantised.FLOATS)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, trust_remote_code=True).eval()
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    prompt = torch.tensor([[72, 101, 108, 108, 111]])
    drafted = model.generate(prompt, custom_generate=str(out), trust_remote_code=True, **settings)
    assert drafted.tolist() == model.generate(prompt, use_mtp=False, **settings).tolist()


def test_all_of_a_head_is_left_out_of_compressed_tensors() -> None:
    """Fault: a name that means the head's layer alone, and not the matrices in it."""
    config: dict[str, Any] = {"quantization_config": {"quant_method": "compressed-tensors", "ignore": ["lm_head"]}}
    exclude_from_quantisation(config, ["model.layers.3"])
    head, rest = sorted(config["quantization_config"]["ignore"], reverse=True)
    assert rest == "lm_head"
    pattern = head.removeprefix("re:")
    assert pattern != head
    assert re.match(pattern, "model.layers.3.mlp.up_proj")
    assert not re.match(pattern, "model.layers.30.mlp.up_proj")
    if not absent("compressed_tensors"):
        from compressed_tensors.utils.match import match_name

        assert match_name("model.layers.3.eh_proj", head)
