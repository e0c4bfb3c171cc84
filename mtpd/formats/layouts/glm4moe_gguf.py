"""A GGUF file of a Llama, Qwen2 or Qwen3 with a block of heads in it, in GLM-4.5's form, for llama.cpp.

llama.cpp drafts with the state that heads read in a few architectures alone, and with one block, which it uses for
every draft. GLM-4.5 is one of them, and its layers may be all dense: a base is then written with other names, and in a
Llama the rows of queries and keys are in another order. Quantised tensors stay what they are, bit for bit.

The block has experts in GLM-4.5. Its MLP is cut along its width: one half is the shared expert, the other the only
routed one, which a router of zeros takes with weight 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from mtpd.errors import MtpdError, UserError
from mtpd.formats.exported_run import Run
from mtpd.formats.families.glm4_moe import FAMILY
from mtpd.formats.layer_names import Tensors
from mtpd.formats.layout import Layout
from mtpd.formats.tensors import Stored, cast, computed, part, stored
from mtpd.formats.to_family import as_family

FILE = "model.gguf"
ARCHITECTURE = "glm4moe"
BASES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Architectures of GGUF files by the base's type."""

TENSORS = re.compile(
    r"token_embd\.weight|output(_norm)?\.weight|blk\.\d+\.(attn_norm|attn_[qkv]|attn_output|attn_[qk]_norm|ffn_norm|"
    r"ffn_gate|ffn_down|ffn_up)\.weight|blk\.\d+\.attn_[qkv]\.bias"
)
"""Tensors of a base that GLM-4.5 has a place for."""
ROTATED = re.compile(r"blk\.\d+\.attn_([qk])\.(weight|bias)")
SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
"""Keys of a GGUF file that are the base's, and how its config calls them."""

FORMATS = {
    torch.float32: gguf.GGMLQuantizationType.F32,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
}


@dataclass(frozen=True)
class Base:
    """The GGUF file of a base.

    Raises:
        UserError: it cannot be read, or is one part of several.
    """

    path: Path

    @cached_property
    def reader(self) -> gguf.GGUFReader:
        try:
            found = gguf.GGUFReader(self.path)
        except (OSError, ValueError) as error:
            raise UserError(f"--base: {self.path} cannot be read as a GGUF file: {error}") from error
        if found.get_field(gguf.Keys.Split.LLM_KV_SPLIT_COUNT):
            raise UserError(f"--base: {self.path} is one part of several; join them with llama-gguf-split --merge")
        return found

    @property
    def architecture(self) -> str:
        return str(self.whole(gguf.Keys.General.ARCHITECTURE))

    def whole(self, key: str) -> Any:
        field = self.reader.get_field(key)
        return None if field is None else field.contents()

    def value(self, key: str) -> Any:
        """The value of an architecture's key, or None."""
        return self.whole(f"{self.architecture}.{key}")


def refused(run: Run) -> str | None:
    if run.gguf is None:
        return "heads are written into a GGUF file of the base, quantised or not; give one: --base model.gguf"
    if not run.recycles:
        return (
            f"llama.cpp uses one block for every draft, and the run has {run.blocks} different ones; accepted: "
            "--depth 1, or heads trained with heads.shared=true"
        )
    if run.model_type not in BASES or run.base.text_config is not run.base.config:
        return f"the base is {run.model_type}; accepted: {', '.join(BASES)}"
    base, config = Base(run.gguf), run.base.text_config
    if base.architecture != BASES[run.model_type]:
        return f"--base: {run.gguf} holds a {base.architecture}, and the heads are of a {run.model_type}"
    for key, name in SIZES.items():
        if base.value(key) != config[name]:
            return f"--base: {run.gguf} has {key} {base.value(key)}, and the heads' base {name}: {config[name]}"
    if odd := next((each.name for each in base.reader.tensors if not TENSORS.fullmatch(each.name)), None):
        return f"--base: {run.gguf} has a tensor {odd}, for which GLM-4.5's form has no place; accepted: vLLM's layouts"
    if window := base.value("attention.sliding_window"):
        return f"--base: {run.gguf} has a sliding window of {window}, and GLM-4.5's form has none"
    return None


def write(run: Run, folder: Path) -> None:
    assert run.gguf is not None, "refused says so"
    base = Base(run.gguf)
    writer = gguf.GGUFWriter(folder / FILE, ARCHITECTURE)
    _write_keys(run, base, writer)
    # Sizes come before all contents in the file, and contents are in memory one by one.
    later: list[Callable[[], NDArray[Any]]] = []
    for tensor in base.reader.tensors:
        data, kind = tensor.data, tensor.tensor_type
        writer.add_tensor_info(renamed(tensor.name), list(data.shape), data.dtype, data.nbytes, raw_dtype=kind)
        later.append(partial(_rows, tensor, _order(run, base, tensor)))
    for name, piece in block(run).items():
        data, kind = _array(piece), FORMATS[piece.dtype]
        writer.add_tensor_info(name, list(data.shape), data.dtype, data.nbytes, raw_dtype=kind)
        later.append(partial(_array, piece))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for array in later:
        writer.write_tensor_data(array())
    writer.close()


def _write_keys(run: Run, base: Base, writer: gguf.GGUFWriter) -> None:
    """What the block needs, and what the base's file says, tokenizer and all, under the other architecture."""
    writer.add_block_count(run.base.layers + 1)
    writer.add_nextn_predict_layers(1)
    writer.add_leading_dense_block_count(run.base.layers)
    writer.add_expert_count(1)
    writer.add_expert_used_count(1)
    writer.add_expert_shared_count(1)
    writer.add_expert_feed_forward_length(run.base.text_config["intermediate_size"] // 2)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(True)
    own = {*writer.kv_data[0], gguf.Keys.General.ALIGNMENT}
    for field in base.reader.fields.values():
        name = re.sub(rf"^{re.escape(base.architecture)}\.", f"{ARCHITECTURE}.", field.name)
        if name in own or name.startswith("GGUF."):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=inner)


def renamed(name: str) -> str:
    return name.replace(".ffn_norm.", ".post_attention_norm.")


def block(run: Run) -> Tensors:
    """The block's tensors by their names in the file, matrices in the heads' number format and vectors in float32."""
    layer = run.base.layers
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GLM4_MOE, layer + 1)
    found: Tensors = {}
    for name, tensor in as_family(run.heads(1), FAMILY, heads=1, layers=layer, model_type=run.model_type).items():
        for written, piece in _halves(name, tensor).items():
            known = names.get_name(written, try_suffixes=(".weight", ".bias"))
            assert known is not None, f"GLM-4.5 has {written}"
            found[known] = piece if len(piece.shape) > 1 else cast(piece, torch.float32)
    prefix = f"blk.{layer}"
    found[f"{prefix}.ffn_gate_inp.weight"] = stored(torch.zeros(1, run.hidden_size))
    found[f"{prefix}.exp_probs_b.bias"] = stored(torch.zeros(1))
    return found


def _halves(name: str, weight: Stored) -> Tensors:
    """A matrix of the MLP as the shared expert's and the routed one's; any other as it is."""
    if ".mlp." not in name:
        return {name: weight}
    shared, routed = (name.replace(".mlp.", f".mlp.{kind}.") for kind in ("shared_experts", "experts"))
    rows, columns = weight.shape
    if name.endswith("down_proj.weight"):
        half = columns // 2
        return {
            shared: computed(weight, lambda matrix: matrix[:, :half], (rows, half)),
            routed: computed(weight, lambda matrix: matrix[:, half:], (1, rows, half)),
        }
    half = rows // 2
    return {
        shared: part(weight, 0, (half, columns)),
        routed: part(weight, half * columns, (1, half, columns)),
    }


def _rows(tensor: gguf.ReaderTensor, order: slice | NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(tensor.data[order])


def _array(tensor: Stored) -> NDArray[Any]:
    """As the `gguf` package takes it: bfloat16 as bytes."""
    found = tensor.load().contiguous()
    return np.asarray((found.view(torch.uint8) if found.dtype == torch.bfloat16 else found).numpy())


def _order(run: Run, base: Base, tensor: gguf.ReaderTensor) -> slice | NDArray[Any]:
    """The rows of a base's tensor in the order of GLM-4.5's form, which rotates halves of a head.

    llama.cpp's Llama rotates neighbours, and its files have row i of a head's first half at 2 i and that of the second
    at 2 i + 1.
    """
    found = ROTATED.fullmatch(tensor.name)
    if base.architecture != "llama" or found is None:
        return slice(None)
    config = run.base.text_config
    heads = config["num_attention_heads"]
    if found[1] == "k":
        heads = config.get("num_key_value_heads") or heads
    rows = np.arange(tensor.data.shape[0])
    return rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def checked(run: Run, folder: Path) -> str:
    """Reads the file back: the base's tensors byte for byte, and the block by value.

    Raises:
        MtpdError: naming what differs.
    """
    assert run.gguf is not None, "refused says so"
    base = Base(run.gguf)
    written = {tensor.name: tensor for tensor in Base(folder / FILE).reader.tensors}
    for tensor in base.reader.tensors:
        found = written.pop(renamed(tensor.name))
        order = _order(run, base, tensor)
        same = np.empty_like(found.data)
        same[order] = found.data
        if found.tensor_type != tensor.tensor_type or not np.array_equal(same, tensor.data):
            raise MtpdError(f"export glm4moe-gguf: {tensor.name} was not written as it is in {run.gguf}")
    for name, piece in block(run).items():
        if name not in written or not np.array_equal(written.pop(name).data, _array(piece)):
            raise MtpdError(f"export glm4moe-gguf: {name} was not written as it is in {run.path}")
    if written:
        raise MtpdError(f"export glm4moe-gguf: {next(iter(written))} was written, which neither heads nor base have")
    return f"every tensor read back, those of the base as they are in {run.gguf}"


LAYOUT = Layout(
    "glm4moe-gguf",
    "one GGUF file of the base with a block of heads in it, which llama.cpp uses for every draft, in GLM-4.5's form",
    refused,
    write,
    {"llama.cpp": "llama-server -m {out}/" + FILE + " --spec-type draft-mtp --spec-draft-n-max {k}"},
    rank=20,
    checked=checked,
)
