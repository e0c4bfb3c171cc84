"""Acceptance on held-out prompts while training: early stopping, and the best checkpoint by tau.

The machinery is transformers': what is measured here goes through `Trainer.evaluate`, so that `report_to`,
`EarlyStoppingCallback`, `metric_for_best_model` and resuming treat it as any other evaluation.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from mtpd.data.packing import PackedRows, Sample
from mtpd.evaluate.acceptance import PromptCounts, SuiteCounts
from mtpd.evaluate.offline import measure_offline
from mtpd.heads import copy_heads, empty_heads, fill_heads
from mtpd.parallel.partition import gathered
from mtpd.recipe import Recipe
from mtpd.train.model import DistillModel
from mtpd.train.trainer import HeadTrainer

BEST = "eval_tau"
"""What the best checkpoint and early stopping go by."""


def measuring_arguments(recipe: Recipe) -> dict[str, Any]:
    """Training arguments that `evaluation.steps` stands for; none where it is 0."""
    if not recipe.evaluation.steps:
        return {}
    return {
        "eval_strategy": "steps",
        "eval_steps": recipe.evaluation.steps,
        # The best heads can be kept only if there is a checkpoint wherever they are measured.
        "save_strategy": SaveStrategy.STEPS,
        "save_steps": recipe.evaluation.steps,
        "load_best_model_at_end": True,
        "metric_for_best_model": BEST,
        "greater_is_better": True,
        # Early stopping counts on where an interrupted run stopped counting.
        "restore_callback_states_from_checkpoint": True,
    }


def stopping(recipe: Recipe) -> list[TrainerCallback]:
    """Early stopping, if the recipe asks for it."""
    patience = recipe.evaluation.patience
    return [EarlyStoppingCallback(early_stopping_patience=patience)] if patience else []


class MeasuringTrainer(HeadTrainer):
    """A trainer whose evaluations are offline acceptance on samples.

    Args:
        samples: held-out prompts with the trunk's greedy responses.
        end_tokens: ids that end a text.
    """

    def __init__(
        self,
        model: DistillModel,
        args: TrainingArguments,
        rows: PackedRows,
        *,
        samples: Sequence[Sample],
        end_tokens: Collection[int],
        **options: Any,
    ) -> None:
        # transformers wants a data set of the same kind wherever it is to evaluate; ours are the samples.
        wanted, args.eval_strategy = args.eval_strategy, "no"
        super().__init__(model, args, rows, **options)
        args.eval_strategy = wanted
        self.samples = [Sample(each.id, each.ids, each.response_mask, "all") for each in samples]
        self.families = {each.id: each.family or "prompts" for each in samples}
        self.end_tokens = end_tokens

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """CAR and Σ min(p, q) by depth, and tau, of all and by family; logged, and given to callbacks."""
        found = self._measure()
        metrics = {f"{metric_key_prefix}_tau": found.tau}
        metrics |= {f"{metric_key_prefix}_car_{k}": value for k, value in enumerate(found.car, 1)}
        metrics |= {
            f"{metric_key_prefix}_expected_{k}": value for k, value in enumerate(found.expected_acceptance or [], 1)
        }
        metrics |= {f"{metric_key_prefix}_tau_{name}": tau for name, tau in self._by_family(found).items()}
        self.log(metrics)
        control: Any = self.control  # type: ignore[has-type]
        self.control = self.callback_handler.on_evaluate(self.args, self.state, control, metrics)
        return metrics

    def _by_family(self, found: SuiteCounts) -> dict[str, float]:
        """Tau of each family of prompts; none where there is only one."""
        families: dict[str, list[PromptCounts]] = {}
        for row in found.rows or []:
            families.setdefault(self.families[row.id], []).append(row)
        if len(families) < 2:
            return {}
        return {name: SuiteCounts.of(rows, found.depth).tau for name, rows in sorted(families.items())}

    def _measure(self) -> SuiteCounts:
        """Counts of a copy in the trunk's number format, as the finished heads are measured."""
        model = self.distill_model
        heads, trunk = model.heads, model.trunk
        with torch.no_grad():
            if any(hasattr(parameter, "ds_id") for parameter in heads.parameters()):
                # Put together on the host: on the device there is room for them in the trunk's format alone.
                whole = gathered(heads, dtype=trunk.dtype)
                copy = fill_heads(
                    empty_heads(trunk, heads.config), whole.__getitem__, device=trunk.device, dtype=trunk.dtype
                )
            else:
                copy = copy_heads(heads, trunk.dtype)
        copy.eval()
        found = [measure_offline(model.trunk, copy, self.samples, end_tokens=self.end_tokens, progress=False)["all"]]
        # All processes measure, since a partitioned trunk needs them all; what the first one finds decides for all.
        broadcast_object_list(found)
        return found[0]
