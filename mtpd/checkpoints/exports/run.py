"""What is exported: the heads of a run, and the checkpoint of their base."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from mtpd.checkpoints.arrange import by_depth
from mtpd.checkpoints.directory import Checkpoint
from mtpd.checkpoints.importing import open_checkpoint
from mtpd.checkpoints.native import base_tensor
from mtpd.checkpoints.spelling import Tensors
from mtpd.checkpoints.tensors import FLOATS, Stored, cast, read_header, stored
from mtpd.errors import UserError
from mtpd.heads import CONFIG, WEIGHTS
from mtpd.heads.adapters import merged_tensors
from mtpd.heads.config import HeadsConfig
from mtpd.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class Run:
    """Heads and their base, nothing of them in memory.

    Attributes:
        depth: how many depths are exported; the heads may have more.
        tensors: those of the blocks, as `mtpd.heads` names and arranges them.
    """

    path: Path
    recipe: Recipe
    base: Checkpoint
    config: HeadsConfig
    depth: int
    tensors: Tensors

    @property
    def block_of(self) -> list[int]:
        """By depth, the number of its block."""
        return self.config.block_of

    @property
    def blocks(self) -> int:
        """How many different blocks the exported depths have."""
        return len(set(self.block_of[: self.depth]))

    @property
    def recycles(self) -> bool:
        """Whether one block is enough: it is used at every depth, or there is one depth."""
        return self.blocks == 1

    @property
    def written(self) -> int:
        """How many heads a layout gets that has one for each depth, or one for all."""
        return 1 if self.recycles else self.depth

    @property
    def model_type(self) -> str:
        return str(self.base.text_config.get("model_type", ""))

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
        tensors = by_depth(self.tensors, self.block_of[:count])
        return {name: cast(tensor, self.dtype) for name, tensor in tensors.items()}

    def base_norm(self) -> Stored:
        """The gain of the base's final norm."""
        for name in ("model.norm.weight", "model.language_model.norm.weight", "language_model.model.norm.weight"):
            if name in self.base.tensors:
                return self.base.tensors[name]
        raise UserError(f"{self.base.shown}: has no tensor model.norm.weight, the gain of its final norm")


def open_run(path: Path, *, depth: int | None = None) -> Run:
    """The heads of a run directory, or of one that `mtpd import` wrote.

    Args:
        depth: how many depths to export; None is all.

    Raises:
        UserError: no run, no finished heads, heads of a kind that no layout has, or a depth that they lack.
    """
    recipe_file, folder = path / "recipe.yaml", path / "heads"
    if not recipe_file.is_file():
        why = " (imported heads that mtpd cannot compute; `mtpd graft` moves them)" * (path / "import.json").is_file()
        raise UserError(f"{path}: holds no run (no {recipe_file.name}){why}; give what mtpd distill or import wrote")
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder}: holds no heads; finish the run with mtpd distill {recipe_file}")
    recipe = load_recipe(recipe_file)
    try:
        config = HeadsConfig.model_validate_json((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise UserError(f"{folder / CONFIG}: no readable heads here: {str(error).splitlines()[0]}") from error
    wanted = config.depth if depth is None else depth
    if not 1 <= wanted <= config.depth:
        raise UserError(f"depth: {wanted} is not accepted; accepted: 1 to {config.depth}, the heads of {path}")
    saved: Tensors = read_header(folder / WEIGHTS)[0]
    if any(config.adapters):
        # No layout has adapters: they become part of a block for each depth.
        merged = merged_tensors({name: tensor.load() for name, tensor in saved.items()}, config)
        saved, config = {name: stored(tensor) for name, tensor in merged.items()}, config.merged()
    tensors = {name: tensor for name, tensor in saved.items() if name.startswith("layers.")}
    if (path / "trunk" / "config.json").is_file():
        # The run trained its trunk too: that is what the heads belong to.
        recipe = recipe.model_copy(update={"model": str(path / "trunk")})
    return Run(path, recipe, open_checkpoint(recipe.model), config, wanted, tensors)


def dtype_name(dtype: torch.dtype) -> str:
    """As config.json has it."""
    return str(dtype).removeprefix("torch.")


def changed_config(base: Checkpoint, **changes: Any) -> dict[str, Any]:
    """The base's config with keys set where the language model's are."""
    config = dict(base.config)
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = {**config["text_config"], **changes}
        return config
    return config | changes
