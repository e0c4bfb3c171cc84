"""The sections of a recipe. The docstrings of the fields are the descriptions in its JSON schema."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from mtpd.heads.kinds import KINDS, with_sections
from mtpd.losses.settings import LOSSES
from mtpd.recipe.registered import Registered
from mtpd.section import LARGEST, Section

Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
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


@with_sections(optional=False)
class HeadsRecipe(Section):
    """The heads that are trained."""

    kind: Annotated[str, Registered(KINDS)] = Field(
        default=next(iter(KINDS)),
        description="Kind of the heads. " + " ".join(f"{kind.name}: {kind.about}." for kind in KINDS.values()),
    )
    depth: int = Field(default=4, ge=1, le=16)
    """K, the number of heads: tokens drafted beyond the main head's own."""
    shared: bool = False
    """One block for all depths instead of one each: a K-th of the parameters, and what every serving engine runs."""
    shared_layers: int = Field(default=0, ge=0, le=LARGEST)
    """m: heads that are no chain read the trunk's last m layers, computed a second time with LoRA adapters of rank 16
    that are trained with the heads. 0: they read the trunk's own states. The layers below run once for both."""
    init: Literal["identity", "copy_last", "copy_last_k", "random", "regression", "native"] | None = None
    """How the heads start. identity: the block passes the trunk's state on; copy_last: all blocks copy the
    trunk's last layer; copy_last_k: block k copies the k-th of the last K layers; random: as transformers
    initialises a layer; regression: identity, with the projection fitted by least squares; native: the model's
    own MTP layers, `depth` of them (all if it is not set), which `heads=native` says for short. null: regression, or
    identity for heads that have nothing to fit."""
    source: Text | None = None
    """Run, or directory of heads, to start from instead: for chain heads a chain, for parallel heads those of the same
    block, for circuits those of block linear. They may be of another model of the same width, such as this one before
    it was fine-tuned."""
    vocabulary: Annotated[int, Field(ge=0, le=LARGEST)] | Text = 0
    """Draft vocabulary: how many of the tokens most frequent in the training responses can be drafted, special tokens
    among them; 0 for all tokens. Or a file that `mtpd data vocab` wrote."""


class GivenText(Section):
    """Text that is trained on as it is, with the responses that it has: one trunk pass, no generation."""

    prompts: str = Field(min_length=1, examples=["texts.jsonl", "org/dataset"])
    """Path of a file or folder of rows, or a datasets id."""
    subset: Text | None = None
    """Configuration name of the datasets id."""
    split: Text = "train"
    """Split of the datasets id."""
    limit: Count | None = None
    """Rows at most, drawn by the seed; null for all."""


class DataRecipe(Section):
    """Prompts, their responses, and the rows they are packed into."""

    prompts: str = Field(default="builtin", min_length=1, examples=["builtin", "prompts.jsonl", "org/dataset"])
    """`builtin` (the prompts that come with mtpd), `stdlib` (pieces of the source of Python's standard library, with
    what follows them), the path of a file or folder of rows, or a datasets id."""
    subset: Text | None = None
    """Configuration name of the datasets id."""
    split: Text = "train"
    """Split of the datasets id."""
    limit: Count | None = None
    """Prompts at most, drawn by the seed; null for all."""
    columns: dict[str, Text] = Field(default={})
    """Columns of the rows, by what they are taken for (prompt, completion, messages, text and others that rows have);
    for prompts and held-out prompts. Empty: rows are read by the columns that they have."""
    template: Text | None = Field(default=None, examples=["{{ title }}: {{ body }}"])
    """Jinja template of the user's message over the columns of a row; for prompts and held-out prompts."""
    chat_template_kwargs: dict[str, Any] = Field(default={})
    """Arguments of the model's chat template, such as `enable_thinking: false`; those that a row has go before them."""
    special_tokens_in_text: Literal["keep", "escape"] = "keep"
    """Control tokens of the model inside of a text. keep: they are control tokens, as transformers reads them. escape:
    they are read as the characters that they are."""
    max_unusable: Share = 0.1
    """Share of the rows that may be unusable: such rows are left out and counted, and more of them end the run."""
    held_out: Text | None = None
    """Prompts that are measured on and never trained on: `builtin`, `stdlib-held-out`, the path of a file or folder, or
    a datasets id. null: the built-in held-out set if `prompts` is builtin, else `held_out_count` of the prompts."""
    held_out_count: Count = 80
    """Prompts kept out of training when `held_out` is null and `prompts` is not builtin."""
    responses: str = Field(
        default="trunk",
        pattern=r"^(trunk|given)$|^https?://|\.jsonl$",
        examples=["trunk", "given", "http://localhost:8000", "responses.jsonl"],
    )
    """trunk: the model answers the prompts itself (self-distillation). given: the data has the responses. The address
    of a server with OpenAI's interface, such as vLLM, that serves the model; or a .jsonl file of responses that it
    wrote. Both are checked against the model. A server's key is read from the environment (MTPD_API_KEY)."""
    temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature of generated responses; 0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus of the sampling; 1 for no cut. Needs a temperature above 0."""
    max_new_tokens: Count = 160
    """Tokens of a generated response at most."""
    generation_batch: Count = 64
    """Prompts answered at a time; lower it when memory runs out."""
    given: list[GivenText] = Field(default=[])
    """Further texts to train on, with their own responses."""
    corpus_mb: Annotated[int, Field(ge=0, le=LARGEST)] = 0
    """Size limit of an index of the responses, in MB, kept beside the heads: decoding then also drafts what followed in
    them, which pays where traffic repeats what was trained on. 0: none."""
    row_length: int = Field(default=512, ge=32, le=LARGEST)
    """Tokens of a packed row: several documents share one, with their borders kept."""
    hidden_states: str = Field(
        default="disk", pattern="^(disk|memory|recompute)$|/", examples=["disk", "memory", "recompute", "./states"]
    )
    """disk: the trunk runs in the first epoch alone, and its hidden states are kept in files of the run directory (2 *
    hidden size bytes a token in bf16). memory: they are kept in memory. recompute: the trunk runs in each epoch, and
    nothing is kept. A path with a /: a directory for the files, such as one that `mtpd data store` filled."""

    @property
    def server(self) -> str | None:
        """The address of the server that writes the responses; None where none does."""
        return self.responses if self.responses.startswith(("http://", "https://")) else None

    @property
    def responses_file(self) -> str | None:
        """The file that holds the responses; None where none does."""
        return None if self.responses in ("trunk", "given") or self.server else self.responses

    @property
    def store(self) -> str | None:
        """The directory that `hidden_states` names; None for one of the words."""
        return self.hidden_states if "/" in self.hidden_states else None

    @property
    def on_disk(self) -> bool:
        """Whether hidden states are kept in files."""
        return self.hidden_states not in ("memory", "recompute")


class LossRecipe(Section):
    """What heads are trained on."""

    loss: Annotated[str, Registered(LOSSES)] = Field(
        default=next(iter(LOSSES)),
        description="What is trained on, summed over depths. "
        + " ".join(f"{loss.name}: {loss.about}." for loss in LOSSES.values()),
    )
    beta: Weight | None = None
    """Weight of the KL in mtp_d, beside 0.3 for the cross-entropy; null: 0.5, and 1 for a single head."""
    weights: list[Weight] | None = None
    """Weight of the loss of each depth; null: 1 for all."""
    decay: float = Field(default=1.0, gt=0, le=1)
    """Each depth weighs so many times what the one before it does."""
    top_n: int | None = Field(default=None, ge=0, le=LARGEST)
    """Tokens that mtp_d, kl, reverse_kl and jsd compare: the teacher's n most likely, renormalised; 0 for the whole
    vocabulary. null: 10,000."""
    teacher_temperature: float = Field(default=1.0, gt=0)
    """Temperature of the teacher's distribution in the divergence."""


class TrainRecipe(LossRecipe):
    """The loss and its optimisation."""

    compile: bool = False
    """Compile the loss with torch.compile: faster steps after a start of about half a minute. Needs a compiler."""
    checkpoint_blocks: bool = False
    """Keep the input of each head for the backward pass instead of all that is inside: less memory for long rows,
    and a second forward pass of the heads."""
    epochs: float = Field(default=3.0, gt=0)
    """Passes over the training rows."""
    max_steps: int = Field(default=-1, ge=-1, le=LARGEST)
    """Optimizer steps; overrides `epochs` unless -1."""
    learning_rate: float = Field(default=4e-4, gt=0)
    """Peak learning rate of AdamW."""
    scheduler: SCHEDULERS = "cosine"
    """Learning-rate schedule, by its name in transformers."""
    warmup_ratio: Share = 0.05
    """Share of the steps in which the learning rate rises."""
    micro_batch_rows: Count = 8
    """Rows in one micro batch of one process, or of those that share them."""
    gradient_accumulation: Count = 1
    """Micro batches in one optimizer step."""
    deepspeed: Text | None = Field(default=None, examples=["zero2", "zero3", "my-deepspeed.json"])
    """Shards training over processes through DeepSpeed. zero1, zero2: the heads' optimizer state, and their gradients
    too; zero3: the layers of the trunk as well; zero3-cpu, zero3-nvme: those in host memory or on a disk. Or the path
    of a DeepSpeed JSON. null: each process holds everything."""
    sequence_parallel: Count = 1
    """Processes that share each row, through DeepSpeed's Ulysses: for rows too long for one. Needs `deepspeed`; the
    number of processes is a multiple, and so are the attention heads of the model."""
    save_steps: int = Field(default=0, ge=0, le=LARGEST)
    """Steps from one checkpoint to the next; 0 for one after each epoch."""
    skip_bad_batches: int = Field(default=0, ge=0, le=LARGEST)
    """Steps with a loss that is NaN or infinite that are left out, at most; such a batch is kept in `bad-batches/`.
    One more, or 0, ends the training."""
    logging_steps: Count = 10
    """Steps from one line of metrics to the next."""
    report_to: list[Text] = Field(default=[])
    """Trackers known to transformers, such as tensorboard or wandb, beside metrics.jsonl."""
    arguments: dict[str, Any] = Field(default={})
    """Any other argument of transformers.TrainingArguments, passed on as it is: weight_decay, max_grad_norm, or
    save_total_limit, the checkpoints kept (2), for example."""


class TrunkRecipe(Section):
    """Whether the trunk is trained together with the heads."""

    train: Literal["frozen", "lora", "full"] = "frozen"
    """frozen: the model stays as it is. lora: LoRA adapters on its layers are trained with the heads and merged. full:
    all its parameters are trained, in float32, the main head and the embedding among them. The run then holds the
    changed model in `trunk/`, and decodes nothing itself."""
    rank: Count = 16
    """Rank of the adapters of lora."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of the trunk; null: train.learning_rate, which is high for all parameters of a model."""
    teacher: Literal["original", "detached"] = "original"
    """What the heads are compared with. original: the trunk as it was before, which with train: full is a second model
    in memory; detached: the trunk as it is at the step, without gradient."""
    max_rise: float = Field(default=0.01, ge=0)
    """Share by which the main head's perplexity on held-out responses may rise; beyond it the training ends. It is
    measured every 50 steps."""


class ExtendRecipe(Section):
    """Looped extension after training: deeper heads that start as those there are, twice as many after each stage."""

    to: int | None = Field(default=None, ge=2, le=64)
    """Heads after the last stage; null for no extension."""
    form: Literal["copies", "shared", "adapters"] = "copies"
    """What a new depth owns. copies: a block; shared: nothing, the blocks there are serve all depths and are trained on
    all; adapters: a LoRA adapter on the block that it shares."""
    rank: Count = 16
    """Rank of the adapters."""
    steps: int | None = Field(default=None, ge=0, le=LARGEST)
    """Optimizer steps of each stage; null: as long as `train` says; 0: heads are looped as they are, and measured."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of a stage; null: that of `train`. Adapters want several times that of copies."""
    auto: bool = False
    """Stop before a stage that does not pay: where the fastest number of drafts is not among the newest depths."""


class EvaluationRecipe(Section):
    """The measurements before, during and after training, on the held-out prompts."""

    prompts_limit: Count = 84
    """Held-out prompts measured at most."""
    max_new_tokens: Count = 128
    """Tokens decoded for a prompt at most."""
    decode_prompts: int = Field(default=14, ge=0, le=LARGEST)
    """Held-out prompts that are decoded for real with drafts and verification, beside plain `generate`, one
    after the other; 0 leaves it out."""
    dtype: Literal["float32", "bfloat16", "float16", "trunk"] = "float32"
    """Number format while decoding. trunk: the one of the run, and the default on a GPU in 16 bits. In float32 the text
    of one-token and many-token passes agrees; lower precision can break ties differently."""
    steps: int = Field(default=0, ge=0, le=LARGEST)
    """Steps of training from one measurement of held-out acceptance to the next; each writes a checkpoint, and the
    heads with the highest tau are kept in the end. 0: the last heads are kept, nothing is measured in between. Half of
    the measured prompts, at most 28, are set apart for it: finished heads are not measured on what chose them."""
    patience: int = Field(default=0, ge=0, le=LARGEST)
    """Such measurements without a higher tau after which training stops; 0 never stops early."""
    extra: list[Text] = Field(default=[])
    """Further prompts (files, datasets ids, or `builtin-other`), each measured as a suite of its own."""
