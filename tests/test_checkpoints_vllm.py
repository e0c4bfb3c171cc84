"""Different heads for stock vLLM: a draft directory in HY-V3's layout, what vLLM is told, and what is refused."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import architectures
import native_checkpoints as native
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from test_checkpoints_export import finished_run
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mtpd.cli import main
from mtpd.formats.export import export
from mtpd.formats.exported_run import open_run
from mtpd.formats.layouts import LAYOUTS
from mtpd.heads import load_heads
from mtpd.trunk import Trunk

DEPTH = 3
CONFIGS = {
    "llama": transformers.LlamaConfig(**architectures.SIZES, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**architectures.SIZES, sliding_window=None),
    "qwen3": transformers.Qwen3Config(**architectures.SIZES, head_dim=8),
}


def base(name: str) -> Trunk:
    """A random model whose gains are uneven."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.25 if parameter.ndim > 1 else 0.3) + (parameter.ndim == 1))
    return Trunk(model)


def as_hyv3(trunk: Trunk, folder: Path, ids: Tensor) -> list[Tensor]:
    """Logits of each depth as vLLM's HYV3MTP computes them out of the files, but for the embedding at position 0."""
    tensors = load_file(folder / "model.safetensors")
    model: Any = trunk.model
    config = json.loads((folder / "config.json").read_text())
    first, eps = config["num_hidden_layers"], config["rms_norm_eps"]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        module = LlamaRMSNorm(len(weight), eps=eps)
        module.weight.data = weight
        return module(x)

    positions = torch.arange(ids.shape[1])[None]
    mask = torch.full((1, 1, ids.shape[1], ids.shape[1]), float("-inf")).triu(1)
    state, found = trunk.hidden(ids, position_ids=positions), []
    for depth in range(config["num_nextn_predict_layers"]):
        own = {
            name.removeprefix(f"model.layers.{first + depth}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"model.layers.{first + depth}.")
        }
        mixing = {name: own.pop(f"{name}.weight") for name in ("enorm", "hnorm", "eh_proj", "final_layernorm")}
        block = copy.deepcopy(model.model.layers[0])
        block.load_state_dict(own)
        embedded = model.model.embed_tokens(torch.roll(ids, -1 - depth, dims=1))
        mixed = torch.cat([norm(embedded, mixing["enorm"]), norm(state, mixing["hnorm"])], dim=-1)
        x = linear(mixed, mixing["eh_proj"])
        angles = model.model.rotary_emb(x, positions)
        x = block(x, attention_mask=mask, position_ids=positions, position_embeddings=angles)
        state = norm(x, mixing["final_layernorm"])
        found.append(model.lm_head(state))
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_different_heads_go_to_vllm_and_back(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a block under another depth's number, halves or norms confused, the base's config not told of a block."""
    trunk = base(name)
    run = finished_run(tmp_path, trunk, architectures.random_heads(trunk, depth=DEPTH))
    out = tmp_path / "out"
    assert main(["export", str(run), "--to", "vllm", "-o", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert re.search(r"layout hyv3-draft.*read back by mtpd, every tensor of the heads", said[-3])
    assert said[-2] == f"VLLM_USE_V2_MODEL_RUNNER=1 vllm serve --config {out}/vllm.yaml"
    assert said[-1].startswith("curl http://localhost:8000/v1/completions")
    told = {"num_nextn_predict_layers": DEPTH, "first_k_dense_replace": 6} | (
        {"qk_norm": True} if name == "qwen3" else {}
    )
    assert yaml.safe_load((out / "vllm.yaml").read_text()) == {
        "model": str(tmp_path / "base"),
        "hf-overrides": told,
        "speculative-config": {"method": "mtp", "model": str(out), "num_speculative_tokens": DEPTH},
    }
    config = json.loads((out / "config.json").read_text())
    assert {key: config[key] for key in told} == told
    assert (config["model_type"], config["architectures"]) == ("hy_v3", ["HYV3ForCausalLM"])
    assert (config["num_hidden_layers"], config["head_dim"], config["tie_word_embeddings"]) == (3, 8, False)
    with torch.no_grad():
        ids = architectures.random_tokens(1, 14)
        states = load_heads(run / "heads", trunk)(trunk, trunk.hidden(ids), ids, position_ids_BT=torch.arange(14)[None])
        for depth, (state, theirs) in enumerate(zip(states, as_hyv3(trunk, out, ids), strict=True), start=1):
            ours = trunk.unembedding(state)
            torch.testing.assert_close(theirs[:, :-depth], ours[:, :-depth], rtol=1e-4, atol=1e-4)
    assert main(["import", str(out), "--base", str(tmp_path / "base"), "-o", str(tmp_path / "again")]) == 0
    first, again = open_run(run), open_run(tmp_path / "again")
    assert again.tensors.keys() == first.tensors.keys()
    assert all(torch.equal(tensor.load(), first.tensors[key].load()) for key, tensor in again.tensors.items())


def test_a_shared_block_is_written_for_every_depth(tmp_path: Path) -> None:
    """Fault: one block where vLLM builds several, which it would then leave at random numbers."""
    trunk = base("llama")
    run = finished_run(tmp_path, trunk, architectures.random_heads(trunk, depth=2, shared=True))
    export(run, tmp_path / "out", to="hyv3-draft")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    first = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.3.")}
    assert len(tensors) == 2 * len(first)
    for name, tensor in first.items():
        assert torch.equal(tensors[name.replace("layers.3", "layers.4")], tensor)


def test_one_head_needs_no_other_runner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a CPU refused for a single head, which its runner drafts right; a path with a space in a command."""
    trunk = base("llama")
    run = finished_run(tmp_path, trunk, architectures.random_heads(trunk, depth=2))
    out = tmp_path / "an export"
    assert main(["export", str(run), "--to", "vllm", "--depth", "1", "-o", str(out), "--no-perturb"]) == 0
    assert capsys.readouterr().out.splitlines()[-2] == f"vllm serve --config '{out}'/vllm.yaml"


def test_several_heads_are_not_verified_where_one_would_draft(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: an engine that drafts with the first block at every depth is given a verdict on all of them."""
    trunk = base("llama")
    run = finished_run(tmp_path, trunk, architectures.random_heads(trunk, depth=2))
    out = tmp_path / "out"
    assert main(["export", str(run), "--to", "vllm", "-o", str(out), "--no-perturb"]) == 0
    assert main(["verify", str(out), "--engine", "vllm"]) == 2
    error = capsys.readouterr().err
    assert "--drafts: 2 is not accepted with layout hyv3-draft in vLLM on a CPU" in error


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "biases": ("llama", {"attention_bias": True}, "attention_bias: true, and the layout's block has no biases"),
    "qwen2": ("qwen2", {}, "a qwen2 has biases in its attention.*mimo-draft for one block.*or hf-mtp"),
    "window": ("mistral", {"sliding_window": 16}, "sliding_window: 16, and the layout's block has no window"),
    "qwen's window": ("qwen3", {"sliding_window": 9, "use_sliding_window": True}, "sliding_window: 9"),
    "quantised": ("llama", {"quantization_config": {"quant_method": "awq"}}, r"quantised \(awq\).*a base in 16 bits"),
    "activation": ("llama", {"hidden_act": "gelu"}, "hidden_act: gelu; accepted: silu"),
    "another": ("olmo2", {}, "the base is olmo2; accepted: llama, mistral, qwen3, or hf-mtp"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bases_with_another_layer_are_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a draft model whose blocks vLLM computes otherwise, or a refusal that does not say what else there is."""
    name, changes, expected = REFUSED[case]
    trunk = base(name) if name in CONFIGS else architectures.tiny_trunk(name)
    run = finished_run(tmp_path, trunk, architectures.random_heads(trunk, depth=2))
    native.edit_config(tmp_path / "base", **changes)
    capsys.readouterr()
    assert main(["export", str(run), "--to", "hyv3-draft", "-o", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert re.search(f"--to hyv3-draft: .*{expected}", lines[0]), lines[0]
    assert "hf-mtp" in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_window_that_is_not_used_is_none(tmp_path: Path) -> None:
    """Fault: most Qwen3 refused, because their configs give a window beside `use_sliding_window: false`."""
    trunk = base("qwen3")
    run = finished_run(tmp_path, trunk, architectures.random_heads(trunk, depth=2))
    native.edit_config(tmp_path / "base", sliding_window=9, use_sliding_window=False)
    assert LAYOUTS["hyv3-draft"].refused(open_run(run)) is None


def test_what_vllm_would_read_in_the_base_s_form_is_refused(tmp_path: Path) -> None:
    """Fault: a draft model beside a quantised base, which vLLM builds with quantised layers and cannot load."""
    trunk = base("llama")
    run = finished_run(tmp_path, trunk, architectures.random_heads(trunk, depth=1))
    native.edit_config(tmp_path / "base", quantization_config={"quant_method": "fp8"})
    for name in ("hyv3-draft", "mimo-draft"):
        reason = LAYOUTS[name].refused(open_run(run))
        assert reason is not None
        assert "quantised (fp8)" in reason


DECLARED = {"num_nextn_predict_layers": 1, "mtp_num_hidden_layers": 1, "mtp_layer_types": ["full_attention"]}
"""What a base says that lost its heads, in the words of several families."""


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("hf-mtp", "num_mtp_layers"),
        ("mtpd-vllm", "num_mtp_layers"),
        ("hyv3-draft", "num_nextn_predict_layers"),
        ("mimo-draft", "num_nextn_predict_layers"),
    ],
)
def test_an_export_says_once_how_many_heads_there_are(name: str, key: str, tmp_path: Path) -> None:
    """Fault: new heads beside the number of those that the base declares and lacks; an engine believes either."""
    depth = 1 if name == "mimo-draft" else 2
    trunk = base("llama")
    run = finished_run(tmp_path, trunk, architectures.random_heads(trunk, depth=depth))
    native.edit_config(tmp_path / "base", **DECLARED)
    export(run, tmp_path / "out", to=name)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    said = {key: value for key, value in config.items() if "mtp" in key or "nextn" in key}
    assert said == {key: depth}
    if LAYOUTS[name].apart and name != "mtpd-vllm":
        # The base is served as it is: what it declares is what vLLM is told otherwise.
        told = yaml.safe_load((tmp_path / "out" / "vllm.yaml").read_text())
        assert told["hf-overrides"]["num_nextn_predict_layers"] == depth


def test_grafted_heads_are_declared_once(tmp_path: Path) -> None:
    """Fault: heads put back beside the number that another export has left in the base's config."""
    native.native_checkpoint("glm4moe", tmp_path / "original", count=2)
    native.save_model(native.base_model("glm4moe"), tmp_path / "tuned")
    native.edit_config(tmp_path / "tuned", num_mtp_layers=1, mtp_num_hidden_layers=1)
    words = ["--from", str(tmp_path / "original"), "-o", str(tmp_path / "out")]
    assert main(["graft", str(tmp_path / "tuned"), *words]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    first = json.loads((tmp_path / "original" / "config.json").read_text())
    counts = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
    assert {key: config.get(key) for key in counts} == {key: 2 if key in first else None for key in counts}
    assert config["num_nextn_predict_layers"] == 2
