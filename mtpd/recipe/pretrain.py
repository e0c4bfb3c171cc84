"""The recipe of `mtpd pretrain`: a model from scratch, with or without parallel heads that are trained beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mtpd.heads.parallel.config import Block
from mtpd.recipe.sections import SCHEDULERS, Count, Share, Text
from mtpd.section import LARGEST, Section


class JointHeads(Section):
    """Parallel heads that are trained together with the trunk."""

    depth: int = Field(default=0, ge=0, le=16)
    """K, the number of heads beside the main head; 0 for none."""
    block: Block = "linear"
    """As `heads.parallel.block` of `mtpd distill`."""


class PretrainData(Section):
    """The text."""

    texts: Text = "stdlib"
    """`stdlib` (the source of Python's standard library), or the path of a .jsonl file of `text` rows."""
    held_out: Text = "stdlib-held-out"
    """What is measured on: `stdlib-held-out` (a tenth of the library's modules), or the path of a .jsonl file."""
    row_length: int = Field(default=512, ge=16, le=LARGEST)
    """Tokens of a row. The texts are one stream, with an end token behind each, cut into rows."""
    held_out_rows: Count = 64
    """Rows measured at most."""


class PretrainTraining(Section):
    """Optimisation. All parameters are trained."""

    epochs: float = Field(default=1.0, gt=0)
    """Passes over the rows."""
    max_steps: int = Field(default=-1, ge=-1, le=LARGEST)
    """Optimizer steps; overrides `epochs` unless -1."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon` steps on the matrices of the decoder layers, AdamW on the rest: longer steps, but far fewer are needed."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate, the same for both optimizers."""
    scheduler: SCHEDULERS = "cosine"
    """Learning-rate schedule, by its name in transformers."""
    warmup_ratio: Share = 0.02
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Weight decay."""
    micro_batch_rows: Count = 8
    """Rows of a micro batch, which is the whole step here."""
    compile: bool = False
    """Compile the decoder layers with torch.compile: faster steps after a start of a minute. Needs a compiler."""
    save_steps: int = Field(default=0, ge=0, le=LARGEST)
    """Steps from one checkpoint to the next; 0 for one after each epoch."""
    logging_steps: Count = 50
    """Steps from one line of metrics to the next."""


class PretrainRecipe(Section):
    """Everything that decides a pretraining run."""

    model: dict[str, Any]
    """Configuration of the model, as config.json of transformers has it: `model_type`, and sizes. The vocabulary and
    special tokens are the tokenizer's."""
    tokenizer: Text = "bytes"
    """`bytes` (ByT5's: one token a byte, no files needed), or what a hub id or directory has."""
    output: Annotated[Path, Field(strict=False)] = Path("runs/pretrain")
    """The run directory. A recipe file that does not set it gets runs/<name of the file>."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the first weights and the order of rows."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of products, and of the checkpoint; weights are trained in float32."""
    device: str = Field(default="auto", pattern=r"^[a-z]+(:\d+)?$", examples=["auto", "cpu", "cuda:0"])
    """Where to run: auto, or a torch device."""
    heads: JointHeads = JointHeads()
    data: PretrainData = PretrainData()
    train: PretrainTraining = PretrainTraining()
