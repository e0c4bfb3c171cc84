"""The gain of a norm, whichever way its class stores it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def gain(norm: nn.Module) -> Tensor:
    """Reads the factor [D] that a norm multiplies with; some classes store it as 1 + weight."""
    weight: Any = norm.weight
    return weight.detach() + _gain_offset(norm)


def set_gain(norm: nn.Module, value: Tensor) -> None:
    """Makes `value` [D] the factor that the norm multiplies with."""
    weight: Any = norm.weight
    with torch.no_grad():
        weight.copy_(value - _gain_offset(norm))


def unit_norm(final_norm: nn.Module) -> nn.Module:
    """Copies a norm and sets its gain to 1, whichever way the class stores it."""
    norm = copy.deepcopy(final_norm)
    set_gain(norm, torch.ones_like(gain(norm)))
    return norm


def _gain_offset(norm: nn.Module) -> float:
    """Gives 1.0 where the class computes (1 + weight) * x (Gemma), 0.0 where it computes weight * x."""
    probe: Any = copy.deepcopy(norm)
    if probe.weight.is_meta:
        # A norm without values (a run that is only planned) computes nothing: the probe needs some.
        probe.to_empty(device="cpu")
    with torch.no_grad():
        probe.weight.zero_()
        ones = torch.ones_like(probe.weight)
        return float(probe(ones).float().mean().round())
