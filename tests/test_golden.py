"""Losses of a fixed tiny model, computed once. They notice what changes on both sides of every other comparison."""

from __future__ import annotations

import pytest
import torch
from architectures import SIZES
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mtpd.alignment import IGNORED
from mtpd.heads import HeadsConfig, build_heads
from mtpd.losses.fused import LossSettings
from mtpd.train.model import DistillModel
from mtpd.trunk import Trunk

X = IGNORED


def fill(module: nn.Module) -> None:
    """Weights that are sines, so that no random generator is part of the numbers."""
    with torch.no_grad():
        for index, (_, parameter) in enumerate(sorted(module.named_parameters())):
            wave = torch.sin(1.7 * torch.arange(parameter.numel(), dtype=torch.float64) + index)
            parameter.copy_(0.3 * wave.view_as(parameter) + (parameter.ndim == 1))


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        (LossSettings((1.0, 1.0), (0.0, 0.0)), 7.177520),
        (LossSettings((0.0, 0.0), (1.0, 1.0)), 1.195457),
        (LossSettings((0.3, 0.3), (0.5, 0.5), top_n=10), 2.159706),
        (LossSettings((0.3, 0.1), (0.5, 0.2), top_n=10, teacher_temperature=0.5), 1.569121),
    ],
    ids=["ce", "kl", "mtp_d", "sharp"],
)
def test_golden_losses(settings: LossSettings, loss: float) -> None:
    """Fault: a change of model, alignment or loss that no other test compares with anything fixed."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    fill(model)
    trunk = Trunk(model, tokens=120)
    heads = build_heads(trunk, HeadsConfig(depth=2, hidden_size=trunk.hidden_size, source_layers=[2, 2]))
    fill(heads)
    row = {
        "input_ids": [[11, 7, 93, 40, 25, 66, 8, 31, 77, 102, 5, 0]],
        "labels": [[X, X, 93, 40, 25, 66, X, 31, 77, 102, 5, X]],
        "position_ids": [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 0]],
    }
    ours = DistillModel(trunk, heads, settings)(**{key: torch.tensor(value) for key, value in row.items()})["loss"]
    assert ours.item() == pytest.approx(loss, rel=1e-4)
