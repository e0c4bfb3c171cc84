"""Whether answers that another program wrote are the trunk's: one pass of the trunk over some of them.

Greedy answers are what the trunk finds most likely, up to ties. Drawn ones are as probable as the settings imply: the
mean of log p(token) + H(p) over many draws from p is 0, where H is the entropy of the distribution that a token was
drawn from. Another model, another quantisation, or a penalty of the server is none of this.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtpd.data.answers.task import Answered
from mtpd.decode.sampling import Sampling, temperature_and_top_p
from mtpd.errors import UserError
from mtpd.trunk import Trunk

SAMPLED = 64
"""Answers that are looked at, at most."""
FIRST = 16
"""Answers that are looked at before any is kept, where they come from a server."""
AGREEING = 0.98
"""Share of greedy tokens that have to be the trunk's most likely ones, or tied with them."""
OUTSIDE = 0.02
"""Share of drawn tokens that may lie outside of what top-p leaves; its border moves with rounding."""
DEVIATION = 0.02
"""Nats by which the mean log-probability of drawn tokens may differ from what is implied, beyond chance."""
STANDARD_ERRORS = 5.0
"""How many standard errors are chance."""
POSITIONS = 256
"""Positions whose logits are in memory at a time."""


@dataclass
class _Found:
    tokens: int = 0
    agreeing: int = 0
    outside: int = 0
    deviation: float = 0.0
    variance: float = 0.0


def check_answers(trunk: Trunk, answered: Sequence[Answered], *, temperature: float, top_p: float, source: str) -> None:
    """Refuses answers that are not the trunk's at these settings.

    Args:
        source: where they come from, for the message.

    Raises:
        UserError: saying what was found.
    """
    chosen = [answered[number * len(answered) // SAMPLED] for number in range(SAMPLED)]
    chosen = chosen if len(answered) > SAMPLED else list(answered)
    found = _Found()
    for task, response in chosen:
        for logits, tokens in _predictions(trunk, task.ids, response):
            if temperature == 0:
                _count_greedy(found, logits, tokens, trunk.dtype)
            else:
                _count_drawn(found, Sampling(temperature_and_top_p(temperature, top_p)).distribution(logits), tokens)
    if not found.tokens:
        return
    told = f"data.responses: {source}: these are not the responses of this model"
    causes = (
        "the server may have another model, another number format or quantisation, another chat template, or a "
        "penalty in its generation settings"
    )
    if temperature == 0 and found.agreeing < AGREEING * found.tokens:
        raise UserError(
            f"{told} at data.temperature 0: {found.agreeing / found.tokens:.1%} of {found.tokens:,} tokens are its "
            f"most likely ones; accepted: {AGREEING:.0%}; {causes}"
        )
    if temperature > 0:
        inside = found.tokens - found.outside
        settings = f"at data.temperature {temperature:g} and data.top_p {top_p:g}"
        if found.outside > OUTSIDE * found.tokens:
            raise UserError(
                f"{told} {settings}: {found.outside / found.tokens:.1%} of {found.tokens:,} tokens could not have been "
                f"drawn; accepted: {OUTSIDE:.0%}; {causes}"
            )
        mean = found.deviation / inside
        allowed = DEVIATION + STANDARD_ERRORS * math.sqrt(found.variance) / inside
        if abs(mean) > allowed:
            raise UserError(
                f"{told} {settings}: the mean log-probability of {inside:,} tokens is {abs(mean):.3f} nats "
                f"{'above' if mean > 0 else 'below'} what the settings imply; accepted: {allowed:.3f}; {causes}"
            )


def _predictions(trunk: Trunk, prompt: Sequence[int], response: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits [T, V] before tokens [T] of an answer, in parts."""
    ids = torch.tensor([[*prompt, *response]], device=trunk.device)
    hidden = trunk.hidden(ids)[0, len(prompt) - 1 : -1]
    with torch.no_grad():
        for start in range(0, len(response), POSITIONS):
            part = slice(start, start + POSITIONS)
            yield trunk.unembedding(hidden[part]).float(), ids[0, len(prompt) :][part]


def _count_greedy(found: _Found, logits: Tensor, tokens: Tensor, dtype: torch.dtype) -> None:
    best = logits.amax(-1)
    chosen = logits.gather(-1, tokens[:, None])[:, 0]
    # Ties: logits that the number format cannot tell apart. Wider than that, answers of 8-bit weights pass as well.
    tie = max(torch.finfo(dtype).eps / 2, 1e-5)
    found.tokens += len(tokens)
    found.agreeing += int((best - chosen <= tie * best.abs()).sum())


def _count_drawn(found: _Found, probabilities: Tensor, tokens: Tensor) -> None:
    p = probabilities.double()
    logs = p.clamp_min(1e-300).log()
    entropy = -(p * logs).sum(-1)
    variance = (p * logs.square()).sum(-1) - entropy.square()
    drawn = p.gather(-1, tokens[:, None])[:, 0] > 0
    own = logs.gather(-1, tokens[:, None])[:, 0]
    found.tokens += len(tokens)
    found.outside += int((~drawn).sum())
    found.deviation += float((own + entropy)[drawn].sum())
    found.variance += float(variance.clamp_min(0)[drawn].sum())
