"""Acceptance by really decoding, beside two baselines on the same prompts in the same process.

The baselines are plain `generate` of transformers, and mtpd's own engine without drafts: a speed-up against the first
has in it how much slower that loop is, one against the second is what the drafts gain.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch

from mtpd.data.packing import Sample
from mtpd.decode.chances import Chances
from mtpd.decode.corpus import Corpus
from mtpd.decode.counts import Counts
from mtpd.decode.drafting import HEADS, Drafting
from mtpd.decode.model import Model
from mtpd.decode.speed import engine_texts, generated, now
from mtpd.evaluate.acceptance import DrafterCounts, PromptCounts, SuiteCounts
from mtpd.evaluate.drafters import DRAFTERS
from mtpd.files import fingerprint_json, short
from mtpd.heads import Heads
from mtpd.progress import Bar
from mtpd.trunk import Trunk

TIE_UNITS = 4
"""Logits this many units of rounding (of the largest logit) apart are a tie."""


def measure_decoded(
    trunk: Trunk,
    heads: Heads,
    samples: Sequence[Sample],
    *,
    chances: Chances | None = None,
    corpus: Corpus | None = None,
    max_new_tokens: int,
    end_tokens: Collection[int],
    progress: bool = True,
) -> dict[str, SuiteCounts]:
    """Decodes each prompt greedily: with transformers, with the engine without drafts, and with drafts.

    Which goes first changes from prompt to prompt.

    Args:
        heads: draft a chain in every round, which is what counts by depth are of.
        samples: their prompts are decoded, one at a time; responses are not read.
        chances: how often drafts are right, to decode also with heads and look-up together, and with each alone;
            None does not.
        corpus: other texts in which continuations are looked up too.
        max_new_tokens: the same limit for all.

    Returns:
        Counts by family; `identical` says in how many prompts the text of the chain was that of `generate`, `ties` in
        how many it parted from it at a tie.
    """
    rows: dict[str, list[PromptCounts]] = {}
    if not samples:
        return {}
    model = Model(trunk, heads, chances=chances, corpus=corpus)
    limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "end_tokens": end_tokens, "batch": 1}
    drafting: dict[str, Model] = (
        {} if chances is None else {name: model.drafting_with(sources=sources) for name, sources in DRAFTERS.items()}
    )
    ways: dict[str, Callable[[Sequence[int]], tuple[list[int], Counts | None]]] = {
        "plain": lambda prompt: (generated(trunk, [prompt], **limits)[0], None),
        "engine": lambda prompt: _written(Model(trunk, None, drafting=Drafting(sources=(HEADS,))), prompt, limits),
        "chain": lambda prompt: _written(Model(trunk, heads, drafting=Drafting(depth=heads.depth)), prompt, limits),
        **{name: partial(_written, each, limits=limits) for name, each in drafting.items()},
    }
    # One short text each that is not timed: first calls allocate and load.
    limits["max_new_tokens"] = min(8, max_new_tokens)
    for way in ways.values():
        way(samples[0].prompt_ids)
    limits["max_new_tokens"] = max_new_tokens
    for turn, sample in enumerate(Bar(samples, desc="decoding", disable=not progress)):
        names = list(ways)
        first = turn % len(names)
        texts: dict[str, list[int]] = {}
        counts: dict[str, Any] = {}
        seconds: dict[str, float] = {}
        for name in [*names[first:], *names[:first]]:
            began = now(trunk)
            texts[name], counts[name] = ways[name](sample.prompt_ids)
            seconds[name] = now(trunk) - began
        tokens, plain = texts["chain"], texts["plain"]
        row = PromptCounts.of(
            counts["chain"],
            id=sample.id,
            prompt=short(fingerprint_json(sample.prompt_ids)),
            text=short(fingerprint_json(tokens)),
            seconds=seconds["chain"],
            plain_seconds=seconds["plain"],
            engine_seconds=seconds["engine"],
            identical=tokens == plain,
            tie=tokens != plain
            and parted_at_tie(trunk, torch.tensor(sample.prompt_ids, device=trunk.device), plain, tokens),
            drafters={
                name: DrafterCounts(
                    tokens=counts[name].tokens,
                    forwards=counts[name].forwards,
                    seconds=seconds[name],
                    sources=counts[name].sources,
                )
                for name in drafting
            }
            or None,
        )
        rows.setdefault(sample.family or "prompts", []).append(row)
    return {family: SuiteCounts.of(members, heads.depth) for family, members in rows.items()}


def _written(model: Model, prompt: Sequence[int], limits: dict[str, Any]) -> tuple[list[int], Counts | None]:
    [text], counts = engine_texts(model, [prompt], **limits)
    return text, counts


@torch.inference_mode()
def parted_at_tie(trunk: Trunk, prompt: torch.Tensor, text: list[int], other: list[int]) -> bool:
    """Whether two texts part where the main head rates both tokens the same, to rounding.

    A pass over one token and a pass over several round differently; in 16 bits that decides between
    tokens whose logits are a few units in the last place apart.
    """
    place = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), None)
    if place is None:
        return False
    prefix = torch.cat([prompt, prompt.new_tensor(text[:place])])
    logits = trunk.unembedding(trunk.hidden(prefix[None])[0, -1]).float()
    gap = (logits[text[place]] - logits[other[place]]).abs()
    return bool(gap <= TIE_UNITS * torch.finfo(trunk.dtype).eps * logits.abs().max())
