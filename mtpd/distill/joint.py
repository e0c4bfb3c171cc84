"""Joint training of heads and trunk: LoRA adapters on the trunk's layers, through PEFT.

The heads' gradient reaches the trunk, and the main head's own cross-entropy holds it to its text. The teacher is the
trunk without its adapters, or as it is at the step, without gradient. What comes out is a model of its own, with the
adapters merged into its weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mtpd import ranks
from mtpd.data.packing import Sample
from mtpd.errors import MtpdError
from mtpd.evaluate.trunk_quality import TrunkQuality, negative_log_likelihood
from mtpd.files import sealed, write_whole
from mtpd.heads.adapters import ALPHA
from mtpd.recipe import Recipe
from mtpd.trunk import Trunk

ADAPTERS = "trunk-adapters.safetensors"
"""In a checkpoint, beside the heads."""


class JointTrunk:
    """Adapters on every linear layer of the trunk's decoder, of which half start at 0: nothing changes at first.

    Args:
        rank: of the adapters; they are trained in float32.
        loss_weight: of the main head's own cross-entropy.
        original_teacher: whether the teacher is the trunk without adapters.
        seed: of the half that does not start at 0.
    """

    def __init__(self, trunk: Trunk, *, rank: int, loss_weight: float, original_teacher: bool, seed: int) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        self.trunk, self.loss_weight, self.original_teacher = trunk, loss_weight, original_teacher
        layers = trunk.decoder.layers
        names = sorted(name for name, module in layers.named_modules() if type(module) is nn.Linear)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=ALPHA * rank, target_modules=names), layers)
        self.modules: list[Any] = [module for module in layers.modules() if isinstance(module, LoraLayer)]
        self.parameters = {name: each for name, each in layers.named_parameters() if "lora_" in name}
        for parameter in self.parameters.values():
            parameter.data = parameter.data.float()

    def states(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Hidden states [B, T, D] of the adapted trunk, with gradient."""
        states: Tensor = self.trunk.decoder(
            input_ids=input_ids, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        return states

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it the trunk is the one that it was before."""
        for module in self.modules:
            module.enable_adapters(False)
        try:
            yield
        finally:
            for module in self.modules:
                module.enable_adapters(True)

    def save(self, folder: Path) -> None:
        tensors = {name: each.detach().cpu().contiguous() for name, each in self.parameters.items()}
        write_whole(folder / ADAPTERS, save(tensors, metadata={"format": "pt"}))

    def load(self, folder: Path) -> None:
        found = load_file(folder / ADAPTERS)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(found[name])

    def write_merged(self, folder: Path, tokenizer: Any) -> None:
        """Merges the adapters for good, and writes the model as a checkpoint that appears whole or not at all.

        The main rank writes, and the others wait for it.
        """
        layers = self.trunk.decoder.layers
        for name, module in list(layers.named_modules()):
            if module in self.modules:
                module.merge()
                layers.set_submodule(name, module.get_base_layer())
        for attribute in ("peft_config", "active_adapter"):
            layers.__dict__.pop(attribute, None)
        if ranks.is_main():
            beside = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(beside, ignore_errors=True)
            self.trunk.model.save_pretrained(beside)
            tokenizer.save_pretrained(beside)
            shutil.rmtree(folder, ignore_errors=True)
            beside.rename(folder)
        ranks.barrier()


def main_head_quality(trunk: Trunk, samples: Sequence[Sample]) -> TrunkQuality:
    """Perplexity of the main head on the responses of samples."""
    loss, tokens = negative_log_likelihood(trunk, samples)
    return TrunkQuality(tokens, loss)


class PerplexityLimit(TrainerCallback):
    """Measures the main head's perplexity every so many steps, and ends the training where it has risen too far.

    Args:
        before: its perplexity without adapters, on the same samples.
        path: a file that gets both perplexities at the end.
    """

    def __init__(self, trunk: Trunk, samples: Sequence[Sample], recipe: Recipe, before: float, path: Path) -> None:
        self.trunk, self.samples, self.before, self.path = trunk, samples, before, path
        self.steps, self.max_rise = recipe.trunk.check_steps, recipe.trunk.max_rise

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step % self.steps == 0 or state.global_step == state.max_steps:
            self.check(state.global_step)

    def check(self, step: int) -> float:
        """The perplexity now.

        Raises:
            MtpdError: it has risen by more than the recipe allows.
        """
        now = float(ranks.from_main(lambda: main_head_quality(self.trunk, self.samples).perplexity))
        if ranks.is_main():
            write_whole(self.path, json.dumps(sealed({"step": step, "before": self.before, "after": now})) + "\n")
        if not now <= self.before * (1.0 + self.max_rise):
            raise MtpdError(
                f"the main head's perplexity rose from {self.before:.4f} to {now:.4f} by step {step}, more than "
                f"trunk.max_rise: {self.max_rise} allows; raise trunk.loss_weight, or lower train.learning_rate"
            )
        return now
