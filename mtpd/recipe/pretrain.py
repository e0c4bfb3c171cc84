"""The recipe of `mtpd pretrain`: a model from scratch or a checkpoint, and heads that are trained together with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mtpd.heads.kinds import KINDS, with_sections
from mtpd.recipe.registered import Registered
from mtpd.recipe.rules import loss_problems
from mtpd.recipe.sections import SCHEDULERS, Count, HeadsRecipe, LossRecipe, Share, Text
from mtpd.section import LARGEST, Section

BPE = "bpe:"
"""Begins the name of a tokenizer that is trained on the text."""
LEAST_TOKENS = 257
"""Of such a tokenizer: each byte, and the end of a text."""


@with_sections(optional=False)
class JointHeads(Section):
    """Heads that are trained together with the trunk."""

    kind: Annotated[str, Registered(KINDS)] = Field(
        default=next(iter(KINDS)), description="Kind of the heads, as `heads.kind` of `mtpd distill`."
    )
    depth: int = Field(default=0, ge=0, le=16)
    """K, the number of heads beside the main head; 0 for none."""
    shared: bool = False
    """One block for all depths instead of one each."""
    init: Literal["identity", "copy_last", "copy_last_k", "random", "regression"] | None = None
    """How the heads start, as `heads.init` of `mtpd distill`. null: random beside a new model where they have decoder
    layers, and identity where they have none; beside a checkpoint, what `mtpd distill` takes."""
    source: Text | None = None
    """Directory of heads of the checkpoint to start from instead."""
    trunk_gradient: bool = True
    """Whether the heads' gradient reaches the trunk's layers. Where it does not, the model still learns from the heads
    by the embedding and the unembedding, which they share."""

    def whole(self) -> HeadsRecipe:
        """Gives the section as `mtpd distill` has it."""
        settings = self.model_dump(exclude={"trunk_gradient"})
        return HeadsRecipe.model_validate({**settings, "depth": max(1, self.depth)})


class PretrainData(Section):
    """The text."""

    texts: Text = "stdlib"
    """`stdlib` (the source of Python's standard library), the path of a .jsonl file, or a datasets id; of rows with
    text."""
    held_out: Text = "stdlib-held-out"
    """What is measured on: `stdlib-held-out` (a tenth of the library's modules), a .jsonl file, or a datasets id."""
    subset: Text | None = None
    """Configuration name of the datasets ids."""
    split: Text = "train"
    """Split of the datasets id of `texts`."""
    held_out_split: Text = "test"
    """Split of the datasets id of `held_out`."""
    tokens: int | None = Field(default=None, ge=1)
    """Tokens of `texts` at most, from their beginning; null for all."""
    row_length: int = Field(default=512, ge=16, le=LARGEST)
    """Tokens of a row. The texts are one stream, with an end token behind each, cut into rows."""
    held_out_rows: Count = 64
    """Rows measured at most."""


class PretrainTraining(LossRecipe):
    """The heads' loss beside the main head's cross-entropy, and optimisation. All parameters are trained."""

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
    """Rows in one micro batch of one process."""
    gradient_accumulation: Count = 1
    """Micro batches in one optimizer step."""
    deepspeed: Literal["zero1", "zero2"] | None = None
    """Shards the optimizer's state, with zero2 the gradients too, over processes through DeepSpeed."""
    compile: bool = False
    """Compile the decoder layers with torch.compile: faster steps after a start of a minute. Needs a compiler."""
    save_steps: int = Field(default=0, ge=0, le=LARGEST)
    """Steps from one checkpoint to the next; 0 for one at each measurement."""
    logging_steps: Count = 50
    """Steps from one line of metrics to the next."""


class PretrainEvaluation(Section):
    """Measurements on the held-out text: the loss of every head, and which drafts the main head would accept."""

    steps: Count = 200
    """Steps from one measurement to the next."""
    max_rise: float = Field(default=0.1, ge=0)
    """Share by which the main head's held-out loss may rise above the lowest so far; beyond it the training ends."""


class PretrainRecipe(Section):
    """Everything that decides a pretraining run."""

    model: dict[str, Any] | Text
    """Configuration of a new model, as config.json of transformers has it: `model_type`, and sizes; the vocabulary and
    special tokens are the tokenizer's. Or a checkpoint to train on: a directory, or a hub id."""
    tokenizer: Text | None = None
    """`bytes` (ByT5's: one token a byte, no files needed), `bpe:N` (a byte-level BPE of N tokens, trained on the
    text's first 200 million characters), or what a hub id or directory has. null: bytes, or the checkpoint's."""
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
    evaluation: PretrainEvaluation = PretrainEvaluation()

    @model_validator(mode="after")
    def _keys_agree(self) -> PretrainRecipe:
        problems = loss_problems(self.train, self.heads.depth) if self.heads.depth else []
        problems += _problems(self)
        for problem in problems:
            raise ValueError(problem)
        return self


def _problems(recipe: PretrainRecipe) -> list[str]:
    problems = []
    heads, train, data = recipe.heads, recipe.train, recipe.data
    if heads.depth + 2 > data.row_length:
        problems.append(
            f"heads.depth: {heads.depth} heads are deeper than a row of {data.row_length} tokens; accepted: at most "
            f"{data.row_length - 2}, or a longer data.row_length"
        )
    if heads.source is not None and not isinstance(recipe.model, str):
        problems.append(f"heads.source: {heads.source} needs the checkpoint of these heads as model; accepted: null")
    if train.optimizer == "muon" and train.deepspeed is not None:
        problems.append(
            f"train.optimizer: muon is not accepted with train.deepspeed: {train.deepspeed}, which cuts matrices into "
            "pieces; accepted: adamw, or deepspeed: null"
        )
    if train.max_steps == 0:
        problems.append("train.max_steps: 0 is not accepted; accepted: -1 for whole epochs, or at least 1")
    tokenizer = recipe.tokenizer or ""
    if tokenizer.startswith(BPE):
        size = tokenizer.removeprefix(BPE)
        if not size.isdecimal() or int(size) < LEAST_TOKENS:
            problems.append(f"tokenizer: {tokenizer} is not accepted; accepted: bpe:N, N at least {LEAST_TOKENS}")
        elif isinstance(recipe.model, str):
            problems.append(f"tokenizer: {tokenizer} is not accepted for a checkpoint, which has one; accepted: null")
    return problems
