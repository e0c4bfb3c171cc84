"""The trainer: transformers' own, with checkpoints that hold the heads and not the trunk."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from mtpd.data.packing import PackedRows, collate
from mtpd.data.store import HiddenStates, with_hidden
from mtpd.distill.below import FinishedDepths
from mtpd.distill.model import DistillModel
from mtpd.distill.safe_trainer import SafeTrainer
from mtpd.files import write_whole, writing
from mtpd.heads import load_heads, save_heads
from mtpd.losses.settings import LossSettings


class TrainingRows(Dataset[dict[str, Tensor]]):
    """Packed rows, each with its number "row", by which its hidden states are kept."""

    def __init__(self, rows: PackedRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**self.rows[index], "row": torch.tensor(index)}


class HeadTrainer(SafeTrainer):
    """Trains the heads of a `DistillModel`.

    The trunk's states come from the store; those that it lacks, all of them without one, from the trunk.
    Callbacks, schedulers, `report_to`, accumulation and resuming are transformers'. Different are:
    checkpoints (heads and optimizer only), and the logs, which have CE, divergence and the teacher-forced
    share of accepted drafts for each depth.
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
        super().__init__(
            model=model,
            args=args,
            train_dataset=TrainingRows(rows),
            data_collator=collate,
            callbacks=list(callbacks),
            skip_bad_batches=skip_bad_batches,
        )
        assert (below.depth if below is not None else 0) == model.after, "the depths without a loss"
        self.store = store
        self.below = below
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if progress:
            self.add_callback(Progress())
        self._totals: Tensor | None = None
        self._tokens = 0
        self._began = time.monotonic()

    @property
    def distill_model(self) -> DistillModel:
        return self.accelerator.unwrap_model(self.model)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        tokens = inputs["input_ids"].numel()
        inputs = self.with_states(inputs)
        result = super().compute_loss(model, inputs, *args, **kwargs)
        sums = self.distill_model.sums
        assert sums is not None
        step = torch.stack([sums.rows, sums.cross_entropy, sums.divergence, sums.accepted]).detach()
        self._totals = step if self._totals is None else self._totals + step
        self._tokens += tokens
        return result

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        before = self._totals, self._tokens
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.skipping:
            self._totals, self._tokens = before
        return loss

    def suspects(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The states of what is not trained."""
        found = self.with_states(inputs)
        return {name: found[name] for name in ("hidden", "below") if name in found}

    def with_states(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch with the states of what is not trained: the trunk, and finished depths."""
        rows = batch["row"]
        joint = self.distill_model.joint
        if joint is not None and not joint.original_teacher:
            return {name: tensor for name, tensor in batch.items() if name != "row"}
        if joint is not None:
            with joint.disabled():
                return with_hidden(batch, self.distill_model.trunk, self.store)
        batch = with_hidden(batch, self.distill_model.trunk, self.store)
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
            rows, cross_entropy, divergence, accepted = self._totals.cpu()
            now = time.monotonic()
            settings = self.distill_model.settings
            after = self.distill_model.after
            for k, depth in enumerate(range(after + 1, after + 1 + len(rows))):
                count = max(1.0, rows[k].item())
                logs[f"ce_{depth}"] = cross_entropy[k].item() / count
                if any(settings.beta):
                    logs[f"{_name(settings)}_{depth}"] = divergence[k].item() / count
                # Of all places where depth 1 drafts, as CAR is defined. Teacher-forced on training text:
                # the file acceptance.json, not this, says how well the heads draft. Where depth 1 is finished,
                # nothing says whether its drafts would have been accepted.
                if not after:
                    logs[f"train_car_{depth}"] = accepted[k].item() / max(1.0, rows[0].item())
            logs["tokens_per_second"] = self._tokens / max(1e-9, now - self._began)
            self._totals, self._tokens, self._began = None, 0, now
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        save_heads(self.distill_model.heads, folder)
        if self.distill_model.joint is not None:
            self.distill_model.joint.save(folder)
        self.flush()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        heads = self.distill_model.heads
        heads.load_state_dict(load_heads(resume_from_checkpoint, self.distill_model.trunk).state_dict())
        if self.distill_model.joint is not None:
            self.distill_model.joint.load(Path(resume_from_checkpoint))


def _name(settings: LossSettings) -> str:
    """What the logged divergence of one depth is."""
    return "tv" if settings.divergence == "end_to_end_tv" else settings.divergence


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
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step")

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
