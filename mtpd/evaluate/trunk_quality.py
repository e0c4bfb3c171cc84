"""The main head itself: perplexity on a suite's responses, and the share of right answers where a suite has answers.

A run that trains heads alone cannot change either. One that trains more than heads can, and this says by how much.
A main head that predicts prompts no better than chance has random weights: acceptance and speed then mean nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mtpd.data.packing import Sample
from mtpd.evaluate.offline import TILE_BYTES, text_batches
from mtpd.evaluate.suites import Question
from mtpd.trunk import Trunk

CHANCE = 0.95
"""A model that has learned anything has less than this share of the loss of a uniform guess, log V nats a token."""
CHANCE_PROMPTS, CHANCE_TOKENS = 8, 256
"""Prompts, and tokens of each, on which that is measured at most."""

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class TrunkQuality:
    """One model on one suite."""

    tokens: int
    """Response tokens that the perplexity is over."""
    loss: float
    """Summed negative log-likelihood of them, in nats."""
    right: int | None = None
    """Answers that match the reference; None where the suite has none."""
    answers: int = 0

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss / self.tokens) if self.tokens else float("nan")

    @property
    def score(self) -> float | None:
        """Share of right answers."""
        return self.right / self.answers if self.right is not None and self.answers else None


@torch.inference_mode()
def negative_log_likelihood(trunk: Trunk, samples: Sequence[Sample]) -> tuple[float, int]:
    """Sums the negative log-likelihood of all response tokens, in nats, and counts them."""
    spans = [(len(sample.prompt_ids), len(sample.ids)) for sample in samples]
    unembedding = trunk.unembedding.select(None)
    tile = max(1, TILE_BYTES // (4 * unembedding.weight.shape[0]))
    loss, tokens = 0.0, 0
    for members in text_batches(spans, len(samples) or 1):
        width = max(spans[member][1] for member in members)
        ids_BT = torch.zeros(len(members), width, dtype=torch.long)
        used_BT = torch.zeros(len(members), width, dtype=torch.bool)
        for row, member in enumerate(members):
            first, last = spans[member]
            ids_BT[row, :last] = torch.tensor(samples[member].ids)
            # A token without anything before it has no prediction.
            used_BT[row, max(first, 1) - 1 : last - 1] = True
        ids_BT = ids_BT.to(trunk.device)
        positions_BT = torch.arange(width, device=trunk.device).expand_as(ids_BT)
        hidden_PD = trunk.hidden(ids_BT, position_ids=positions_BT).flatten(0, 1)
        ids_P = ids_BT.flatten()
        for rows in used_BT.flatten().to(trunk.device).nonzero().squeeze(1).split(tile):
            logits = unembedding(hidden_PD[rows]).float()
            loss += torch.nn.functional.cross_entropy(logits, ids_P[rows + 1], reduction="sum").item()
            tokens += len(rows)
    return loss, tokens


def at_chance(trunk: Trunk, prompts: Sequence[Sequence[int]]) -> bool:
    """Whether the main head predicts text no better than a uniform guess, as a model with random weights does.

    Args:
        prompts: token ids of text that the model has not written itself.
    """
    texts = [ids[:CHANCE_TOKENS] for ids in prompts[:CHANCE_PROMPTS] if len(ids) > 1]
    loss, tokens = negative_log_likelihood(trunk, [Sample.of("", ids[:1], ids[1:]) for ids in texts])
    real = trunk.tokens or trunk.unembedding.weight.shape[0]
    return bool(tokens) and loss / tokens >= CHANCE * math.log(real)


def right_answers(tokenizer: Any, questions: Sequence[Question], samples: Sequence[Sample]) -> tuple[int, int]:
    """Counts responses that give the number of the reference, and prompts whose reference has one."""
    answers = {question.prompt.id: question.answer for question in questions}
    right = asked = 0
    for sample in samples:
        wanted = last_number(answers.get(sample.id) or "")
        if wanted is None:
            continue
        asked += 1
        right += last_number(tokenizer.decode(sample.response_ids, skip_special_tokens=True)) == wanted
    return right, asked


def last_number(text: str) -> float | None:
    """The last number in a text; 1,200.50 is read as one number, 7.0 and 7 are equal."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def trunk_quality(
    trunk: Trunk,
    tokenizer: Any,
    questions: Sequence[Question],
    texts: Sequence[Sample],
    own: Sequence[Sample],
    *,
    match: str | None,
) -> TrunkQuality:
    """Measures one model on one suite.

    Args:
        texts: responses that the perplexity is over: the same for all models that are compared.
        own: the model's own greedy responses, which hold its answers.
        match: how the suite compares answers; None where it has none.
    """
    loss, tokens = negative_log_likelihood(trunk, texts)
    if match is None:
        return TrunkQuality(tokens, loss)
    right, asked = right_answers(tokenizer, questions, own)
    return TrunkQuality(tokens, loss, right, asked)
