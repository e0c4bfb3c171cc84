"""Counts how often drafts of heads and of look-up are right, along texts that were not trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from mtpd.data.packing import Sample
from mtpd.decode.chances import REACH, Chances, lookup_key, step_of
from mtpd.decode.corpus import Corpus
from mtpd.decode.lookup import LONGEST, LookupIndex
from mtpd.evaluate.offline import text_batches
from mtpd.heads import Heads
from mtpd.progress import Bar
from mtpd.trunk import Trunk

CANDIDATES = 4
"""The likeliest tokens of a head that are counted at each place."""
POSITIONS = 256
"""Places whose logits are held at a time."""


class _Cells:
    def __init__(self) -> None:
        self.right: Counter[str] = Counter()
        self.all: Counter[str] = Counter()

    def count(self, key: str, right: bool) -> None:
        self.all[key] += 1
        self.right[key] += right

    def table(self) -> dict[str, tuple[int, int]]:
        return {key: (self.right[key], self.all[key]) for key in sorted(self.all)}


@torch.inference_mode()
def count_chances(
    trunk: Trunk, heads: Heads, samples: Sequence[Sample], *, corpus: Corpus | None = None, progress: bool = True
) -> Chances:
    """Counts right drafts along responses, teacher-forced; nothing is decoded.

    Args:
        heads: in the trunk's number format and in eval mode.
        samples: prompts with the trunk's own greedy responses.
        corpus: other texts in which continuations are looked up too.
    """
    heads_cells, likeliest, lookup, of_corpus = _Cells(), _Cells(), _Cells(), _Cells()
    spans = [(len(sample.prompt_ids), len(sample.ids)) for sample in samples]
    with Bar(total=len(samples), desc="chances of drafts", unit="prompt", disable=not progress) as bar:
        for members in text_batches(spans, 64):
            for member in members:
                ids, first = samples[member].ids, spans[member][0]
                _count_lookup(ids, first, lookup, of_corpus, corpus)
                _count_heads(trunk, heads, ids, first, heads_cells, likeliest)
                bar.update()
        bar.update(len(samples) - bar.n)
    return Chances(
        heads=heads_cells.table(), likeliest=likeliest.table(), lookup=lookup.table(), corpus=of_corpus.table()
    )


def _count_lookup(ids: Sequence[int], first: int, lookup: _Cells, of_corpus: _Cells, corpus: Corpus | None) -> None:
    """At every place of a response; of a continuation, up to its first wrong token."""
    index = LookupIndex(ids[:first])
    for place in range(first, len(ids) - 1):
        index.extend([ids[place]])
        elsewhere = [] if corpus is None else corpus.matches(index.tokens[-LONGEST:], REACH)
        for cells, matches in ((lookup, index.matches(REACH, ways=2)), (of_corpus, elsewhere)):
            for match in matches:
                for ahead, token in enumerate(match.tokens[: len(ids) - place - 1]):
                    right = token == ids[place + 1 + ahead]
                    cells.count(lookup_key(match.length, match.agree, ahead), right)
                    if not right:
                        break


def _count_heads(trunk: Trunk, heads: Heads, ids: Sequence[int], first: int, cells: _Cells, likeliest: _Cells) -> None:
    """At every place of a response, of the likeliest tokens of each depth, given the true tokens before."""
    tokens = torch.tensor([ids], device=trunk.device)
    positions = torch.arange(len(ids), device=trunk.device)[None]
    _, read = trunk.states(tokens, position_ids=positions, before_last=heads.shared_layers)
    along = heads.along(trunk, read, tokens, position_ids_BT=positions)
    rows = heads.rows()
    for depth in range(1, along.depth + 1):
        # The draft of depth k at position t stands at t + k + 1; the token at t + 1 is the main head's own.
        places = torch.arange(first - 1, max(first - 1, len(ids) - depth - 1), device=trunk.device)
        for at in places.split(POSITIONS):
            logits = along.logits(depth, at).float().log_softmax(-1)
            best, columns = logits.topk(min(CANDIDATES, logits.shape[-1]), dim=-1)
            drafted = columns if rows is None else rows[columns]
            right = drafted == tokens[0, at + depth + 1][:, None]
            for values, hits in zip(best.tolist(), right.tolist(), strict=True):
                likeliest.count(str(depth), hits[0])
                for value, hit in zip(values, hits, strict=True):
                    cells.count(f"{depth} {step_of(value)}", hit)
