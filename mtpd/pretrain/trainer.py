"""The trainer of `mtpd pretrain`: that of `mtpd distill`, which also measures the model on held-out text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from mtpd.errors import MtpdError
from mtpd.losses.settings import LossSums
from mtpd.pretrain.muon import adamw, muon_and_adamw, with_decoder_layer
from mtpd.train.model import DistillModel
from mtpd.train.trainer import HeadTrainer

MAIN = "eval_ce_0"
"""What the best checkpoint goes by."""
BATCH = 8
"""Held-out rows measured at a time."""


class Diverged(MtpdError):
    """The main head's loss on held-out text rose too far."""


class PretrainTrainer(HeadTrainer):
    """A trainer of a model and its heads.

    Args:
        held_out: rows [N, T] that are measured.
        max_rise: share by which the main head's loss on them may rise above the lowest so far.
        muon: whether Muon steps on the matrices of the decoder layers.
    """

    def __init__(
        self,
        model: DistillModel,
        args: TrainingArguments,
        *others: Any,
        held_out: Tensor,
        max_rise: float,
        muon: bool,
        **options: Any,
    ) -> None:
        # transformers wants a data set of the same kind wherever it is to evaluate.
        wanted, args.eval_strategy = args.eval_strategy, "no"
        super().__init__(model, args, *others, **options)
        args.eval_strategy = wanted
        self.held_out, self.max_rise, self.muon = held_out, max_rise, muon

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer: Any = self.optimizer  # type: ignore[has-type]
        if optimizer is None:
            model = self.distill_model
            layers = [model.trunk.decoder.layers, *with_decoder_layer(model.heads)]
            self.optimizer = muon_and_adamw(model, layers, self.args) if self.muon else adamw(model, self.args)
        return self.optimizer

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Losses and shares of accepted drafts on held-out text, logged and given to the callbacks.

        Raises:
            Diverged: the main head's loss rose too far.
        """
        found = held_out_metrics(self.distill_model, self.held_out, dtype=self._number_format())
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        control: Any = self.control  # type: ignore[has-type]
        self.control = self.callback_handler.on_evaluate(self.args, self.state, control, metrics)
        best, now = self.state.best_metric, metrics[MAIN]
        if best is not None and not now <= best * (1.0 + self.max_rise):
            raise Diverged(
                f"the main head's held-out loss rose from {best:.4f} to {now:.4f} by step {self.state.global_step}, "
                f"more than evaluation.max_rise: {self.max_rise} allows; lower train.learning_rate"
            )
        return metrics

    def _number_format(self) -> torch.dtype:
        joint = self.distill_model.joint
        assert joint is not None, "the trunk is trained"
        return joint.dtype

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.distill_model.heads.depth:
            super()._save(output_dir, state_dict)
        elif self.args.should_save and self.distill_model.joint is not None:
            self.distill_model.joint.save(Path(output_dir or str(self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.distill_model.heads.depth:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif self.distill_model.joint is not None:
            self.distill_model.joint.load(Path(resume_from_checkpoint))


@torch.no_grad()
def held_out_metrics(model: DistillModel, rows_NT: Tensor, *, dtype: torch.dtype) -> dict[str, float]:
    """Measures a model and its heads along rows of text.

    Returns:
        `ce_k`, the cross-entropy of each head in nats a token (`ce_0` is the main head's), and `car_k`, the share of
        positions at which the first k drafts are what the main head chooses.
    """
    device = model.trunk.device
    totals: Tensor | None = None
    for part in rows_NT.split(BATCH):
        ids = part.long().to(device)
        positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            model(ids, ids, positions)
        main, heads = model.main_sums, model.sums
        assert main is not None, "the trunk is trained"
        assert heads is not None
        sums = torch.cat([_stacked(main), _stacked(heads)], dim=1).double()
        totals = sums if totals is None else totals + sums
    assert totals is not None, "at least one row"
    counted, cross_entropy, accepted = totals.cpu()
    found = {f"ce_{k}": (cross_entropy[k] / counted[k]).item() for k in range(len(counted))}
    return found | {f"car_{k}": (accepted[k] / counted[1]).item() for k in range(1, len(counted))}


def _stacked(sums: LossSums) -> Tensor:
    return torch.stack([sums.rows, sums.cross_entropy, sums.accepted])
