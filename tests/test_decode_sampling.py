"""Sampling with heads draws from the main head's own distribution."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from architectures import random_heads, random_tokens, tiny_trunk
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mtpd.decode.chances import Chances
from mtpd.decode.choice import Choice
from mtpd.decode.drafting import Drafting
from mtpd.decode.drafts import Drafts
from mtpd.decode.engine import Engine
from mtpd.decode.model import Model
from mtpd.decode.planner import Planner
from mtpd.decode.sampling import SampledDrafts, Sampling, inverse_cdf, temperature_and_top_p, uniform
from mtpd.decode.text import Request, Text
from mtpd.heads import Heads
from mtpd.trunk import Trunk

SAMPLES = 100_000
"""Of the large vocabulary; the texts of the small one, which take more steps, have a fifth of it."""


def chi_square(observed: Tensor, expected: Tensor) -> float:
    """How many standard deviations Pearson's statistic lies above its mean; rare outcomes are taken together."""
    expected = expected.double() / expected.double().sum() * observed.sum()
    rare = expected < 10
    o = torch.cat([observed[~rare].double(), observed[rare].sum()[None].double()])
    e = torch.cat([expected[~rare], expected[rare].sum()[None]])
    o, e = o[e > 0], e[e > 0]
    freedom = len(e) - 1
    return float((((o - e) ** 2 / e).sum() - freedom) / math.sqrt(2 * freedom))


def test_numbers_are_uniform_and_independent() -> None:
    """Fault: neighbouring seeds, places or streams that share numbers, or a number that changes with what is asked."""
    draws = torch.from_numpy(uniform(range(500), [0] * 500, 400))
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = (draws.flatten() * 100).long().bincount(minlength=100)
    assert abs(chi_square(counts, torch.ones(100))) < 5
    others = {
        "places": (draws[:, :-1], draws[:, 1:]),
        "seeds": (draws[:-1], draws[1:]),
        "streams": (draws, torch.from_numpy(uniform(range(500), [0] * 500, 400, stream=1))),
    }
    for name, (a, b) in others.items():
        pairs = ((a * 10).long() * 10 + (b * 10).long()).flatten().bincount(minlength=100)
        assert abs(chi_square(pairs, torch.ones(100))) < 5, name
    assert torch.equal(torch.from_numpy(uniform([7], [300], 20))[0], draws[7, 300:320])


def test_pick_inverts_the_distribution_function() -> None:
    """Fault: a token off by one at the border of a block, or one of weight 0."""
    generator = torch.Generator().manual_seed(0)
    for size in (1, 5, 128, 129, 1000):
        weights = torch.rand(50, size, generator=generator)
        weights[weights < 0.3] = 0
        weights[:, -1] += 0.01
        draws = torch.rand(50, dtype=torch.float64, generator=generator)
        draws[0], draws[1] = 0.0, 1 - 2.0**-53
        heights = weights.double().cumsum(1)
        expected = (heights <= draws[:, None] * heights[:, -1:]).sum(1)
        chosen = inverse_cdf(weights, draws)
        assert (chosen - expected).abs().max() <= 1
        assert (chosen != expected).sum() <= 1, "only the last digit of a sum may decide otherwise"
        assert (weights[torch.arange(50), chosen] > 0).all()


def small_world(size: int = 5) -> tuple[Trunk, Heads]:
    """A model of few tokens, and heads that often, but not always, draft what it likes."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=size, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.4)
    trunk = Trunk(model)
    return trunk, random_heads(trunk, depth=2)


WARPERS = {
    "plain": [],
    "cold": temperature_and_top_p(0.7),
    "cut": temperature_and_top_p(1.3, 0.8),
}


@pytest.mark.parametrize("warpers", WARPERS)
@pytest.mark.parametrize("kind", ["greedy drafts", "trees", "sampled drafts", "drafts of few tokens"])
def test_texts_have_the_distribution_of_the_model(kind: str, warpers: str) -> None:
    """Fault: acceptance or residual that shifts probability between texts, at any of the places of a round."""
    trunk, heads = small_world()
    rows = torch.tensor([0, 2, 3]) if kind == "drafts of few tokens" else None
    if rows is not None:
        heads = random_heads(trunk, depth=2, vocabulary=rows)
    length, size = 4, 5
    sampling = Sampling(WARPERS[warpers])
    greedy = kind in ("greedy drafts", "trees")
    choice: Choice = sampling if greedy else SampledDrafts(WARPERS[warpers], rows=rows)
    # The probability of every text, one token after another.
    texts = torch.tensor(list(itertools.product(range(size), repeat=length)))
    prompt = [1, 4]
    whole = torch.cat([torch.tensor([prompt]).expand(len(texts), -1), texts], dim=1)
    logits = trunk.unembedding(trunk.hidden(whole))[:, len(prompt) - 1 : -1]
    each = sampling.distribution(logits.flatten(0, 1)).view(len(texts), length, size)
    exact = each.gather(2, texts[..., None])[..., 0].double().prod(1)
    assert exact.sum() == pytest.approx(1, abs=1e-5)

    # Of heads and look-up; so few nodes that some rounds accept none.
    plan = Planner(Chances(), None, nodes=3) if kind == "trees" else None
    engine = Engine(trunk, heads, slots=2000, capacity=len(prompt) + length, choice=choice, planner=plan)
    found = torch.zeros(size**length)
    accepted = drafted = 0
    for text in engine.run(Request(prompt, length, seed) for seed in range(SAMPLES // (10 if kind == "trees" else 5))):
        place = 0
        for token in text.tokens:
            place = place * size + token
        found[place] += 1
        accepted += sum(right > 0 for *_, right in text.rounds)
        drafted += len(text.rounds)
    # Both outcomes of a verification happened often.
    assert 0.05 < accepted / drafted < 0.95
    assert found[exact == 0].sum() == 0
    assert chi_square(found, exact) < 4.5


def test_a_large_vocabulary() -> None:
    """Fault: the tail of a vocabulary as large as real ones drawn too often or too seldom; the test has power."""
    size, rows = 4096, 1000
    generator = torch.Generator().manual_seed(3)
    ranks = torch.arange(1, size + 1).float()
    p = -1.1 * ranks.log()[torch.randperm(size, generator=generator)]
    q = p + torch.randn(size, generator=generator)
    expected = p.softmax(-1)
    counts = {"sampled drafts": torch.zeros(size), "plain": torch.zeros(size), "draft alone": torch.zeros(size)}
    for start in range(0, SAMPLES, rows):
        texts = [Text(Request([1], 9, seed), 0) for seed in range(start, start + rows)]
        choice = SampledDrafts()
        drafts = choice.draft(q.expand(rows, size), texts, 0)
        logits = p.expand(rows, 2, size)
        for name, new in {
            "sampled drafts": choice.choose(logits, texts, Drafts.chain(drafts[:, None])),
            "plain": Sampling().choose(logits[:, :1], texts, None),
        }.items():
            counts[name] += torch.tensor([tokens[0] for tokens in new]).bincount(minlength=size)
        counts["draft alone"] += drafts.bincount(minlength=size)
    assert chi_square(counts["sampled drafts"], expected) < 4.5
    assert chi_square(counts["plain"], expected) < 4.5
    assert chi_square(counts["draft alone"], expected) > 100
    assert abs(chi_square(counts["draft alone"], q.softmax(-1))) < 4.5


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.6, "top_k": 20},
        {"top_p": 0.7, "min_p": 0.02},
        {"repetition_penalty": 1.4, "temperature": 1.2},
        {"no_repeat_ngram_size": 2, "typical_p": 0.9},
    ],
    ids=str,
)
def test_a_seed_gives_one_text_with_heads_and_without(settings: dict[str, Any], free_drafts: None) -> None:
    """Fault: numbers that depend on rounds, rows or drafts; a processor that sees drafts that were not accepted."""
    trunk = tiny_trunk("llama")
    ids = random_tokens(3, 9)
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0

    def text(heads: Heads | None, rows: slice = slice(None), seed: int = 5, depth: int | None = None) -> Tensor:
        torch.manual_seed(seed)
        output = Model(trunk, heads, drafting=Drafting(depth=depth)).generate(
            ids[rows], attention_mask=mask[rows], do_sample=True, max_new_tokens=25, pad_token_id=0, **settings
        )
        assert isinstance(output, Tensor)
        return output

    plain = text(None)
    assert torch.equal(text(random_heads(trunk)), plain)
    assert torch.equal(text(random_heads(trunk), depth=3), plain)
    assert torch.equal(text(random_heads(trunk, vocabulary=torch.arange(0, 60))), plain)
    # The first row's numbers do not depend on the others.
    assert torch.equal(text(random_heads(trunk), slice(0, 1))[0], plain[0])
    assert not torch.equal(text(None, seed=6), plain)


def test_sampled_drafts_by_name() -> None:
    """Fault: a setting that nobody reads."""
    trunk, heads = small_world()
    model = Model(trunk, heads, drafting=Drafting(depth=2, sampled=True))
    torch.manual_seed(0)
    sampled = model.generate(torch.tensor([[1, 2]]), do_sample=True, max_new_tokens=25)
    model.drafting = Drafting(depth=2)
    torch.manual_seed(0)
    assert not torch.equal(model.generate(torch.tensor([[1, 2]]), do_sample=True, max_new_tokens=25), sampled)
