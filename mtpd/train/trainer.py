"""The trainer: transformers' own, with checkpoints that hold the heads and not the trunk, for one process or many."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from mtpd.data.packing import PackedRows, collate
from mtpd.data.store import HiddenStates, with_hidden
from mtpd.files import write_whole, writing
from mtpd.heads import restore_heads, save_heads
from mtpd.parallel.document_attention import by_documents
from mtpd.parallel.partition import gathered, make_whole
from mtpd.progress import Bar
from mtpd.train import checkpoints
from mtpd.train.finished_depths import FinishedDepths
from mtpd.train.model import DistillModel
from mtpd.train.optimizer_state import OPTIMIZER, load_state, put_state, save_state, state_of
from mtpd.train.rows import PartOfStates, RowOrder, TrainingRows
from mtpd.train.safe_trainer import SafeTrainer


class HeadTrainer(SafeTrainer):
    """Trains the heads of a `DistillModel`.

    The trunk's states come from the store; those that it lacks, all of them without one, from the trunk.
    Callbacks, schedulers, `report_to`, accumulation and resuming are transformers'. Different are:
    checkpoints (heads and optimizer only, both whole, whichever way they are sharded), the order of rows, and the
    logs, which have CE, divergence and the teacher-forced share of accepted drafts for each depth, of all processes.
    """

    def __init__(
        self,
        model: DistillModel,
        args: TrainingArguments,
        rows: PackedRows,
        *,
        store: HiddenStates | None = None,
        below: FinishedDepths | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        progress: bool = True,
        skip_bad_batches: int = 0,
    ) -> None:
        split = model.split
        parts, ahead = (1, 0) if split is None else (split.parts, split.ahead)
        stores = [each for each in (store, None if below is None else below.store) if each is not None]
        super().__init__(
            model=model,
            args=args,
            train_dataset=TrainingRows(rows, multiple=_round(args, parts), parts=parts, ahead=ahead, stores=stores),
            data_collator=collate,
            callbacks=list(callbacks),
            skip_bad_batches=skip_bad_batches,
        )
        assert (below.depth if below is not None else 0) == model.after, "the depths without a loss"
        self.store = store if store is None or split is None else PartOfStates(store, split)
        self.below = below
        self._attention = split or by_documents(model.trunk, rows.row_length)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if progress:
            self.add_callback(Progress())
        self._totals: Tensor | None = None
        self._began = time.monotonic()
        self._order: RowOrder | None = None
        self._chosen: str | None = None

    @property
    def distill_model(self) -> DistillModel:
        return self.accelerator.unwrap_model(self.model)

    @property
    def engine(self) -> Any:
        """DeepSpeed's, while it trains; None without DeepSpeed."""
        return self.model_wrapped if self.is_deepspeed_enabled else None

    @property
    def step_rows(self) -> int:
        """Rows of an optimizer step, of all processes."""
        args, split = self.args, self.distill_model.split
        together = args.world_size // (1 if split is None else split.parts)
        return int(args.train_batch_size * args.gradient_accumulation_steps * together)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        tokens = inputs.pop("tokens").sum()
        inputs = self.with_states(inputs)
        result = super().compute_loss(model, inputs, *args, **kwargs)
        sums = self.distill_model.sums
        assert sums is not None
        by_depth = torch.stack([sums.rows, sums.cross_entropy, sums.divergence, sums.accepted]).detach()
        main = self.distill_model.main_sums
        of_main = by_depth.new_zeros(2) if main is None else torch.cat([main.rows, main.cross_entropy]).to(by_depth)
        step = torch.cat([by_depth.flatten(), of_main, tokens.to(by_depth).view(1)])
        self._totals = step if self._totals is None else self._totals + step
        return result

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        before = self._totals
        with self._attending():
            loss = super().training_step(model, inputs, *args, **kwargs)
        if self.skipping:
            self._totals = before
        return loss

    def _attending(self) -> AbstractContextManager[None]:
        """Attention of parts of rows, or document after document where rows are long."""
        if self._attention is None:
            return nullcontext()
        model = self.distill_model
        trunks = [model.trunk] if model.joint is None else model.joint.trunks
        finished = [] if self.below is None else [self.below.heads]
        return self._attention.attending(*(trunk.decoder for trunk in trunks), model.heads, *finished)

    def suspects(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The states of what is not trained; a trunk that needs all processes cannot give them to one."""
        if self.distill_model.trunk.partitioned or self.distill_model.split is not None:
            return {}
        found = self.with_states(inputs)
        return {name: found[name] for name in ("hidden", "below") if name in found}

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, in which the trunk may have a learning rate of its own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        joint = self.distill_model.joint
        if joint is None or joint.learning_rate is None:
            return optimizer
        own = set(map(id, joint.parameters.values()))
        for group in list(optimizer.param_groups):
            mine = [each for each in group["params"] if id(each) in own]
            group["params"] = [each for each in group["params"] if id(each) not in own]
            optimizer.add_param_group({**group, "params": mine, "lr": joint.learning_rate})
        return optimizer

    def with_states(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch with the states of what is not trained: the trunk, and finished depths."""
        rows = batch["row"]
        joint = self.distill_model.joint
        if joint is not None and not joint.original_teacher:
            return {name: tensor for name, tensor in batch.items() if name != "row"}
        if joint is not None:
            with joint.original() as trunk:
                return with_hidden(batch, trunk, self.store)
        before_last = self.distill_model.heads.shared_layers
        batch = with_hidden(batch, self.distill_model.trunk, self.store, before_last=before_last)
        if self.below is not None:
            batch["below"] = self.below({**batch, "row": rows})
        return batch

    def flush(self) -> None:
        """Makes the states that were kept durable."""
        for store in (self.store, self.below):
            if store is not None:
                store.flush()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._totals is not None and "loss" in logs:
            totals = self.accelerator.reduce(self._totals).cpu()
            rows, cross_entropy, divergence, accepted = totals[:-3].view(4, len(totals[:-3]) // 4)
            main_rows, main_cross_entropy, tokens = totals[-3:].tolist()
            now = time.monotonic()
            settings = self.distill_model.settings
            after = self.distill_model.after
            if main_rows:
                logs["ce_0"] = main_cross_entropy / main_rows
            for k, depth in enumerate(range(after + 1, after + 1 + len(rows))):
                count = max(1.0, rows[k].item())
                logs[f"ce_{depth}"] = cross_entropy[k].item() / count
                if any(settings.beta):
                    logs[f"{settings.entry.logged or settings.loss}_{depth}"] = divergence[k].item() / count
                # Of all places where depth 1 drafts, as CAR is defined. Teacher-forced on training text:
                # the file acceptance.json, not this, says how well the heads draft. Where depth 1 is finished,
                # nothing says whether its drafts would have been accepted.
                if not after:
                    logs[f"train_car_{depth}"] = accepted[k].item() / max(1.0, rows[0].item())
            logs["tokens_per_second"] = tokens / max(1e-9, now - self._began)
            self._totals, self._began = None, now
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        result = super().train(*args, **kwargs)
        self._release()
        return result

    def _release(self) -> None:
        """Heads that stage 3 partitioned are whole again, and those that were chosen are loaded."""
        if self.engine is None:
            return
        heads = self.distill_model.heads
        parts = {name: each for name, each in heads.named_parameters() if hasattr(each, "ds_id")}
        tensors = gathered(heads) if parts else {}
        # Its hooks on the parameters would keep the state of the optimizer.
        self.engine.destroy()
        if parts:
            make_whole(heads, {id(each): tensors[name].to(each.device) for name, each in parts.items()})
        if self._chosen is not None:
            checkpoints.check(Path(self._chosen))
            self._load_from_checkpoint(self._chosen)

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(rows)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._order = RowOrder(rows, seed=seed, batch=self.args.train_batch_size)
        return self._order

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # The loader that goes on in the middle of an epoch does not say which one it is to a sampler that is split.
        if self._order is not None:
            self._order.set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        # The engine takes the heads as they are; of its own checkpoints there are none.
        if resume_from_checkpoint is not None:
            self._load_from_checkpoint(resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self._save(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        heads = self.distill_model.heads
        tensors = gathered(heads, keep=self.args.should_save)
        if self.args.should_save:
            save_heads(heads, folder, tensors=tensors)
            if self.distill_model.joint is not None:
                self.distill_model.joint.save(folder)
        self.flush()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = state_of(self.distill_model, self.optimizer, self.engine)
        if self.args.should_save:
            save_state(state, Path(output_dir) / OPTIMIZER, step_rows=self.step_rows)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = load_state(Path(checkpoint) / OPTIMIZER, self.distill_model)
        put_state(state, self.distill_model, self.optimizer, self.engine)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore_heads(self.distill_model.heads, resume_from_checkpoint)
        if self.distill_model.joint is not None:
            self.distill_model.joint.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.engine is None:
            super()._load_best_model()
        else:
            self._chosen = self.state.best_model_checkpoint


def _round(args: TrainingArguments, parts: int) -> int:
    """Rows of one micro batch of all processes, `parts` of which share a row: a sampler gives a multiple of it."""
    if args.world_size == 1 or args.dataloader_drop_last:
        return 1
    return int(args.train_batch_size * args.world_size // parts)


class Metrics(TrainerCallback):
    """Appends what is logged to `metrics.jsonl`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drops what an interrupted run logged after the checkpoint: those steps come again."""
        if state.is_world_process_zero and self.path.is_file():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            write_whole(self.path, "".join(line for line in lines if _is_before(line, state.global_step)))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            line = {"step": state.global_step, **{key: value for key, value in logs.items() if key != "total_flos"}}
            with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _is_before(line: str, step: int) -> bool:
    """Whether a line of metrics is whole, and of this step or an earlier one."""
    try:
        return int(json.loads(line)["step"]) <= step
    except (ValueError, KeyError, TypeError):
        return False


class Progress(TrainerCallback):
    """A bar with loss, tokens/s and the share of accepted drafts by depth."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.bar = Bar(total=state.max_steps, initial=state.global_step, desc="training", unit="step")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.bar is not None and logs and "tokens_per_second" in logs:
            rates = [logs[key] for key in sorted(logs, key=_depth_of) if key.startswith("train_car_")]
            shown = "/".join(f"{rate:.2f}".removeprefix("0") for rate in rates)
            self.bar.set_postfix_str(
                f"loss {logs['loss']:.3f}, {logs['tokens_per_second']:.0f} tokens/s, CAR in training {shown}"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the bar, if there is one."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _depth_of(key: str) -> int:
    tail = key.rpartition("_")[2]
    return int(tail) if tail.isdigit() else 0


def train(trainer: HeadTrainer, resume: str = "auto") -> None:
    """`SafeTrainer.train_safely`, with the states that were kept made durable and the bar closed.

    Raises:
        UserError, MtpdError: as that does.
    """
    try:
        trainer.train_safely(resume)
        trainer.flush()
    finally:
        # A bar left open draws itself once more, below the error that ended the training.
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, Progress):
                callback.close()
