"""GGUF files for llama.cpp: the base as it was, under another name, with a block that computes what heads do."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import architectures
import gguf
import numpy as np
import pytest
import torch
from test_checkpoints_export import finished_run
from test_checkpoints_vllm import CONFIGS, base
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

from mtpd.cli import main
from mtpd.formats.layouts.glm4moe_gguf import TENSORS
from mtpd.heads import load_heads
from mtpd.trunk import Trunk

Q8 = gguf.GGMLQuantizationType.Q8_0
WORDS = [f"<{number}>" for number in range(architectures.SIZES["vocab_size"])]


def trunk_of(name: str) -> Trunk:
    return base(name) if name in CONFIGS else architectures.tiny_trunk(name)


def as_llama_cpp(trunk: Trunk, file: Path, *, quantised: bool = False, extra: tuple[str, ...] = ()) -> Path:
    """A model as llama.cpp's own converter writes it: a Llama's queries and keys so that neighbours are rotated."""
    config = trunk.model.config
    kind = {"mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(file, kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    # What a base says of heads that it lacks.
    writer.add_nextn_predict_layers(3)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], config.num_hidden_layers)
    for name, tensor in trunk.model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        if kind == "llama" and (found := re.search(r"\.([qk])_proj\.weight", name)):
            heads = config.num_attention_heads if found[1] == "q" else config.num_key_value_heads
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if quantised and array.ndim > 1 and array.shape[1] % 32 == 0:
            writer.add_tensor(known, gguf.quants.quantize(np.ascontiguousarray(array), Q8), raw_dtype=Q8)
        else:
            writer.add_tensor(known, np.ascontiguousarray(array))
    for name in extra:
        writer.add_tensor(name, np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def tensors_of(file: Path) -> dict[str, Tensor]:
    return {
        tensor.name: torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
        for tensor in gguf.GGUFReader(file).tensors
    }


def layer_from(found: dict[str, Tensor], number: int, *, mlp: dict[str, Tensor]) -> dict[str, Tensor]:
    """A layer of the base's class out of the file of GLM-4.5's form, in which halves of a head are rotated."""
    named = {f"self_attn.{kind}_proj": f"attn_{kind}" for kind in "qkv"}
    named |= {"self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
    named |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm"}
    return {
        f"{ours}.{kind}": found[f"blk.{number}.{theirs}.{kind}"]
        for ours, theirs in named.items()
        for kind in ("weight", "bias")
        if f"blk.{number}.{theirs}.{kind}" in found
    } | mlp


def block_logits(trunk: Trunk, found: dict[str, Tensor], ids: Tensor) -> Tensor:
    """The block's logits as llama.cpp's graph of GLM-4.5 computes them, both experts with weight 1."""
    model: Any = trunk.model
    last, eps = model.config.num_hidden_layers, model.config.rms_norm_eps
    own = {name.removeprefix(f"blk.{last}."): each for name, each in found.items() if name.startswith(f"blk.{last}.")}
    assert not own["ffn_gate_inp.weight"].any()
    mlp = {
        f"mlp.{kind}_proj.weight": torch.cat(
            [own[f"ffn_{kind}_shexp.weight"], own[f"ffn_{kind}_exps.weight"][0]], dim=1 if kind == "down" else 0
        )
        for kind in ("gate", "up", "down")
    }
    layer = copy.deepcopy(model.model.layers[0])
    layer.load_state_dict(layer_from(found, last, mlp=mlp))

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    embedded = norm(model.model.embed_tokens(torch.roll(ids, -1, dims=1)), own["nextn.enorm.weight"])
    mixed = torch.cat([embedded, norm(trunk.hidden(ids), own["nextn.hnorm.weight"])], dim=-1)
    x = linear(mixed, own["nextn.eh_proj.weight"])
    positions = torch.arange(ids.shape[1])[None]
    mask = torch.full((1, 1, ids.shape[1], ids.shape[1]), float("-inf")).triu(1)
    angles = model.model.rotary_emb(x, positions)
    x = layer(x, attention_mask=mask, position_ids=positions, position_embeddings=angles)
    return model.lm_head(norm(x, own["nextn.shared_head_norm.weight"]))


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_base_and_block_compute_what_they_did(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: queries in the order of the other rotation, halves of the block's MLP confused, a key that is missing."""
    trunk = trunk_of(name)
    run = finished_run(tmp_path, trunk, architectures.random_heads(trunk, depth=2, shared=True))
    file, out = as_llama_cpp(trunk, tmp_path / "base.gguf"), tmp_path / "out"
    assert main(["export", str(run), "--to", "llama.cpp", "--base", str(file), "-o", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "layout glm4moe-gguf" in said[-3]
    assert "every tensor read back" in said[-3]
    assert said[-2] == f"llama-server -m {out}/model.gguf --spec-type draft-mtp --spec-draft-n-max 2"
    assert said[-1].startswith("curl http://localhost:8080/v1/completions")
    found = tensors_of(out / "model.gguf")
    config = trunk.model.config
    state = {"model.embed_tokens.weight": found["token_embd.weight"], "model.norm.weight": found["output_norm.weight"]}
    state["lm_head.weight"] = found.get("output.weight", found["token_embd.weight"])
    for number in range(config.num_hidden_layers):
        mlp = {f"mlp.{kind}_proj.weight": found[f"blk.{number}.ffn_{kind}.weight"] for kind in ("gate", "up", "down")}
        layer = layer_from(found, number, mlp=mlp)
        state |= {f"model.layers.{number}.{key}": tensor for key, tensor in layer.items()}
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    model.load_state_dict(state)
    ids = architectures.random_tokens(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, trunk.model(ids).logits)
        heads = load_heads(run / "heads", trunk)
        [state_1, _] = heads(trunk, trunk.hidden(ids), ids, position_ids_BT=torch.arange(12)[None])
        ours, theirs = trunk.unembedding(state_1)[:, :-1], block_logits(trunk, found, ids)[:, :-1]
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    reader = gguf.GGUFReader(out / "model.gguf")
    keys = {key: field.contents() for key, field in reader.fields.items()}
    assert keys["general.architecture"] == "glm4moe"
    assert keys["tokenizer.ggml.tokens"] == WORDS
    layers = config.num_hidden_layers
    expected = {"block_count": layers + 1, "leading_dense_block_count": layers, "nextn_predict_layers": 1}
    expected |= {"expert_count": 1, "expert_used_count": 1, "expert_shared_count": 1, "expert_feed_forward_length": 24}
    assert {key: keys[f"glm4moe.{key}"] for key in expected} == expected
    assert not [key for key in keys if key.startswith(("llama.", "qwen"))]
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 0
    assert "loaded by: llama.cpp" in capsys.readouterr().out


def test_quantised_tensors_stay_what_they_are(tmp_path: Path) -> None:
    """Fault: a base quantised a second time, or rows whose scales are left at other rows."""
    trunk = base("llama")
    run = finished_run(tmp_path, trunk, architectures.random_heads(trunk, depth=1))
    file = as_llama_cpp(trunk, tmp_path / "base.gguf", quantised=True)
    assert main(["export", str(run), "--to", "glm4moe-gguf", "--base", str(file), "-o", str(tmp_path / "out")]) == 0
    before, after = tensors_of(file), tensors_of(tmp_path / "out" / "model.gguf")
    kinds = {each.name: each.tensor_type for each in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    for part, heads in (("q", 4), ("k", 2)):
        name = f"blk.1.attn_{part}.weight"
        assert kinds[name] == Q8
        # As transformers reads a Llama's file.
        rows = before[name].reshape(heads, -1, 2, 32).swapaxes(1, 2).reshape(-1, 32)
        assert torch.equal(after[name], rows)
    assert torch.equal(after["blk.1.ffn_up.weight"], before["blk.1.ffn_up.weight"])


def test_a_run_on_a_gguf_file_is_exported_into_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: the model that a run was trained on asked for once more; a checkpoint written around a GGUF file."""
    trunk = base("llama")
    file = as_llama_cpp(trunk, tmp_path / "model.gguf", quantised=True)
    run = finished_run(tmp_path, trunk, architectures.random_heads(trunk, depth=1), base=file)
    assert main(["export", str(run), "--to", "llama.cpp", "-o", str(tmp_path / "out")]) == 0
    found = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    assert len(found.tensors) > len(gguf.GGUFReader(file).tensors)
    capsys.readouterr()
    assert main(["inspect", str(run)]) == 0
    said = capsys.readouterr().out
    assert "export --to glm4moe-gguf: fits" in said
    assert said.count("no, the base is a file of llama.cpp; accepted: glm4moe-gguf") > 2
    assert main(["export", str(run), "--to", "transformers", "-o", str(tmp_path / "no")]) == 2
    assert not (tmp_path / "no").exists()


REFUSED = {
    "no file": ([], r"give one: --base model\.gguf"),
    "no gguf": (["--base", "{folder}/run/recipe.yaml"], r"recipe\.yaml cannot be read as a GGUF file"),
    "another kind": (["--base", "{folder}/qwen3.gguf"], "holds a qwen3, and the heads are of a llama"),
    "another size": (["--base", "{folder}/wide.gguf"], "has feed_forward_length 64, and .* intermediate_size: 48"),
    "a tensor more": (["--base", "{folder}/rope.gguf"], r"has a tensor rope_freqs\.weight"),
    "different heads": (["--depth", "2", "--base", "{folder}/llama.gguf"], "one block for every draft.*--depth 1"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    trunk = base("llama")
    finished_run(folder, trunk, architectures.random_heads(trunk, depth=2))
    as_llama_cpp(trunk, folder / "llama.gguf")
    as_llama_cpp(trunk, folder / "rope.gguf", extra=("rope_freqs.weight",))
    as_llama_cpp(base("qwen3"), folder / "qwen3.gguf")
    wide = copy.deepcopy(CONFIGS["llama"])
    wide.intermediate_size = 64
    as_llama_cpp(Trunk(AutoModelForCausalLM.from_config(wide).eval()), folder / "wide.gguf")
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_files_of_another_base_are_refused(
    case: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: heads in a file whose graph computes something else, found out in the text that it writes."""
    words, expected = REFUSED[case]
    words = [word.format(folder=files) for word in words]
    capsys.readouterr()
    if "--depth" not in words:
        words += ["--depth", "1"]
    assert main(["export", str(files / "run"), "--to", "llama.cpp", *words, "-o", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert re.search(expected, lines[0]), lines[0]
    assert not (tmp_path / "out").exists()


def test_biases_of_outputs_have_no_place() -> None:
    """Fault: a bias that GLM-4.5's graph does not add, left out without a word."""
    assert TENSORS.fullmatch("blk.7.attn_q.bias")
    assert not TENSORS.fullmatch("blk.7.attn_output.bias")
    assert not TENSORS.fullmatch("blk.7.ffn_up.bias")
