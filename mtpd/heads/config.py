"""Describes a saved set of heads: `heads/config.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mtpd.errors import UserError
from mtpd.files import read_sealed
from mtpd.heads.kinds import KINDS, with_sections

CONFIG, WEIGHTS = "config.json", "model.safetensors"
"""Files of saved heads."""


@with_sections(optional=True)
class HeadsConfig(BaseModel):
    """Contents of `heads/config.json`."""

    model_config = ConfigDict(extra="forbid")

    kind: str = next(iter(KINDS))
    depth: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    source_layers: list[int] = []
    """Per decoder block, the trunk layer (0-based) whose kind it has."""
    shared: bool = False
    """One block for all depths, which then has one entry in `source_layers` (FastMTP, arXiv 2509.18362)."""
    blocks: list[int] = []
    """Per depth, the block (0-based, numbered by first use) that it has, where blocks are looped; empty: one each, or
    the one that all share."""
    adapters: list[Annotated[int, Field(ge=0)]] = []
    """Per depth, the rank of a LoRA adapter of its own on its block, 0 for none; empty: none at any depth."""
    shared_layers: int = Field(default=0, ge=0)
    """Number of the trunk's last layers that run a second time, with adapters, before the heads; 0: heads read the
    trunk's states."""
    adapter_rank: int = Field(default=0, ge=0)
    """Rank of those adapters; 0 where there are none."""
    vocabulary_size: int = Field(default=0, ge=0)
    """Tokens of the draft vocabulary; 0 where heads draft over the whole vocabulary."""
    columns: int = Field(default=0, ge=0)
    """Tokens that heads with logits of their own give; 0 for heads that give states."""
    trunk: str = ""
    """Fingerprint of the trunk that the heads belong to."""
    weights: str = ""
    """SHA-256 of the file of the weights, as it was saved; empty: not known, as in imported heads."""

    @property
    def own(self) -> Any:
        """The section that these heads have for their kind alone; None for kinds without one."""
        return getattr(self, self.kind, None)

    @property
    def block_of(self) -> list[int]:
        """Per depth, the block that it has."""
        return self.blocks or ([0] * self.depth if self.shared else list(range(self.depth)))

    def check_depth(self, depth: int, *, key: str) -> None:
        """Raises UserError, which names the key, unless there are so many heads."""
        if not 1 <= depth <= self.depth:
            raise UserError(f"{key}: {depth} is not accepted; accepted: 1 to {self.depth}, the heads there are")

    def merged(self) -> HeadsConfig:
        """The same heads with a block for each depth and no adapters."""
        sources = [self.source_layers[block] for block in self.block_of]
        return self.model_copy(update={"shared": False, "source_layers": sources, "blocks": [], "adapters": []})

    @model_validator(mode="after")
    def _one_source_layer_for_each_block(self) -> HeadsConfig:
        if self.blocks and (self.shared or len(self.blocks) != self.depth or not _in_order(self.blocks)):
            raise ValueError(f"blocks: {self.blocks} does not say the block of each of {self.depth} depths")
        if self.adapters and len(self.adapters) != self.depth:
            raise ValueError(f"adapters: {len(self.adapters)} ranks for {self.depth} depths")
        if bool(self.shared_layers) != bool(self.adapter_rank):
            raise ValueError(f"adapter_rank: {self.adapter_rank} for {self.shared_layers} shared layers")
        kind = KINDS.get(self.kind)
        blocks = len(self.source_layers) if kind is None else kind.blocks(self)
        if len(self.source_layers) != blocks:
            raise ValueError(f"source_layers: {len(self.source_layers)} entries for {blocks} blocks")
        for name, each in KINDS.items():
            if each.section is not None and (getattr(self, name) is not None) != (self.kind == name):
                raise ValueError(
                    f"{name}: is for heads of kind {name}, and needed there; these are of kind {self.kind}"
                )
        return self


def read_config(directory: str | Path) -> HeadsConfig:
    """Reads the config of saved heads.

    Raises:
        UserError: `config.json` is missing, damaged, or none of heads.
    """
    path = Path(directory) / CONFIG
    try:
        values = read_sealed(path, refusal="no readable heads here")
        own = values.get(str(values.get("kind")))
        if isinstance(own, dict):
            # Of earlier circuits; it said how they draft, and nothing about their weights.
            own.pop("greedy", None)
        return HeadsConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ": ".join(["", *map(str, first["loc"])])
        raise UserError(f"{path}: no readable heads here{where}: {first['msg']}") from error


def _in_order(blocks: list[int]) -> bool:
    """Tells whether each new number is the next one."""
    new = list(dict.fromkeys(blocks))
    return new == list(range(len(new)))
