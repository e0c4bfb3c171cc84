"""Heads that are quantised: read with their scales, exported in 16 bits, and refused where something is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import native_checkpoints as native
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mtpd.cli import main
from mtpd.errors import UserError
from mtpd.formats.directory import Checkpoint
from mtpd.formats.export import export
from mtpd.formats.find_heads import find_heads
from mtpd.formats.importing import import_heads

HEADS = "model-mtp.safetensors"
PREFIX = f"model.layers.{native.L}."
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 24]}


def quantised_checkpoint(folder: Path, form: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A GLM-4.5 checkpoint whose head is quantised. Gives the head's tensors, and what they are worth by hand."""
    native.native_checkpoint("glm4moe", folder)
    if form == "fp8":
        native.edit_config(folder, quantization_config=FP8)
    written, worth = {}, {}
    for name, tensor in load_file(folder / HEADS).items():
        worth[name] = written[name] = tensor
        if not name.endswith("proj.weight"):
            continue
        if form == "fp8":
            numbers, scales = native.in_blocks(tensor, 16, 24)
            written |= {name: numbers, f"{name}_scale_inv": scales}
            worth[name] = torch.tensor(
                [
                    [float(numbers[i, j]) * float(scales[i // 16, j // 24]) for j in range(tensor.shape[1])]
                    for i in range(tensor.shape[0])
                ]
            ).bfloat16()
        else:
            low, high = tensor.amin(1), tensor.amax(1)
            scales = ((high - low) / 254).clamp_min(1e-9)
            zeros = torch.round(-127 - low / scales).to(torch.int8)
            numbers = torch.round(tensor / scales[:, None] + zeros[:, None]).clamp(-127, 127).to(torch.int8)
            written |= {name: numbers, f"{name}_scale": scales[:, None], f"{name}_zero_point": zeros[:, None]}
            worth[name] = torch.stack(
                [scales[i] * (numbers[i].float() - float(zeros[i])) for i in range(len(tensor))]
            ).bfloat16()
    save_file(written, folder / HEADS, metadata={"format": "pt"})
    reindex(folder)
    return written, worth


def reindex(folder: Path) -> None:
    """The index once more, for the tensors that the heads' file has now."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    kept = {name: file for name, file in index["weight_map"].items() if file != HEADS}
    index["weight_map"] = kept | dict.fromkeys(load_file(folder / HEADS), HEADS)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_heads_are_read_with_their_scales(form: str, tmp_path: Path) -> None:
    """Fault: heads of raw FP8 or int8 numbers; a block's scale on its neighbour; zero points or partial blocks lost."""
    original = native.native_checkpoint("glm4moe", tmp_path / "plain")
    _, worth = quantised_checkpoint(tmp_path / "base", form)
    found = find_heads(Checkpoint(tmp_path / "base"))
    assert found.cannot_run is None
    assert set(found.raw) == set(worth)
    for name, tensor in worth.items():
        assert torch.equal(found.raw[name].load(), tensor), name
        assert (tensor.float() - original[name]).abs().max() < 0.05 * original[name].abs().max(), name
    import_heads(str(tmp_path / "base"), tmp_path / "run")
    imported = load_file(tmp_path / "run" / "heads" / "model.safetensors")
    assert torch.equal(imported["layers.0.project.weight"], worth[f"{PREFIX}eh_proj.weight"])
    assert not [name for name, tensor in imported.items() if tensor.dtype in (torch.float8_e4m3fn, torch.int8)]


def spoilt(case: str, folder: Path) -> str:
    """A quantised head with one thing wrong. Gives what the message has to say."""
    quantised_checkpoint(folder, "fp8")
    key = f"{PREFIX}eh_proj.weight"
    tensors = load_file(folder / HEADS)
    if case == "no scale":
        del tensors[f"{key}_scale_inv"]
        expected = r"eh_proj\.weight is float8_e4m3fn\) and .*_scale_inv or .*_scale is missing; accepted: bfloat16"
    elif case == "scale of another shape":
        tensors[f"{key}_scale_inv"] = torch.ones(3, 5)
        expected = r"_scale_inv has the shape \[3, 5\], which does not divide \[32, 64\]"
    else:
        tensors[f"{PREFIX}eh_proj.weight_packed"] = tensors.pop(key).view(torch.int32)
        expected = r"weight_packed is int32\) in a form that is not read; accepted: bfloat16"
    save_file(tensors, folder / HEADS, metadata={"format": "pt"})
    reindex(folder)
    return expected


@pytest.mark.parametrize("case", ["no scale", "scale of another shape", "packed"])
def test_what_cannot_be_read_is_refused(case: str, tmp_path: Path) -> None:
    """Fault: numbers without their scale taken for weights."""
    expected = spoilt(case, tmp_path / "base")
    with pytest.raises(UserError) as refused:
        import_heads(str(tmp_path / "base"), tmp_path / "run")
    assert re.search(expected, str(refused.value)), refused.value
    assert not (tmp_path / "run").exists()


def test_export_writes_16_bits_in_their_place(tmp_path: Path) -> None:
    """Fault: scales left beside 16-bit heads, heads that a loader takes for FP8, or a tensor of the base touched."""
    written, worth = quantised_checkpoint(tmp_path / "base", "fp8")
    assert main(["import", str(tmp_path / "base"), "-o", str(tmp_path / "run")]) == 0
    export(tmp_path / "run", tmp_path / "out", to="in-place")
    out = load_file(tmp_path / "out" / HEADS)
    assert set(out) == set(worth)
    assert all(torch.equal(out[name], tensor) for name, tensor in worth.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {f"{PREFIX}eh_proj", f"{PREFIX}self_attn.q_proj"} <= set(config["modules_to_not_convert"])
    base = "model-base.safetensors"
    assert (tmp_path / "out" / base).read_bytes() == (tmp_path / "base" / base).read_bytes()
    weights = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(weights) == set(load_file(tmp_path / "out" / base)) | set(out)
    assert set(written) - set(out), "there were scales"


def test_heads_beside_an_fp8_base_run(tmp_path: Path) -> None:
    """Fault: the scales of the base's layers taken for tensors that its heads' layer lacks."""
    native.native_checkpoint("glm4moe", tmp_path / "base")
    native.edit_config(tmp_path / "base", quantization_config=FP8 | {"modules_to_not_convert": ["lm_head"]})
    file = tmp_path / "base" / "model-base.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        tensors[name], tensors[f"{name}_scale_inv"] = native.in_blocks(tensors[name], 16, 24)
    save_file(tensors, file, metadata={"format": "pt"})
    heads = dict.fromkeys(load_file(tmp_path / "base" / HEADS), HEADS)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, file.name) | heads}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert find_heads(Checkpoint(tmp_path / "base")).cannot_run is None
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "base").num_parameters() > 0
