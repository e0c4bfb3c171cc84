"""Acceptance by really decoding, beside plain `generate` on the same prompts in the same process."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

from mtpd.data.generation import plain_generation
from mtpd.data.packing import Sample
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
    """Decodes each prompt greedily: plainly with transformers, then with each set of heads.

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
    for each in heads.values():
        generate(trunk, each, prompts[0], max_new_tokens=8, end_tokens=end_tokens)
    for sample, prompt in tqdm(list(zip(samples, prompts, strict=True)), desc="decoding", disable=not progress):
        began = _now(trunk)
        text = _plain(trunk, prompt, max_new_tokens, end_tokens)
        plain_seconds = _now(trunk) - began
        for name, each in heads.items():
            began = _now(trunk)
            tokens, counts = generate(trunk, each, prompt, max_new_tokens=max_new_tokens, end_tokens=end_tokens)
            row = PromptCounts.of(
                counts,
                id=sample.id,
                prompt=short(fingerprint_json(sample.prompt_ids)),
                text=short(fingerprint_json(tokens)),
                seconds=_now(trunk) - began,
                plain_seconds=plain_seconds,
                identical=tokens == text,
                tie=tokens != text and parted_at_tie(trunk, prompt, text, tokens),
            )
            rows[name].setdefault(sample.family or "prompts", []).append(row)
    return {
        name: {family: SuiteCounts.of(members, heads[name].depth) for family, members in families.items()}
        for name, families in rows.items()
    }


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
