"""Greedy decoding with verification: the text of plain decoding, several tokens per forward pass.

A round: the heads draft K tokens; one forward pass of the trunk over the newest token and the K
drafts gives the main head's choice after each of them; the longest prefix of drafts that equals
those choices is accepted, and the main head's own choice follows it (Stern et al., arXiv 1811.03115).
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from mtpd.decode.counts import Counts
from mtpd.heads import Heads
from mtpd.trunk import Trunk, crop


@torch.inference_mode()
def generate(
    trunk: Trunk, heads: Heads, prompt: Tensor, *, max_new_tokens: int, end_tokens: Collection[int] = ()
) -> tuple[list[int], Counts]:
    """Decodes greedily after one prompt.

    Args:
        prompt: token ids [n], n >= 1.
        max_new_tokens: how many tokens at most, at least 1.
        end_tokens: ids that end the text; the one that does is part of the output, as in transformers.

    Returns:
        The new tokens, equal to plain greedy decoding of the same model, and the counts.
    """
    drafter = heads.drafter(trunk)
    cache = trunk.new_cache()
    unembedding = trunk.unembedding

    hidden = trunk.hidden(prompt[None], cache=cache)
    tokens = torch.cat([prompt, unembedding(hidden[0, -1:]).argmax(-1)])
    written = [int(tokens[-1])]
    rounds: list[tuple[int, int]] = []
    while len(written) < max_new_tokens and written[-1] not in end_tokens:
        drafts = drafter.draft(hidden, tokens)
        start = cache.get_seq_length()
        read = torch.cat([tokens[-1:], drafts])
        positions = torch.arange(start, start + len(read), device=read.device)
        hidden = trunk.hidden(read[None], position_ids=positions[None], cache=cache)
        choices = unembedding(hidden[0]).argmax(-1)
        accepted = int((drafts == choices[:-1]).long().cumprod(0).sum())
        rounds.append((len(written), accepted))
        new = choices[: accepted + 1].tolist()[: max_new_tokens - len(written)]
        end = next((place for place, token in enumerate(new, start=1) if token in end_tokens), len(new))
        written += new[:end]

        # The next round continues from the accepted tokens only.
        hidden = hidden[:, : accepted + 1]
        crop(cache, start + accepted + 1)
        tokens = torch.cat([tokens, choices[: accepted + 1]])

    counts = Counts(heads.depth)
    counts.start()
    for before, accepted in rounds:
        counts.round(accepted, room=len(written) - before)
    return written, counts
