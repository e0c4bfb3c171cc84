"""Muon for the matrices of decoder layers, AdamW for everything else, as one optimizer.

Muon (https://kellerjordan.github.io/posts/muon/) replaces the momentum of a matrix by the nearest orthogonal one. It is
meant for matrices between hidden states: embeddings, unembeddings, norms and biases stay with AdamW. Its steps are
scaled to the size of AdamW's (arXiv 2502.16982), so that one learning rate and one weight decay serve both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments


class MuonAndAdamW(torch.optim.Optimizer):
    """Both of torch's, with common groups and state: schedules and checkpoints see one optimizer.

    Args:
        matrices: parameters of two dimensions that Muon steps on.
        others: groups of parameters as torch takes them, which AdamW steps on.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        others: Iterable[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
    ) -> None:
        self._muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self._adamw = torch.optim.AdamW(others, lr=lr, betas=betas, fused=True)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both."""
        # Loading a checkpoint puts others in their place.
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self._muon.state = self._adamw.state = self.state
        loss: float | None = self._muon.step(closure)
        self._adamw.step()
        return loss


def muon_and_adamw(model: nn.Module, layers: Iterable[nn.Module], args: TrainingArguments) -> MuonAndAdamW:
    """Makes the optimizer of a model: matrices in `layers` are Muon's; of the others, matrices alone decay."""
    trained = [each for each in model.parameters() if each.requires_grad]
    inside = {id(each) for layer in layers for each in layer.parameters()}
    matrices = [each for each in trained if id(each) in inside and each.ndim == 2]
    own = {id(each) for each in matrices}
    others = _groups([each for each in trained if id(each) not in own], args)
    betas = (args.adam_beta1, args.adam_beta2)
    return MuonAndAdamW(matrices, others, lr=args.learning_rate, weight_decay=args.weight_decay, betas=betas)


def with_decoder_layer(heads: nn.Module) -> list[nn.Module]:
    """Lists the heads that have a decoder layer, whose matrices lie between hidden states."""
    return [each for each in heads.modules() if isinstance(getattr(each, "block", None), nn.Module)]


def adamw(model: nn.Module, args: TrainingArguments) -> torch.optim.AdamW:
    """Makes AdamW for all that is trained; matrices alone decay."""
    groups = _groups([each for each in model.parameters() if each.requires_grad], args)
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), fused=True)


def _groups(parameters: Iterable[Tensor], args: TrainingArguments) -> list[dict[str, Any]]:
    parameters = list(parameters)
    return [
        {"params": [each for each in parameters if each.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [each for each in parameters if each.ndim < 2], "weight_decay": 0.0},
    ]
