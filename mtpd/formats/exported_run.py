"""A run to export: its heads, and the checkpoint of their base."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from mtpd.errors import UserError
from mtpd.finished_run import open_finished
from mtpd.formats.directory import Checkpoint
from mtpd.formats.find_heads import base_tensor, find_heads
from mtpd.formats.importing import open_checkpoint, without_declarations
from mtpd.formats.layer_names import Tensors
from mtpd.formats.tensors import FLOATS, Stored, cast, computed, read_header
from mtpd.formats.to_family import by_depth
from mtpd.heads import WEIGHTS, check_weights, read_config
from mtpd.heads.adapters import ALPHA
from mtpd.heads.config import HeadsConfig
from mtpd.recipe import Recipe

KEYS = (
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "vocab_size",
)
"""What the config of any decoder says of its layers and special tokens: draft models beside it say it too."""


@dataclass(frozen=True)
class Run:
    """Heads and their base, nothing of them in memory.

    Attributes:
        model: the name of the base.
        depth: how many depths are exported; the heads may have more.
        tensors: those of the blocks, as `mtpd.heads` names and arranges them.
        adapters: those of depths that have an adapter on their block.
    """

    path: Path
    recipe: Recipe
    model: str
    base: Checkpoint
    config: HeadsConfig
    depth: int
    tensors: Tensors
    adapters: Tensors
    gguf: Path | None = None
    """The base once more, as llama.cpp has it."""

    @property
    def blocks(self) -> int:
        """Number of different blocks of the exported depths, adapters counted in."""
        adapters = self.config.adapters or [0] * self.config.depth
        kinds = zip(self.config.block_of, adapters, range(self.config.depth), strict=True)
        return len({(block, depth if rank else -1) for block, rank, depth in list(kinds)[: self.depth]})

    @property
    def recycles(self) -> bool:
        """Whether one block is enough: it is used at every depth, or there is one depth."""
        return self.blocks == 1

    @property
    def written(self) -> int:
        """Number of heads for a layout that has one for each depth, or one for all."""
        return 1 if self.recycles else self.depth

    @property
    def model_type(self) -> str:
        return str(self.base.text_config.get("model_type", ""))

    @property
    def base_has_heads(self) -> bool:
        """Whether the base has MTP heads of its own, of a family that is known."""
        try:
            find_heads(self.base)
        except UserError:
            return False
        return True

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @cached_property
    def dtype(self) -> torch.dtype:
        """Number format of the exported heads: the base's own, or bfloat16 beside a quantised one."""
        embedding = base_tensor(self.base, "embedding")
        known = embedding is not None and embedding.dtype in FLOATS
        return embedding.dtype if embedding is not None and known else torch.bfloat16

    def heads(self, count: int) -> Tensors:
        """The tensors of `count` heads in the export's number format, a shared block written out for each."""
        tensors = by_depth(self.tensors, self.config.block_of[:count])
        for depth, rank in enumerate(self.config.adapters[:count]):
            if rank:
                tensors |= with_adapter(self.adapters, tensors, depth)
        return {name: cast(tensor, self.dtype) for name, tensor in tensors.items()}


def open_run(path: Path, *, depth: int | None = None, gguf: Path | None = None, untrusted: bool = False) -> Run:
    """The heads of a run directory, or of one that `mtpd import` wrote.

    Args:
        depth: how many depths to export; None is all.
        gguf: a GGUF file of the base.
        untrusted: the run is somebody else's: it may not say that code of its model is run.

    Raises:
        UserError: no run, no finished heads, heads of a kind that no layout has, or a depth that they lack.
    """
    finished, folder = open_finished(path, untrusted=untrusted), path / "heads"
    config = read_config(folder)
    check_weights(folder, config)
    wanted = config.depth if depth is None else depth
    config.check_depth(wanted, key="--depth")
    found = read_header(folder / WEIGHTS)[0]
    tensors = {name: tensor for name, tensor in found.items() if name.startswith("layers.")}
    adapters = {name: tensor for name, tensor in found.items() if name.startswith("adapted.")}
    file = Path(finished.model).expanduser()
    base = GgufModel(file) if file.suffix == ".gguf" else open_checkpoint(finished.model)
    if gguf is None and isinstance(base, GgufModel):
        gguf = file
    return Run(path, finished.recipe, finished.model, base, config, wanted, tensors, adapters, gguf)


class GgufModel(Checkpoint):
    """A GGUF file that a run has as its model: what transformers reads of its config, and no files of safetensors.

    Raises:
        UserError: transformers cannot read it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.shown = path, str(path)
        self.files, self.index, self.file_of = [], None, {}
        try:
            self.config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
        except Exception as error:
            raise UserError(f"model {path}: cannot be read as a GGUF file: {str(error).splitlines()[0]}") from error

    @cached_property
    def tensors(self) -> Tensors:
        return {}

    @property
    def quantisation(self) -> dict[str, Any] | None:
        return {"quant_method": "gguf"}


def with_adapter(adapters: Tensors, tensors: Tensors, depth: int) -> Tensors:
    """The weights of a depth (from 0 on) with its adapter merged into them: W + s B A."""
    merged: Tensors = {}
    prefix, first = f"adapted.{depth + 1}.", ".lora_A.default.weight"
    for name, down in adapters.items():
        if name.startswith(prefix) and name.endswith(first):
            module = name.removeprefix(prefix).removesuffix(first)
            up = adapters[f"{prefix}{module}.lora_B.default.weight"]
            weight = tensors[f"layers.{depth}.{module}.weight"]
            merged[f"layers.{depth}.{module}.weight"] = computed(weight, partial(_merge, up=up, down=down))
    return merged


def _merge(weight: torch.Tensor, *, up: Stored, down: Stored) -> torch.Tensor:
    return weight + (ALPHA * (up.load().float() @ down.load().float())).to(weight.dtype)


def changed_config(base: Checkpoint, **changes: Any) -> dict[str, Any]:
    """The base's config with keys set where the language model's are, and no word of heads that the base lacks."""
    config = without_declarations(base.config)
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = {**config["text_config"], **changes}
        return config
    return config | changes
