"""The plan of a pretraining run, from its configuration alone: `mtpd pretrain --dry-run`. Nothing is trained."""

from __future__ import annotations

import torch

from mtpd.data.models import load_model, resolve_device, resolve_dtype
from mtpd.heads import build_heads, configure_heads
from mtpd.losses.fused import block_size
from mtpd.plan.plan import amount, lines_of, size
from mtpd.pretrain.model import new_model
from mtpd.pretrain.tokenizer import load_tokenizer
from mtpd.recipe import PretrainRecipe
from mtpd.recipe.pretrain import BPE
from mtpd.trunk import Trunk

STATE = 16
"""Bytes of a trained parameter: itself, its gradient and two moments of the optimizer, in float32."""
OF_LAYER = 34
"""Numbers of 16 bits, over 2, that a decoder layer keeps for its backward pass for each position and unit of its width
(Korthikanti et al., arXiv 2205.05198, without the scores of attention)."""
OPERATIONS = 6
"""Floating-point operations of a training step for each parameter in a product and each token."""
SPEED = 100e12
"""Operations a second that the example in hours is for."""


class _Words:
    """A tokenizer of which the number of tokens is all that is known."""

    bos_token_id = eos_token_id = pad_token_id = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


def pretraining_plan(recipe: PretrainRecipe, *, processes: int = 1) -> str:
    """Describes what a run trains, and what that takes, in lines of at most 100 characters.

    Raises:
        UserError: no such model or tokenizer, or heads that this model cannot have.
    """
    device = resolve_device(recipe.device)
    dtype = resolve_dtype(recipe.dtype, device)
    train, data = recipe.train, recipe.data
    if isinstance(recipe.model, str):
        model, _ = load_model(recipe.model, dtype="float32", config_only=True)
    else:
        with torch.device("meta"):
            model = new_model(recipe.model, _words(recipe), row_length=data.row_length)
    trunk = Trunk(model)
    of_model = _numbers(model)
    rows = trunk.unembedding.weight.shape[0]
    main = trunk.unembedding.weight.numel()
    of_heads = 0
    if recipe.heads.depth:
        settings = recipe.heads.whole().model_dump()
        with torch.device("meta"):
            heads = build_heads(trunk, configure_heads(settings, trunk, vocabulary=0, fingerprint=""))
        of_heads = _numbers(heads)
    embedding = model.get_input_embeddings().weight.numel()
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    # An embedding is looked up; an unembedding is a product of the main head, of its teacher's rows and of each head.
    in_products = of_model + of_heads - (0 if tied else embedding) + recipe.heads.depth * main
    step = train.micro_batch_rows * train.gradient_accumulation * processes * data.row_length
    tokens = train.max_steps * step if train.max_steps > 0 else None
    if tokens is None and data.tokens is not None:
        tokens = round(data.tokens * train.epochs)
    positions = train.micro_batch_rows * data.row_length
    wide = 1 if dtype != torch.float32 else 2
    layers = trunk.depth + (recipe.heads.depth if of_heads else 0)
    sharded = processes if train.deepspeed else 1
    trained = of_model + of_heads
    # The weights and their gradients stay whole; zero2 shards the gradients too.
    whole = 8 if train.deepspeed != "zero2" else 4
    parts = {
        "weights, gradients, optimizer": round(trained * (whole + (STATE - whole) / sharded)),
        "layers": positions * layers * trunk.hidden_size * OF_LAYER * wide,
        "loss": block_size(rows, rows, dtype.itemsize, device=device.type)[1] + 4 * main,
    }
    lines = [
        ("plan", f"{train.loss} into {recipe.output}; nothing is trained or written now"),
        ("model", f"{trunk.name}: {of_model:,} parameters, {trunk.depth} layers, width {trunk.hidden_size:,}"),
        ("heads", f"{recipe.heads.depth} of kind {recipe.heads.kind}: {of_heads:,} parameters"),
        ("step", f"{step:,} tokens in rows of {data.row_length:,}, {processes} process(es)"),
        ("tokens", f"{amount(tokens)}" + ("" if tokens else ": those of the text")),
        ("memory", f"{size(sum(parts.values()))}: " + ", ".join(f"{name} {size(v)}" for name, v in parts.items())),
    ]
    if tokens:
        work = OPERATIONS * in_products * tokens
        hours = work / SPEED / processes / 3600
        lines.append(
            ("arithmetic", f"{work:.2g} operations; {hours:.1f} hours at {SPEED / 1e12:.0f} TFLOP/s for each process")
        )
    lines.append(("assumed", "memory is an estimate of what a process holds; what libraries take is not in it"))
    return lines_of(lines)


def _words(recipe: PretrainRecipe) -> object:
    name = recipe.tokenizer or "bytes"
    if name.startswith(BPE):
        return _Words(int(name.removeprefix(BPE)))
    return _Words(259) if name == "bytes" else load_tokenizer(name)


def _numbers(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
