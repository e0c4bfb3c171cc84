"""The engine against one round written as the papers have it: tokens, and how many drafts each round accepts."""

from __future__ import annotations

import pytest
import torch
from architectures import TOKENS, random_heads, random_tokens, tiny_trunk
from conftest import Learned
from kinds import random_kind
from test_decode_sampling import WARPERS, small_world

from mtpd.decode import reference
from mtpd.decode.choice import Choice, Greedy
from mtpd.decode.engine import Engine
from mtpd.decode.sampling import SampledDrafts
from mtpd.decode.text import Request, Text
from mtpd.heads import Heads
from mtpd.trunk import Trunk


def by_engine(trunk: Trunk, heads: Heads, choice: Choice, requests: list[Request], depth: int) -> list[Text]:
    """Texts that are written in fewer slots than there are texts."""
    capacity = max(len(each.prompt) + each.max_new_tokens for each in requests)
    engine = Engine(trunk, heads, slots=2, capacity=capacity, choice=choice, depth=depth)
    return sorted(engine.run(requests), key=lambda text: text.number)


def check(trunk: Trunk, heads: Heads, text: Text, distribution: reference.Distribution, depth: int) -> list[int]:
    """Repeats the rounds of a text, and returns how many drafts each accepted."""
    # The first token is of the prompt's pass, in which nothing is drafted.
    written = text.tokens[:1]
    accepted = []
    while len(written) < text.request.max_new_tokens:
        known = [*text.request.prompt, *written]
        place, seed = len(written), text.request.seed
        new = reference.one_round(trunk, heads, known, depth, distribution, seed=seed, place=place)
        accepted.append((place, depth, len(new) - 1))
        written += new
    assert text.tokens == written[: text.request.max_new_tokens]
    assert text.rounds == accepted
    return [count for *_, count in accepted]


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("heads", ["half", "perfect", "untrained"])
def test_greedy_rounds(learned: Learned, heads: str, depth: int) -> None:
    """Fault: a draft from another position or state, or one accepted that the main head did not choose."""
    prompt, response = learned.sample.prompt_ids, learned.sample.response_ids
    drafting: Heads = getattr(learned, heads)
    requests = [Request([*prompt, *response[:more]], 20) for more in (0, 3, 10)]
    texts = by_engine(learned.trunk, drafting, Greedy(), requests, depth)
    counts = [count for text in texts for count in check(learned.trunk, drafting, text, reference.greedy, depth)]
    assert heads != "perfect" or max(counts) == depth


@pytest.mark.parametrize("form", ["medusa", "linear", "cp"])
def test_greedy_rounds_of_other_kinds(llama: Trunk, form: str) -> None:
    """Fault: a kind of heads whose drafter computes other drafts than the heads at the same place of a text."""
    heads = random_kind(llama, form, vocabulary=torch.arange(2, TOKENS, 2))
    texts = by_engine(llama, heads, Greedy(), [Request(random_tokens(5, seed=4).tolist(), 12)], 3)
    check(llama, heads, texts[0], reference.greedy, 3)


@pytest.mark.parametrize("warpers", WARPERS)
@pytest.mark.parametrize("vocabulary", [None, [0, 2, 3]], ids=["all tokens", "few tokens"])
def test_sampled_rounds(warpers: str, vocabulary: list[int] | None) -> None:
    """Fault: acceptance by another ratio, a residual of another place, or numbers of another place."""
    trunk, heads = small_world()
    rows = None if vocabulary is None else torch.tensor(vocabulary)
    if rows is not None:
        heads = random_heads(trunk, depth=2, vocabulary=rows)
    choice = SampledDrafts(WARPERS[warpers], rows=rows)
    requests = [Request([1, 4], 12, seed) for seed in range(6)]
    counts = []
    for text in by_engine(trunk, heads, choice, requests, 2):
        counts += check(trunk, heads, text, choice.distribution, 2)
    assert set(counts) == {0, 1, 2}, "every outcome of a round"


def test_one_architecture_with_a_window() -> None:
    """Fault: a reference that is equal to the engine only where all layers attend to everything."""
    trunk = tiny_trunk("gemma3")
    heads = random_heads(trunk)
    [text] = by_engine(trunk, heads, Greedy(), [Request(random_tokens(20, seed=2).tolist(), 12)], 3)
    check(trunk, heads, text, reference.greedy, 3)
