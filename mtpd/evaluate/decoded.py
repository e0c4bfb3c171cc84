"""Acceptance by really decoding, beside two baselines on the same prompts in the same process.

The baselines are plain `generate` of transformers, and mtpd's own engine without drafts: a speed-up against the first
has in it how much slower that loop is, one against the second is what the drafts gain.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

from mtpd.data.generation import plain_generation
from mtpd.data.packing import Sample
from mtpd.decode.counts import Counts
from mtpd.decode.greedy import generate
from mtpd.evaluate.acceptance import PromptCounts, SuiteCounts
from mtpd.files import fingerprint_json, short
from mtpd.heads import Heads
from mtpd.trunk import Trunk

TIE_UNITS = 4
"""Logits this many units of rounding (of the largest logit) apart are a tie."""


def measure_decoded(
    trunk: Trunk,
    heads: Mapping[str, Heads],
    samples: Sequence[Sample],
    *,
    max_new_tokens: int,
    end_tokens: Collection[int],
    progress: bool = True,
) -> dict[str, dict[str, SuiteCounts]]:
    """Decodes each prompt greedily: with transformers, with the engine without drafts, and with each set of heads.

    Which goes first changes from prompt to prompt.

    Args:
        heads: sets of heads by name, such as before and after training.
        samples: their prompts are decoded, one at a time; responses are not read.
        max_new_tokens: the same limit for all.

    Returns:
        For each name, counts by family; `identical` says in how many prompts the text was that of `generate`,
        `ties` in how many it parted from it at a tie.
    """
    rows: dict[str, dict[str, list[PromptCounts]]] = {name: {} for name in heads}
    if not samples:
        return {name: {} for name in heads}
    prompts = [torch.tensor(sample.prompt_ids, device=trunk.device) for sample in samples]
    # One short text each that is not timed: first calls allocate and load.
    _plain(trunk, prompts[0], 4, end_tokens)
    for each in (None, *heads.values()):
        generate(trunk, each, prompts[0], max_new_tokens=8, end_tokens=end_tokens)
    for turn, sample in enumerate(tqdm(samples, desc="decoding", disable=not progress)):
        prompt = prompts[turn]
        decoded = _in_turns(trunk, heads, prompt, turn, max_new_tokens=max_new_tokens, end_tokens=end_tokens)
        text = decoded.plain
        for name, (tokens, counts, seconds) in decoded.drafted.items():
            row = PromptCounts.of(
                counts,
                id=sample.id,
                prompt=short(fingerprint_json(sample.prompt_ids)),
                text=short(fingerprint_json(tokens)),
                seconds=seconds,
                plain_seconds=decoded.plain_seconds,
                engine_seconds=decoded.engine_seconds,
                identical=tokens == text,
                tie=tokens != text and parted_at_tie(trunk, prompt, text, tokens),
            )
            rows[name].setdefault(sample.family or "prompts", []).append(row)
    return {
        name: {family: SuiteCounts.of(members, heads[name].depth) for family, members in families.items()}
        for name, families in rows.items()
    }


@dataclass
class _Decoded:
    """One prompt, decoded in all ways."""

    plain: list[int] = field(default_factory=list)
    """Text of `generate`."""
    plain_seconds: float = 0.0
    engine_seconds: float = 0.0
    drafted: dict[str, tuple[list[int], Counts, float]] = field(default_factory=dict)
    """By name of the heads: text, counts and seconds."""


def _in_turns(
    trunk: Trunk,
    heads: Mapping[str, Heads],
    prompt: torch.Tensor,
    turn: int,
    *,
    max_new_tokens: int,
    end_tokens: Collection[int],
) -> _Decoded:
    """Decodes in all ways; the first one is another one at each turn, so that none is always the one after a pause."""
    found = _Decoded()

    def plainly() -> None:
        began = _now(trunk)
        found.plain = _plain(trunk, prompt, max_new_tokens, end_tokens)
        found.plain_seconds = _now(trunk) - began

    def with_engine(name: str | None) -> None:
        began = _now(trunk)
        drafting = None if name is None else heads[name]
        tokens, counts = generate(trunk, drafting, prompt, max_new_tokens=max_new_tokens, end_tokens=end_tokens)
        seconds = _now(trunk) - began
        if name is None:
            found.engine_seconds = seconds
        else:
            found.drafted[name] = (tokens, counts, seconds)

    ways: list[Callable[[], None]] = [plainly, *(partial(with_engine, name) for name in (None, *heads))]
    first = turn % len(ways)
    for way in [*ways[first:], *ways[:first]]:
        way()
    return found


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


def _plain(trunk: Trunk, prompt: torch.Tensor, max_new_tokens: int, end_tokens: Collection[int]) -> list[int]:
    """Greedy text of transformers' own `generate`, without the penalties that a checkpoint may ask for."""
    ends = sorted(end_tokens)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0
    )
    with plain_generation(trunk.model), torch.inference_mode():
        output = trunk.model.generate(
            prompt[None], attention_mask=torch.ones_like(prompt)[None], generation_config=config
        )
    return output[0, len(prompt) :].tolist()


def _now(trunk: Trunk) -> float:
    if trunk.device.type == "cuda":
        torch.cuda.synchronize(trunk.device)
    return time.perf_counter()
