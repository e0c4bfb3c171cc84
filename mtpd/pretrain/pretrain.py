"""`mtpd pretrain`: a causal LM from scratch, and parallel heads trained beside it (arXiv 2404.19737).

    L = Σ_t Σ_{k=0..K} -log p^k(x_{t+k+1})        p^0 is the main head's

Trunk, main head and heads all learn. Forward and backward run head by head (`mtpd.losses.chunked`), so that logits
take as much memory with many heads as with one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from mtpd import alignment
from mtpd.data import stdlib
from mtpd.data.models import resolve_device, resolve_dtype, trunk_fingerprint
from mtpd.data.prompts import load_prompts
from mtpd.errors import UserError
from mtpd.files import is_empty, replacing, write_whole
from mtpd.heads import build_heads, configure_heads, save_heads, start_heads
from mtpd.heads.parallel.config import KIND
from mtpd.heads.parallel.heads import AnyParallel
from mtpd.losses.chunked import in_chunks
from mtpd.parallel import ranks
from mtpd.pretrain.muon import muon_and_adamw
from mtpd.recipe import HeadsRecipe, PretrainRecipe, dump, load_pretrain_recipe
from mtpd.train.safe_trainer import SafeTrainer
from mtpd.train.trainer import Metrics, Progress
from mtpd.trunk import Trunk

WEIGHTS = "pretraining.safetensors"


class PretrainModel(nn.Module):
    """A trainable model, its heads, and the sum of their cross-entropies."""

    accepts_loss_kwargs = False

    def __init__(self, trunk: Trunk, heads: AnyParallel | None) -> None:
        super().__init__()
        self.model = trunk.model
        self.heads = heads
        self.model.requires_grad_(True)
        # Not registered: a trunk is the same parameters, and stays in eval mode for its other users.
        self._trunk = [trunk]
        self.losses: Tensor | None = None

    @property
    def depth(self) -> int:
        return 0 if self.heads is None else self.heads.depth

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """The mean cross-entropy of each head, summed over heads, for rows [B, T]."""
        trunk = self._trunk[0]
        hidden = trunk.decoder(input_ids=input_ids, use_cache=False).last_hidden_state
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        unembedding = trunk.unembedding

        def piece(number: int, state: Tensor) -> tuple[Tensor, Tensor]:
            # Behind the last target of a depth nothing counts.
            room = input_ids.shape[1] - 1 - number
            read = state[:, :room]
            if number == 0 or self.heads is None:
                logits = unembedding(read)
            else:
                logits = self.heads.logits(number, read, unembedding, position_ids_BT=positions[:, :room])
            logits = logits.flatten(0, 1).float()
            targets = alignment.target_tokens(input_ids, number)[:, :room].flatten()
            loss = nn.functional.cross_entropy(logits, targets)
            return loss, loss.detach()

        parameters = [unembedding.weight, *([] if self.heads is None else self.heads.parameters())]
        if unembedding.bias is not None:
            parameters.append(unembedding.bias)
        loss, self.losses = in_chunks(piece, 1 + self.depth, hidden, parameters)
        return {"loss": loss}


class PretrainTrainer(SafeTrainer):
    """transformers' Trainer; logs the cross-entropy of each head, in nats a token."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._totals: Tensor | None = None
        self._steps = 0

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(model, inputs, *args, **kwargs)
        losses = self.accelerator.unwrap_model(self.model).losses
        self._totals = losses if self._totals is None else self._totals + losses
        self._steps += 1
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._totals is not None and "loss" in logs:
            for k, value in enumerate((self._totals / self._steps).tolist()):
                logs[f"ce_{k}"] = value
            self._totals, self._steps = None, 0
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        write_whole(folder / WEIGHTS, save(_distinct(self.accelerator.unwrap_model(self.model))))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        kept = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        self.accelerator.unwrap_model(self.model).load_state_dict(kept, strict=False)


def _distinct(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, tied ones once."""
    return {name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}


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
        if ranks.count() > 1:
            raise UserError(f"mtpd pretrain: {ranks.count()} processes are not accepted; accepted: one")
        return _pretrain(recipe, progress=progress)


def _pretrain(recipe: PretrainRecipe, *, progress: bool) -> Path:
    run = recipe.output
    if (run / "recipe.yaml").is_file():
        if load_pretrain_recipe(run / "recipe.yaml") != recipe:
            raise UserError(
                f"output: {run} holds a run of another recipe; accepted: another directory, or the same recipe"
            )
    elif not is_empty(run):
        raise UserError(f"output: {run} holds something else than a run; accepted: a new or empty directory")
    device = resolve_device(recipe.device)
    dtype = resolve_dtype(recipe.dtype, device)
    tokenizer = _tokenizer(recipe.tokenizer)
    torch.manual_seed(recipe.seed)
    model = _model(recipe, tokenizer).to(device)
    trunk = Trunk(model, tokens=len(tokenizer))
    trunk.check()
    heads = _heads(recipe, trunk)
    whole = PretrainModel(trunk, heads).to(device)
    if recipe.train.compile:
        for layer in trunk.decoder.layers:
            layer.compile()
    rows = stream_rows(tokenizer, recipe.data.texts, row_length=recipe.data.row_length)
    held_out = stream_rows(
        tokenizer, recipe.data.held_out, row_length=recipe.data.row_length, limit=recipe.data.held_out_rows
    )
    write_whole(run / "recipe.yaml", dump(recipe))
    arguments = _arguments(recipe, dtype=dtype, device=device)
    # None is what transformers takes for its own AdamW.
    optimizer = muon_and_adamw(whole, trunk.decoder.layers, arguments) if recipe.train.optimizer == "muon" else None
    trainer = PretrainTrainer(
        model=whole,
        args=arguments,
        optimizers=(optimizer, None),
        train_dataset=[{"input_ids": row.long()} for row in rows],
        callbacks=[Metrics(run / "metrics.jsonl")],
    )
    for each in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(each)
    if progress:
        trainer.add_callback(Progress())
    trainer.train_safely()
    whole.eval().requires_grad_(False)
    write_whole(run / "held-out.json", json.dumps(held_out_losses(whole, held_out, dtype=dtype), indent=2) + "\n")
    with replacing(run / "model") as folder:
        model.to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    if heads is not None:
        heads.config = heads.config.model_copy(update={"trunk": trunk_fingerprint(model)})
        save_heads(heads, run / "heads")
    return run


@torch.no_grad()
def held_out_losses(model: PretrainModel, rows: Tensor, *, dtype: torch.dtype, batch: int = 8) -> dict[str, float]:
    """Cross-entropy of each head on held-out rows, in nats a token; `ce_0` is the main head's."""
    totals = torch.zeros(1 + model.depth)
    device = next(model.parameters()).device
    for part in rows.split(batch):
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            model(part.long().to(device))
        assert model.losses is not None
        totals += model.losses.float().cpu() * len(part)
    return {f"ce_{k}": value for k, value in enumerate((totals / len(rows)).tolist())} | {"rows": float(len(rows))}


def _tokenizer(name: str) -> Any:
    if name == "bytes":
        # No sentinels: one token a byte, and padding, end and unknown.
        return ByT5Tokenizer(extra_ids=0)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"tokenizer: {name} cannot be loaded ({reason}); accepted: bytes, a hub id, a directory"
        ) from error


def _model(recipe: PretrainRecipe, tokenizer: Any) -> Any:
    """A new model with the vocabulary and special tokens of the tokenizer."""
    settings = dict(recipe.model)
    kind = settings.pop("model_type", None)
    if not isinstance(kind, str):
        raise UserError("model.model_type: is missing; accepted: an architecture of transformers, such as llama")
    settings.setdefault("vocab_size", len(tokenizer))
    settings.setdefault("max_position_embeddings", 4 * recipe.data.row_length)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        config = AutoConfig.for_model(kind, **{**special, **settings})
    except Exception as error:
        raise UserError(f"model: {str(error).splitlines()[0]}; accepted: a configuration of transformers") from error
    if config.vocab_size < len(tokenizer):
        raise UserError(
            f"model.vocab_size: {config.vocab_size} is less than the tokenizer has; accepted: at least {len(tokenizer)}"
        )
    try:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"model: {str(error).splitlines()[0]}; accepted: a configuration of transformers") from error


def _heads(recipe: PretrainRecipe, trunk: Trunk) -> AnyParallel | None:
    if not recipe.heads.depth:
        return None
    form = {"kind": KIND.name, "depth": recipe.heads.depth, KIND.name: {"block": recipe.heads.block}}
    settings = HeadsRecipe.model_validate(form).model_dump()
    heads: Any = build_heads(trunk, configure_heads(settings, trunk, vocabulary=0, fingerprint=""))
    start_heads(heads, trunk, "identity", lambda: (), seed=recipe.seed)
    return heads


def _arguments(recipe: PretrainRecipe, *, dtype: torch.dtype, device: torch.device) -> TrainingArguments:
    train = recipe.train
    return TrainingArguments(
        output_dir=str(recipe.output),
        seed=recipe.seed,
        data_seed=recipe.seed,
        num_train_epochs=train.epochs,
        max_steps=train.max_steps,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.scheduler,
        warmup_steps=train.warmup_ratio if train.warmup_ratio < 1 else 0,
        weight_decay=train.weight_decay,
        adam_beta2=0.95,
        per_device_train_batch_size=train.micro_batch_rows,
        save_strategy="steps" if train.save_steps else "epoch",
        save_steps=train.save_steps or 500,
        save_total_limit=2,
        logging_steps=train.logging_steps,
        report_to="none",
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=device.type == "cpu",
        remove_unused_columns=False,
        dataloader_pin_memory=device.type != "cpu",
        disable_tqdm=True,
        log_level="error",
    )


def stream_rows(tokenizer: Any, source: str, *, row_length: int, limit: int | None = None) -> Tensor:
    """Texts as one stream of tokens, cut into rows [N, T] of int32; what does not fill a row at the end is left out.

    Args:
        source: `stdlib`, `stdlib-held-out`, or a .jsonl file of `text` rows.
        limit: rows at most, evenly spaced; None for all.

    Raises:
        UserError: no row is full.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for text in _texts(source):
        ids += [*tokenizer(text, add_special_tokens=False)["input_ids"], *end]
    count = len(ids) // row_length
    if not count:
        raise UserError(f"data.row_length: {row_length} is more than the {len(ids)} tokens of {source}")
    rows = torch.tensor(ids[: count * row_length], dtype=torch.int32).view(count, row_length)
    if limit is not None and limit < count:
        rows = rows[torch.arange(limit) * count // limit]
    return rows


def _texts(source: str) -> Iterator[str]:
    if source in (stdlib.SOURCE, stdlib.HELD_OUT):
        yield from (text for _, text in stdlib.documents(source))
        return
    for row in load_prompts(source):
        if not isinstance(row.prompt, str):
            raise UserError(f"{source}: row {row.id} is a conversation; accepted: `text` rows")
        yield row.prompt + (row.response if isinstance(row.response, str) else "")
