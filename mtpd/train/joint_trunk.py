"""Joint training of heads and trunk: of LoRA adapters on the trunk's layers (through PEFT), or of all its parameters.

The heads' gradient reaches the trunk, and the main head's own cross-entropy holds it to its text. The teacher is the
trunk as it was, or as it is at the step, without gradient. What comes out is a model of its own.

With all parameters the main head is trained too, by its own loss and by that of every head. Logits never exist for
more than a block of rows (`mtpd.losses.fused`), so their memory does not grow with the number of heads, which is what
the order of Gloeckle et al. (arXiv 2404.19737, section 2) is for.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mtpd.data.packing import Sample
from mtpd.errors import MtpdError
from mtpd.evaluate.trunk_quality import TrunkQuality, negative_log_likelihood
from mtpd.files import replacing, sealed, write_whole
from mtpd.heads import Readout
from mtpd.heads.adapters import ALPHA
from mtpd.parallel import ranks
from mtpd.recipe import Recipe
from mtpd.trunk import GROUPED, Trunk

WEIGHTS = "trunk-{}.safetensors"
"""In a checkpoint, beside the heads: what is trained of the trunk."""
CHECK_STEPS = 50
"""Steps from one measurement of the main head's perplexity to the next."""


class JointTrunk:
    """A trunk that is trained.

    Args:
        original_teacher: whether the teacher is the trunk as it was.
        learning_rate: of the trunk's parameters, where it is not that of the heads.
        dtype: number format of products; None for that of the trunk as it comes.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    """What is trained, in float32."""

    def __init__(
        self,
        trunk: Trunk,
        *,
        original_teacher: bool,
        learning_rate: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.trunk, self.original_teacher = trunk, original_teacher
        self.learning_rate = learning_rate
        self.dtype = dtype or trunk.dtype

    @property
    def trunks(self) -> list[Trunk]:
        """The trunk, and that of the teacher where it is another one."""
        return [self.trunk]

    def states(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Hidden states [B, T, D] of the trunk as it is, with gradient."""
        states: Tensor = self.trunk.decoder(
            input_ids=input_ids, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        return states

    def original(self) -> AbstractContextManager[Trunk]:
        """Within it, the trunk that it was before."""
        raise NotImplementedError

    def readout(self, frozen: Readout) -> Readout:
        """The main head at this step.

        Args:
            frozen: as it was before.
        """
        return frozen

    def save(self, folder: Path) -> None:
        tensors = {name: each.detach().cpu().contiguous() for name, each in self.parameters.items()}
        write_whole(folder / WEIGHTS.format(self.name), save(tensors, metadata={"format": "pt"}))

    def load(self, folder: Path) -> None:
        found = load_file(folder / WEIGHTS.format(self.name))
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(found[name])

    def write(self, folder: Path, tokenizer: Any) -> None:
        """Finishes the model, and writes it as a checkpoint that appears whole or not at all.

        The main rank writes, and the others wait for it.
        """
        self._finish()

        def save_model() -> None:
            with replacing(folder) as beside:
                self.trunk.model.save_pretrained(beside)
                tokenizer.save_pretrained(beside)

        ranks.from_main(save_model)

    def _finish(self) -> None:
        raise NotImplementedError


class AdaptedTrunk(JointTrunk):
    """Adapters on every linear layer of the trunk's decoder, of which half start at 0: nothing changes at first.

    Args:
        rank: of the adapters.
        seed: of the half that does not start at 0.
    """

    name = "adapters"

    def __init__(self, trunk: Trunk, *, rank: int, seed: int, **settings: Any) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        super().__init__(trunk, **settings)
        layers = trunk.decoder.layers
        names = sorted(name for name, module in layers.named_modules() if type(module) is nn.Linear)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=ALPHA * rank, target_modules=names), layers)
        self.modules: list[Any] = [module for module in layers.modules() if isinstance(module, LoraLayer)]
        self.parameters = {name: each for name, each in layers.named_parameters() if "lora_" in name}
        for parameter in self.parameters.values():
            parameter.data = parameter.data.float()

    @contextmanager
    def original(self) -> Iterator[Trunk]:
        for module in self.modules:
            module.enable_adapters(False)
        try:
            yield self.trunk
        finally:
            for module in self.modules:
                module.enable_adapters(True)

    def _finish(self) -> None:
        """Merges the adapters for good."""
        layers = self.trunk.decoder.layers
        for name, module in list(layers.named_modules()):
            if module in self.modules:
                module.merge()
                layers.set_submodule(name, module.get_base_layer())
        for attribute in ("peft_config", "active_adapter"):
            layers.__dict__.pop(attribute, None)


class FullTrunk(JointTrunk):
    """All parameters, in float32 while they are trained; a teacher that is the original is a second model."""

    name = "weights"

    def __init__(self, trunk: Trunk, **settings: Any) -> None:
        super().__init__(trunk, **settings)
        self.before = Trunk(copy.deepcopy(trunk.model), tokens=trunk.tokens) if self.original_teacher else None
        trunk.model.float().requires_grad_(True)
        if trunk.config._experts_implementation == "grouped_mm":
            # Their weights are in float32 now, and computed in the format of autocast as all others.
            trunk.config._experts_implementation = GROUPED
        self.parameters = dict(trunk.model.named_parameters())

    @property
    def trunks(self) -> list[Trunk]:
        return [self.trunk] if self.before is None else [self.trunk, self.before]

    @contextmanager
    def original(self) -> Iterator[Trunk]:
        assert self.before is not None, "a teacher that is the trunk as it was"
        yield self.before

    def readout(self, frozen: Readout) -> Readout:
        """Over weights with gradient, in the number format of the run."""
        main = self.trunk.unembedding
        bias = None if main.bias is None else main.bias.to(self.dtype)
        main = replace(main, weight=main.weight.to(self.dtype), bias=bias)
        teacher = None if self.before is None else Readout.of(self.before, frozen.rows)
        return Readout.over(main, frozen.rows, teacher)

    def _finish(self) -> None:
        self.trunk.model.requires_grad_(False).to(self.dtype)
        if self.trunk.config._experts_implementation == GROUPED:
            self.trunk.config._experts_implementation = "grouped_mm"


def main_head_quality(trunk: Trunk, samples: Sequence[Sample]) -> TrunkQuality:
    """Perplexity of the main head on the responses of samples."""
    loss, tokens = negative_log_likelihood(trunk, samples)
    return TrunkQuality(tokens, loss)


class PerplexityLimit(TrainerCallback):
    """Measures the main head's perplexity every `CHECK_STEPS`, and ends the training where it has risen too far.

    Args:
        before: its perplexity before the training, on the same samples.
        path: a file that gets both perplexities at the end.
    """

    def __init__(self, trunk: Trunk, samples: Sequence[Sample], recipe: Recipe, before: float, path: Path) -> None:
        self.trunk, self.samples, self.before, self.path = trunk, samples, before, path
        self.max_rise = recipe.trunk.max_rise

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step % CHECK_STEPS == 0 or state.global_step == state.max_steps:
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
                f"trunk.max_rise: {self.max_rise} allows; lower trunk.learning_rate"
            )
        return now
