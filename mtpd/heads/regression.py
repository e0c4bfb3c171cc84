"""Ridge regression of the trunk's state k positions further on its state here: how heads on h_t start."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from mtpd import alignment
from mtpd.heads.chain.start import RIDGE
from mtpd.trunk import Trunk


@torch.no_grad()
def shift_maps(
    trunk: Trunk,
    batches: Iterable[dict[str, Tensor]],
    *,
    depth: int,
    read: Callable[[Tensor], Tensor] | None = None,
    undo: Tensor | None = None,
) -> list[Tensor]:
    """M_1..M_K, each [D, D] in float32, with M_k f(h_t) near to h_{t+k}.

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
