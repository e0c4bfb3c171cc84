"""One round of drafting and verification as the papers have it. The oracle of `engine.py`, which is what decoding runs.

Speculative decoding (Leviathan et al., arXiv 2211.17192, algorithm 1; Chen et al., arXiv 2302.01318): the heads draft
x̃_1..x̃_K, each from q_k; one pass of the trunk gives p_1..p_{K+1}, the main head's distributions in the same places;
x̃_k is accepted with probability min(1, p_k(x̃_k) / q_k(x̃_k)). The first draft that is not accepted gives way to a
token from max(0, p_k - q_k), and after K accepted ones follows a token from p_{K+1}. Greedy decoding is the same with
distributions that have all probability on one token (blockwise decoding: Stern et al., arXiv 1811.03115).

There is no cache, no batch and no slot here. Random numbers are those of `mtpd.decode.sampling`.

Legend: V tokens, M columns of the heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mtpd.decode.sampling import inverse_cdf, uniform
from mtpd.heads import Heads
from mtpd.trunk import Trunk

Distribution = Callable[[Tensor], Tensor]
"""Probabilities from logits: [n, M] -> [n, M]."""


def greedy(logits: Tensor) -> Tensor:
    """All probability on the likeliest token."""
    return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()


@torch.inference_mode()
def one_round(
    trunk: Trunk, heads: Heads, text: Sequence[int], depth: int, distribution: Distribution, *, seed: int, place: int
) -> list[int]:
    """Drafts `depth` tokens after a text and verifies them; returns the accepted ones and one more.

    Args:
        text: ids of the prompt and of what was written after it, at least two.
        seed, place: of the text's random numbers: its seed, and how many tokens were written after its prompt.
    """

    def draw(weights_V: Tensor, place: int, stream: int) -> int:
        return int(inverse_cdf(weights_V[None], torch.from_numpy(uniform([seed], [place], 1, stream=stream))[0]))

    drafts: list[int] = []
    q: list[Tensor] = []
    for k in range(1, depth + 1):
        q.append(draft_distribution(trunk, heads, [*text, *drafts], k, distribution))
        drafts.append(draw(q[-1], place + k - 1, stream=1))
    logits_V = trunk.unembedding(trunk.hidden(torch.tensor([[*text, *drafts]], device=trunk.device)))[0]
    p = distribution(logits_V[len(text) - 1 :])

    for k, draft in enumerate(drafts):
        u = uniform([seed], [place + k], 1, stream=2).item()
        if not u * q[k][draft] < p[k, draft]:
            residual = (p[k] - q[k]).clamp_min(0)
            # Where p and q are equal but for rounding, nothing is left: then p is as good.
            return [*drafts[:k], draw(residual if residual.any() else p[k], place + k, stream=3)]
    return [*drafts, draw(p[depth], place + depth, stream=3)]


def draft_distribution(
    trunk: Trunk, heads: Heads, text: Sequence[int], depth: int, distribution: Distribution
) -> Tensor:
    """q [V] of head `depth` after a text whose last depth - 1 tokens are drafts.

    The newest state that is known is that of the last token but one before the drafts: no pass has read the last.
    """
    ids = torch.tensor([list(text)], device=trunk.device)
    hidden = trunk.hidden(ids, before_last=heads.shared_layers)
    along = heads.along(trunk, hidden, ids, position_ids_BT=torch.arange(len(text), device=trunk.device)[None])
    q_M = distribution(along.logits(depth, torch.tensor([len(text) - depth - 1], device=trunk.device)))[0]
    rows = heads.rows()
    columns = torch.arange(len(q_M), device=trunk.device) if rows is None else rows
    return q_M.new_zeros(trunk.unembedding.weight.shape[0]).index_copy(0, columns, q_M)
