"""Where the state before a norm can be handed on instead of the state after it.

Heads of mtpd learn from states after a norm, and some layouts hand on the state before it. Write the norm
as y = g * n(x) with n(x) = x / rms(x), gain g, and * by element; the next head's own norm, of gain h, reads
the one or the other:

    after      h * n(y) = h * n(g * x) = h * g * x / rms(g * x)      n forgets the factor 1 / rms(x)
    before     h' * n(x) = h' * x / rms(x)

Both are the same for every x if and only if rms(g * x) / rms(x) is one number, h' = h * g over that number.
Its square is a weighted mean of the squares of g with weights x_i^2, and so the same for all x exactly where
|g_i| = c for all i. Otherwise the quotient changes from position to position; as the head adds the
embedding's half to what it makes of the state, no change of its weights undoes that. Scaling the residual
stream instead (x' = g * x, so that "before" reads the right direction) moves the same quotient into the
block's own norms, in front of attention and MLP, which do not forget it. Nor does folding g into the output
head (W diag(g), g := 1) help heads that are trained already: it makes heads that learn so from the start
right in both conventions, which are those with g = 1 below.

Where |g_i| = c, signs remain: h' = h * sign(g). They are moved into the head that has them, so that both
conventions agree, with S = diag(sign(g)): all that writes to its residual stream gets its rows multiplied
with S, and its gains become S times what they were. The stream is then x' = S x, rms(x') = rms(x), its
norms read S S = 1, and the last one gives c n(x') = c S n(x) = g * n(x): what it gave before, bit for bit.

With the norm's epsilon e and m = mean(x^2), "after" over "before" is (m / (m + e) + e / c^2)^(-1/2), off by at
most e/2 times the larger of 1/m and 1/c^2: a small c has to be large beside the square root of e.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mtpd.formats.find_heads import BLOCK
from mtpd.formats.layer_names import Tensors
from mtpd.formats.tensors import computed

SHARE = 1e-3
"""Of c^2, that epsilon may be: 5e-4 of a state then."""

WRITERS = ("project.weight", f"{BLOCK}self_attn.o_proj.weight", f"{BLOCK}mlp.down_proj.weight")
"""Tensors of a head of Llama's or Qwen's layer whose rows are its residual stream."""

READERS = (f"{BLOCK}input_layernorm.weight", f"{BLOCK}post_attention_layernorm.weight", "block.norm.weight")
"""Gains that multiply the stream."""


def same_size(gain: Tensor, *, eps: float) -> bool:
    """Whether all gains [D] of a norm are c or -c, with c large enough beside epsilon."""
    size = gain.abs().float()
    return bool((size == size[0]).all()) and eps <= SHARE * float(size[0]) ** 2


def upright(heads: Tensors, index: int) -> Tensors:
    """The tensors of all heads, in which one computes what it did with positive gains in its last norm.

    Args:
        index: of the head, whose layer is one of Llama's or Qwen's, without biases in what it writes.
    """
    prefix = f"layers.{index}."
    signs = heads[f"{prefix}block.norm.weight"].load().float().sign()
    if bool((signs > 0).all()):
        return heads
    rows = {prefix + name: computed(heads[prefix + name], partial(_times, signs[:, None])) for name in WRITERS}
    gains = {prefix + name: computed(heads[prefix + name], partial(_times, signs)) for name in READERS}
    return {**heads, **rows, **gains}


def _times(signs: Tensor, tensor: Tensor) -> Tensor:
    return torch.where(signs < 0, -tensor, tensor)
