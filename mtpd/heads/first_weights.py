"""First weights that several kinds of heads share: silent decoder layers, and a ridge regression of later states."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from mtpd import alignment
from mtpd.errors import UnsupportedModel
from mtpd.heads.norms import gain, set_gain
from mtpd.trunk import Trunk

RIDGE = 1e-2
"""Ridge of the regression, as a share of the mean variance of the inputs."""

SMALLEST_GAIN = 1e-2
"""Gains below this (relative to the largest) are not inverted: 1/g would only amplify rounding."""


def source_layers(start: str, depth: int, layers: int) -> list[int]:
    """Chooses the trunk's layer (0-based) that gives the block of each head its kind, and for copies its weights."""
    if start == "copy_last_k":
        # Fewer layers than heads: the first heads share the trunk's first layer.
        return [max(0, layers - depth + k) for k in range(depth)]
    return [layers - 1] * depth


def silence(layer: nn.Module, model: str) -> None:
    """Makes a decoder layer add nothing to its residual path, in a way that it can learn its way out of.

    Where a norm follows attention and MLP (Gemma, OLMo2), its gain becomes zero: behind a zeroed
    projection that norm would blow the first update up to full size. Elsewhere the two output
    projections become zero.

    Raises:
        UnsupportedModel: the layer has none of the usual names.
    """
    if hasattr(layer, "post_feedforward_layernorm"):
        for name in ("post_attention_layernorm", "post_feedforward_layernorm"):
            norm = layer.get_submodule(name)
            set_gain(norm, torch.zeros_like(gain(norm)))
        return
    outputs = [(name, value) for name, value in layer.named_parameters() if "o_proj" in name or "down_proj" in name]
    if not any("o_proj" in name for name, _ in outputs) or not any("down_proj" in name for name, _ in outputs):
        raise UnsupportedModel(
            f"{model}: heads.init: identity and regression need layers with `o_proj` and `down_proj`; "
            "accepted here: copy_last, copy_last_k, random"
        )
    for _, value in outputs:
        value.zero_()


def inverse_gain(values: Tensor) -> Tensor:
    """Inverts gains [D], but for tiny ones."""
    smallest = SMALLEST_GAIN * values.abs().max()
    signs = torch.where(values < 0, -1.0, 1.0)
    return signs / values.abs().clamp_min(smallest)


@torch.no_grad()
def shift_maps(
    trunk: Trunk,
    batches: Iterable[dict[str, Tensor]],
    *,
    depth: int,
    read: Callable[[Tensor], Tensor] | None = None,
    undo: Tensor | None = None,
) -> list[Tensor]:
    """Fits M_1..M_K, each [D, D] in float32, so that M_k f(h_t) is near to h_{t+k}.

    Args:
        batches: rows with `labels`, `position_ids` [B, T] and `hidden` [B, T, D]; read once.
        read: f; None reads h_t as it is.
        undo: factor [D] that is taken off h_{t+k} first, whose length is then made the same everywhere: what a
            final norm with this inverse gain gives back.
    """
    size, device = trunk.hidden_size, trunk.device
    inputs = torch.zeros(depth, size, size, dtype=torch.float64, device=device)
    outputs = torch.zeros(depth, size, size, dtype=torch.float64, device=device)
    for batch in batches:
        hidden = batch["hidden"].to(device).float()
        seen = hidden if read is None else read(hidden)
        for k in range(1, depth + 1):
            counted = alignment.counted(batch["labels"].to(device), batch["position_ids"].to(device), k)
            b, t = counted.nonzero(as_tuple=True)
            x, y = seen[b, t], hidden[b, alignment.teacher_row(t, k)]
            if undo is not None:
                y = y * undo
                y = y * y.pow(2).mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()
            inputs[k - 1] += (x.T @ x).double()
            outputs[k - 1] += (x.T @ y).double()
    eye = torch.eye(size, dtype=torch.float64, device=device)
    maps = []
    for k in range(depth):
        # Where a text is too short for a depth, the map stays what passes the state on.
        ridge = RIDGE * inputs[k].diagonal().mean()
        if ridge > 0:
            maps.append(torch.linalg.solve(inputs[k] + ridge * eye, outputs[k]).T.float())
        else:
            maps.append(eye.float())
    return maps
