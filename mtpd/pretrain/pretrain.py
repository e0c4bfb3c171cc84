"""`mtpd pretrain`: a causal LM, new or a checkpoint, and heads that are trained together with it.

    L = Σ_t -log p(x_{t+1}) + Σ_t Σ_k L_k

L_k is the loss of head k, any that `mtpd distill` has; the teacher is the main head at the same step, without gradient
(MTP-D, arXiv 2603.23911). With `ce` it is the joint training of Gloeckle et al. (arXiv 2404.19737). Everything is
trained: embedding, layers, unembedding, and the heads, whose gradient reaches the layers.

It is the training of `mtpd distill` with `trunk.train: full`, on text, from the first weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from mtpd.data.models import resolve_device, resolve_dtype, trunk_fingerprint
from mtpd.data.packing import collate
from mtpd.data.store import with_hidden
from mtpd.errors import UserError
from mtpd.files import is_empty, write_whole
from mtpd.heads import save_heads
from mtpd.parallel import ranks
from mtpd.parallel.deepspeed_config import load_settings
from mtpd.parallel.partition import deepspeed_running
from mtpd.pretrain.model import heads_of, model_of
from mtpd.pretrain.muon import with_decoder_layer
from mtpd.pretrain.text import as_packed, stream_rows, texts_of
from mtpd.pretrain.trainer import MAIN, Diverged, PretrainTrainer, held_out_metrics
from mtpd.recipe import PretrainRecipe, dump, load_pretrain_recipe
from mtpd.train import checkpoints
from mtpd.train.arguments import arguments_of, loss_of
from mtpd.train.joint_trunk import FullTrunk
from mtpd.train.model import DistillModel
from mtpd.train.rows import TrainingRows
from mtpd.train.step_rows import accumulation, processes
from mtpd.train.trainer import Metrics, train

FITTED_ROWS = 256
"""Rows that heads beside a checkpoint are fitted to, at most."""


def pretrain(recipe: PretrainRecipe, *, progress: bool = True) -> Path:
    """Trains as the recipe says, or goes on from the newest whole checkpoint of the run directory.

    Leaves `model/` (a checkpoint of transformers with its tokenizer), `heads/` where there are heads, `metrics.jsonl`
    and `held-out.json`.

    Returns:
        The run directory.

    Raises:
        UserError, MtpdError: with one line that names the cause.
    """
    with ranks.joined(resolve_device(recipe.device)):
        return _pretrain(recipe, progress=progress)


def _pretrain(recipe: PretrainRecipe, *, progress: bool) -> Path:
    run = recipe.output
    ranks.from_main(lambda: _open(recipe))
    device = resolve_device(recipe.device)
    dtype = resolve_dtype(recipe.dtype, device)
    data = recipe.data
    texts = texts_of(data.texts, split=data.split, subset=data.subset)
    trunk, tokenizer = model_of(recipe, texts, device=device)
    rows = stream_rows(
        tokenizer,
        data.texts,
        split=data.split,
        subset=data.subset,
        row_length=data.row_length,
        tokens=data.tokens,
        progress=progress and ranks.is_main(),
    )
    if not isinstance(recipe.model, str) and rows.numel() < len(tokenizer):
        raise UserError(
            f"tokenizer: has {len(tokenizer):,} tokens, more than the {rows.numel():,} of {data.texts} can train; "
            "accepted: bytes, a smaller bpe:N, or more text"
        )
    held_out = stream_rows(
        tokenizer,
        data.held_out,
        split=data.held_out_split,
        subset=data.subset,
        row_length=data.row_length,
        limit=data.held_out_rows,
    )
    packed = as_packed(rows)

    def batches() -> list[dict[str, Any]]:
        some = TrainingRows(packed)
        numbers = range(0, len(some), max(1, len(some) // FITTED_ROWS))
        parts = [collate([some[number] for number in part]) for part in _by_eight(list(numbers))]
        return [with_hidden(part, trunk, None) for part in parts]

    heads = heads_of(recipe, trunk, batches).to(device)
    joint = FullTrunk(trunk, original_teacher=False, dtype=dtype)
    with ExitStack() as running:
        engine: dict[str, Any] | None = None
        settings = load_settings(recipe.train.deepspeed)
        if settings is not None:
            running.enter_context(deepspeed_running(device))
            engine = settings.for_heads(heads, hidden_size=trunk.hidden_size, own_logits=heads.own_logits)
        model = DistillModel(
            trunk,
            heads,
            loss_of(recipe.train, recipe.heads.depth),
            joint=joint,
            trunk_gradient=recipe.heads.trunk_gradient,
            autocast=dtype if settings is not None and dtype != torch.float32 else None,
        )
        if recipe.train.compile:
            for layer in (*trunk.decoder.layers, *with_decoder_layer(heads)):
                layer.compile()
        trainer = PretrainTrainer(
            model,
            _arguments(recipe, dtype=dtype, device=device, deepspeed=engine),
            packed,
            held_out=held_out,
            max_rise=recipe.evaluation.max_rise,
            muon=recipe.train.optimizer == "muon",
            callbacks=[Metrics(run / "metrics.jsonl")],
            progress=progress and ranks.is_main(),
        )
        try:
            train(trainer)
        except Diverged as error:
            step = _load_best(trainer)
            if step is None:
                raise
            _write(run, model, tokenizer, held_out)
            raise Diverged(f"{error}; the model of step {step}, the best one that was kept, is in {run}") from error
    _write(run, model, tokenizer, held_out)
    return run


def _open(recipe: PretrainRecipe) -> None:
    """Makes the run directory, or finds that it holds this run."""
    run = recipe.output
    if (run / "recipe.yaml").is_file():
        if load_pretrain_recipe(run / "recipe.yaml") != recipe:
            raise UserError(
                f"output: {run} holds a run of another recipe; accepted: another directory, or the same recipe"
            )
    elif not is_empty(run):
        raise UserError(f"output: {run} holds something else than a run; accepted: a new or empty directory")
    write_whole(run / "recipe.yaml", dump(recipe))


def _by_eight(numbers: list[int]) -> Iterator[list[int]]:
    yield from (numbers[start : start + 8] for start in range(0, len(numbers), 8))


def _load_best(trainer: PretrainTrainer) -> int | None:
    """Loads the checkpoint of the lowest held-out loss, or the newest one; gives its step, None where none is whole."""
    best = trainer.state.best_global_step
    folder = checkpoints.folder_of(trainer.directory, best) if best else None
    if folder is None or checkpoints.damage(folder) is not None:
        folder = checkpoints.last_checkpoint(trainer.directory)
    if folder is None:
        return None
    trainer._load_from_checkpoint(str(folder))
    return int(folder.name.rpartition("-")[2])


def _write(run: Path, model: DistillModel, tokenizer: Any, held_out: Tensor) -> None:
    """Writes the model, its heads, and what they are worth on held-out text."""
    joint, heads = model.joint, model.heads
    assert joint is not None, "the trunk is trained"
    model.eval()
    found = held_out_metrics(model, held_out, dtype=joint.dtype) | {"rows": float(len(held_out))}
    joint.write(run / "model", tokenizer)
    heads.config = heads.config.model_copy(update={"trunk": trunk_fingerprint(joint.trunk.model)})

    def write() -> None:
        write_whole(run / "held-out.json", json.dumps(found, indent=2) + "\n")
        if heads.depth:
            save_heads(heads, run / "heads")

    ranks.from_main(write)


def _arguments(
    recipe: PretrainRecipe, *, dtype: torch.dtype, device: torch.device, deepspeed: dict[str, Any] | None
) -> TrainingArguments:
    train, steps = recipe.train, recipe.evaluation.steps
    changed = {
        "weight_decay": train.weight_decay,
        "gradient_accumulation_steps": accumulation(train, recipe.output, processes()),
        "eval_strategy": "steps",
        "eval_steps": steps,
        "metric_for_best_model": MAIN,
        "greater_is_better": False,
        "save_strategy": "steps",
        "save_steps": train.save_steps or steps,
        "save_total_limit": 2,
    }
    return arguments_of(
        train, changed, output=recipe.output, seed=recipe.seed, dtype=dtype, device=device, deepspeed=deepspeed
    )
