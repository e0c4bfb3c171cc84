"""A trainer that loses nothing: whole checkpoints, an end on request, and no step with a loss that is no number."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mtpd.errors import MtpdError, UserError
from mtpd.files import write_whole, writing
from mtpd.interrupts import Asked, end, postponed
from mtpd.train import checkpoints

logger = logging.getLogger(__name__)

BAD_BATCHES = "bad-batches"
"""Folder in the run directory with the batches whose loss was NaN or infinite: `step-N.safetensors` and .json."""


class SafeTrainer(Trainer):
    """transformers' trainer with other checkpoints, signals and a check of each loss.

    Args:
        skip_bad_batches: optimizer steps with a loss that is NaN or infinite that may be left out, in a whole run.
    """

    def __init__(self, *args: Any, skip_bad_batches: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if skip_bad_batches and self.args.world_size > 1:
            raise UserError(
                f"train.skip_bad_batches: {skip_bad_batches} is not accepted with several processes, which would have "
                "to leave out the same step; accepted: 0"
            )
        # transformers deletes the old ones before the new one is whole.
        self._keep, self.args.save_total_limit = self.args.save_total_limit, None
        self._saved: int | None = None
        self._allowed, self._skipped = skip_bad_batches, 0
        self.skipping = False
        """Whether the optimizer step that runs is left out."""

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(str(self.args.output_dir))

    def train_safely(self, resume: str = "auto") -> None:
        """Trains to the end of the schedule; Ctrl-C and SIGTERM save a checkpoint after the step and then end.

        Args:
            resume: "auto" for the newest whole checkpoint, or one of the run by name: later ones are deleted then.

        Raises:
            UserError: no such checkpoint.
            MtpdError: a loss or a weight that is no number, or no room for a checkpoint.
        """
        if resume == "auto":
            checkpoint = checkpoints.last_checkpoint(self.directory)
        else:
            checkpoint = checkpoints.named_checkpoint(self.directory, resume)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                checkpoints.discard_after(self.directory, int(checkpoint.name.rpartition("-")[2]))
            self.accelerator.wait_for_everyone()
        if checkpoint is not None and checkpoints.ended(checkpoint):
            # transformers would train one step more.
            self._finish(checkpoint)
            return
        with postponed() as asked:
            self.add_callback(EndOnRequest(asked))
            self.add_callback(WholeSteps(self))
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        self._refuse_lost_weights("the end")

    def _finish(self, checkpoint: Path) -> None:
        best = checkpoints.best_step(checkpoint)
        if self.args.load_best_model_at_end and best is not None:
            checkpoint = checkpoints.folder_of(self.directory, best)
        self._load_from_checkpoint(str(checkpoint))

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss).all():
            self._bad_batch(inputs, loss)
            self.skipping = True
        if self.skipping:
            # Parameters without a gradient are not touched by the optimizer: not by its momentum either.
            model.zero_grad(set_to_none=True)
            # The mean that is logged takes the average loss in place of one that is no number.
            loss = torch.full_like(loss, float("nan"))
        return loss

    def suspects(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Further tensors that a batch's loss comes from, kept beside a batch that has to be looked at."""
        return {}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._skipped:
            logs["skipped_batches"] = self._skipped
        super().log(logs, start_time)

    def _bad_batch(self, inputs: dict[str, Any], loss: Tensor) -> None:
        """Keeps a batch whose loss is no number.

        Raises:
            MtpdError: no more such batches may be left out.
        """
        step = self.state.global_step + 1
        weights = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        found = {**inputs, **self.suspects(inputs)}
        tensors = {name: each.detach().cpu().contiguous() for name, each in found.items() if isinstance(each, Tensor)}
        tensors |= {"row": torch.tensor(inputs["row"])} if "row" in inputs else {}
        bad = [name for name, each in tensors.items() if not torch.isfinite(each).all()]
        if not all(bool(torch.isfinite(weight).all()) for weight in weights):
            bad.append("weights")
        rank = f"-rank-{self.args.process_index}" if self.args.world_size > 1 else ""
        name = f"step-{step}{rank}"
        content = {
            "step": step,
            "loss": str(loss.item()),
            "rows": inputs.get("row"),
            "learning_rate": self._get_learning_rate(),
            "not_finite": bad,
        }
        path = self.directory / BAD_BATCHES / f"{name}.safetensors"
        write_whole(path, save(tensors))
        write_whole(path.with_suffix(".json"), json.dumps(content, indent=1) + "\n")
        self._skipped = len([other for other in self._bad_steps() if other <= step])
        cause = f" ({', '.join(bad)} not finite)" if bad else ""
        if rank or self._skipped > self._allowed:
            how = f"after {self._skipped - 1} that were left out; " if self._allowed else ""
            raise MtpdError(
                f"{path}: the loss of step {step} is {loss.item()}{cause}; {how}the batch is kept there. Lower "
                "train.learning_rate, mend those rows, or allow train.skip_bad_batches, and start over (--fresh)"
            )
        logger.warning("step %d: its loss is %s%s; left out, and kept as %s", step, loss.item(), cause, path)

    def _bad_steps(self) -> set[int]:
        """Steps whose batches were kept; those of a run that was interrupted come again."""
        steps = {file.stem.removeprefix("step-") for file in (self.directory / BAD_BATCHES).glob("step-*.json")}
        return {int(step) for step in steps if step.isdecimal()}

    def _refuse_lost_weights(self, when: str) -> None:
        """Raises MtpdError if what is trained is NaN or infinite somewhere."""
        trained = (parameter for parameter in self.model.parameters() if parameter.requires_grad)
        # Of a parameter that is partitioned, the part of this process.
        if any(not torch.isfinite(getattr(parameter, "ds_tensor", parameter)).all() for parameter in trained):
            raise MtpdError(
                f"training diverged: at {when} the heads hold NaN or infinite weights; lower train.learning_rate "
                "and start over (--fresh)"
            )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        if step == self._saved:
            return
        self._refuse_lost_weights(f"step {step}")
        folder = checkpoints.folder_of(self.directory, step)
        if self.is_world_process_zero():
            # Of an interrupted save, or damaged: a whole one of this step would have been gone on from.
            checkpoints.discard(folder)
        self.accelerator.wait_for_everyone()
        with writing(folder):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            checkpoints.complete(folder, step)
            checkpoints.rotate(self.directory, keep=self._keep, best=self.state.best_global_step)
        self.accelerator.wait_for_everyone()
        self._saved = step

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._init_training_state(*args, **kwargs)
        if self.state.best_global_step:
            # As saved it is a path, of where the run was then.
            best = checkpoints.folder_of(self.directory, self.state.best_global_step)
            self.state.best_model_checkpoint = str(best)
        self._skipped = len([step for step in self._bad_steps() if step <= self.state.global_step])
        return found

    def _load_best_model(self) -> None:
        # A checkpoint has the heads alone; transformers would look for the names of the whole model in it.
        assert self.state.best_model_checkpoint is not None
        checkpoints.check(Path(self.state.best_model_checkpoint))
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class WholeSteps(TrainerCallback):
    """Each optimizer step begins as one that is not left out."""

    def __init__(self, trainer: SafeTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.skipping = False


class EndOnRequest(TrainerCallback):
    """Saves a checkpoint after the step in which a signal came, and ends then. All processes do so after one step."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.agreed = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.agreed = self.asked.signal
        if args.world_size > 1:
            number = torch.tensor(self.agreed, device=args.device)
            torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
            self.agreed = int(number.item())
        if self.agreed:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.agreed:
            end(self.agreed)
