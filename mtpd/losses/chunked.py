"""A sum of chunks whose gradient is taken chunk by chunk, so that only what one chunk holds is in memory.

Forward and backward of a chunk run one after the other, inside of the forward pass of the whole; what is kept is
the gradient. With one head a chunk this is the order of Gloeckle et al. (arXiv 2404.19737, section 2): the trunk's
state is cut off, each head adds to its gradient and lets go of its logits, and the sum goes back through the trunk
once. Memory of logits is then O(V) a position, not O(K V).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Chunk = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""(number, state) -> the chunk of the loss, and a tensor to log, without a graph."""


def in_chunks(chunk: Chunk, count: int, state: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Σ of the chunks' losses, and what they log, stacked.

    Args:
        chunk: may read parameters of its own; it is called in order, once each.
        count: number of chunks, at least 1.
        state: what all chunks read; gets gradient where it requires it.
        parameters: all that the chunks read and that are to get gradient.
    """
    loss, logged = _Chunks.apply(chunk, count, state, *parameters)
    return loss, logged


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chunk: Chunk, count: int, state: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        wanted = [each for each in parameters if each.requires_grad]
        cut = state.detach().requires_grad_(state.requires_grad)
        sources = ([cut] if cut.requires_grad else []) + wanted
        needed = any(ctx.needs_input_grad)
        total: Tensor | None = None
        sums: list[Tensor | None] = [None] * len(sources)
        logged = []
        for number in range(count):
            with torch.set_grad_enabled(needed):
                value, seen = chunk(number, cut)
            logged.append(seen)
            if needed and value.requires_grad:
                grads = torch.autograd.grad(value, sources, allow_unused=True)
                for place, grad in enumerate(grads):
                    held = sums[place]
                    if grad is not None:
                        # The first one may be shared with the graph's own buffers: it is copied before it is added to.
                        sums[place] = grad.clone() if held is None else held.add_(grad)
            total = value.detach() if total is None else total + value.detach()
        found = iter(sums)
        first = next(found) if cut.requires_grad else None
        ctx.grads = [first, *(next(found) if each.requires_grad else None for each in parameters)]
        assert total is not None, "at least one chunk"
        stacked = torch.stack(logged)
        ctx.mark_non_differentiable(stacked)
        return total, stacked

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Any, ...]:
        return (None, None, *(None if grad is None else grad * grad_loss.to(grad.dtype) for grad in ctx.grads))
