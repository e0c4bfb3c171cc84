"""Drafts of heads and look-up in one tree: what the index finds, what is verified, and that the text stays the same."""

from __future__ import annotations

import random

import architectures
import pytest
import torch
from conftest import FREE, Learned

from mtpd.data.packing import Sample
from mtpd.decode.candidates import Candidates, columns, worth_verifying
from mtpd.decode.chances import REACH, Chances
from mtpd.decode.choice import Choice, Greedy
from mtpd.decode.counts import Counts
from mtpd.decode.drafting import HEADS, LOOKUP, Source
from mtpd.decode.engine import Engine
from mtpd.decode.lookup import LookupIndex
from mtpd.decode.planner import Costs, Planner
from mtpd.decode.sampling import Sampling, temperature_and_top_p
from mtpd.decode.text import Request, Text
from mtpd.evaluate.chances import count_chances
from mtpd.heads import Heads
from mtpd.trunk import Trunk


def planner(*sources: Source, costs: Costs = FREE) -> Planner:
    return Planner(Chances(), costs, sources or (HEADS, LOOKUP))


def written(
    trunk: Trunk, heads: Heads | None, prompts: list[list[int]], plan: Planner | None, choice: Choice, slots: int = 1
) -> list[Text]:
    capacity = max(map(len, prompts)) + 40
    engine = Engine(trunk, heads, slots=slots, capacity=capacity, choice=choice, planner=plan)
    requests = [Request(prompt, 40, seed=number) for number, prompt in enumerate(prompts)]
    return sorted(engine.run(requests), key=lambda text: text.number)


def longest_match(text: list[int], longest: int = 4) -> tuple[int, int] | None:
    """Searches the whole text: tokens of the match, at most `longest`, and the place behind its newest occurrence."""
    for size in range(min(longest, len(text) - 1), 0, -1):
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == text[-size:]:
                return size, start + size
    return None


def test_the_index_finds_what_a_search_finds() -> None:
    """Fault: an index that misses places, or finds the newest tokens themselves."""
    draw = random.Random(0)
    for _ in range(500):
        text = [draw.randrange(4) for _ in range(draw.randrange(2, 40))]
        cut = draw.randrange(1, len(text) + 1)
        index = LookupIndex(text[:cut])
        index.extend(text[cut:])
        found = index.matches(3)
        expected = longest_match(text)
        assert bool(found) == (expected is not None)
        if expected is not None:
            assert found[0].length >= expected[0]
            # Behind drafts, what followed in the text alone is found.
            ahead = LookupIndex(text[:cut]).matches(1, drafted=text[cut:])
            assert bool(ahead) == (text[-1] in text[: cut - 1])


def test_what_repeats_goes_on_repeating() -> None:
    """Fault: a continuation that ends with the text, where the text repeats itself."""
    [match] = LookupIndex([1, 2, 3, 1, 2, 3]).matches(5)
    assert match.tokens == (1, 2, 3, 1, 2)
    [match] = LookupIndex([7] * 100).matches(4)
    assert (match.tokens, match.agree) == ((7, 7, 7, 7), 4)


def test_a_long_text_of_one_token_stays_linear() -> None:
    """Fault: an index whose memory or whose work a token grows with the text."""
    index = LookupIndex([7] * 100_000)
    assert sum(map(len, index._newest)) == 4
    assert all(len(places) == 100_000 for places in index._before)


def test_equal_beginnings_are_one_node() -> None:
    """Fault: a token is verified twice, or a child is taken without its parent."""
    candidates = Candidates()
    first = candidates.add(0, 5, 0.5, HEADS)
    assert candidates.add(0, 5, 0.5, LOOKUP) == first
    assert candidates.chances[first] == pytest.approx(0.75)
    second = candidates.add(first, 6, 0.9, LOOKUP)
    other = candidates.add(0, 8, 0.1, HEADS)
    assert candidates.chances[second] == pytest.approx(0.75)
    assert candidates.likeliest(9) == [first, second, other]
    assert candidates.path(second) == [5, 6]
    assert columns(candidates, [first, second], 3) == ([5, 6, 0], [0, 1, 3], [1, 2, 1])


def test_drafts_that_cost_more_than_they_bring_are_not_verified() -> None:
    """Fault: a controller that drafts on a machine, or in a batch, where drafts do not pay."""
    chances = [[0.9, 0.5, 0.1]]
    assert worth_verifying(chances, lambda nodes: 1.0) == 3
    assert worth_verifying(chances, lambda nodes: 1.0 + 0.3 * nodes) == 2
    assert worth_verifying(chances, lambda nodes: 1.0 + nodes) == 0


@pytest.mark.parametrize("sources", [(LOOKUP,), (HEADS,), (HEADS, LOOKUP)], ids="+".join)
def test_greedy_text_stays_the_same(trunk: Trunk, name: str, sources: tuple[Source, ...]) -> None:
    """Fault: trees of chain heads or look-up change the text: wrong positions, masks, states or cache entries."""
    prompts = [architectures.greedy_text(name, seed, 4)[0] for seed in (5, 6)]
    heads = architectures.random_heads(trunk).eval()
    plain = written(trunk, None, prompts, None, Greedy())
    for slots in (1, 2):
        found = written(trunk, heads, prompts, planner(*sources), Greedy(), slots)
        assert [text.tokens for text in found] == [text.tokens for text in plain]


def test_drawn_text_stays_the_same(learned: Learned) -> None:
    """Fault: alternatives for one place are drawn with numbers of their own, and the text is another one."""
    choice = Sampling(temperature_and_top_p(0.8))
    prompts = [learned.sample.prompt_ids]
    plain = written(learned.trunk, None, prompts, None, choice)
    found = written(learned.trunk, learned.half, prompts, planner(), choice)
    assert [text.tokens for text in found] == [text.tokens for text in plain]


def test_every_accepted_draft_has_a_source(learned: Learned) -> None:
    """Fault: drafts of the one source are counted for the other, or for none."""
    prompts = [learned.sample.prompt_ids]
    for sources in ((LOOKUP,), (HEADS,), (HEADS, LOOKUP)):
        [text] = written(learned.trunk, learned.perfect, prompts, planner(*sources), Greedy())
        assert set(text.sources) <= set(sources)
        assert len(text.sources) == sum(accepted for _, _, accepted in text.rounds)
        # Behind the end of the text nothing counts.
        drafted = [source for source, _ in text.drafted_by() if source is not None]
        counts = text.counts(0).sources
        assert {source: sum(of) for source, of in counts.items()} == {each: drafted.count(each) for each in counts}
        assert set(drafted) == set(counts)
        assert 0 <= len(text.sources) - len(drafted) < REACH
    # Heads that know the text by heart are right each time, as far as they reach.
    [text] = written(learned.trunk, learned.perfect, prompts, planner(HEADS), Greedy())
    assert [accepted for _, _, accepted in text.rounds[:-2]] == [3] * (len(text.rounds) - 2)


def test_sources_by_hand() -> None:
    """Fault: a draft is counted at another depth or token than its own, or though the text ends before it."""
    text = Text(Request([1], 10), 0, tokens=[*range(7)], rounds=[(1, 3, 2), (4, 2, 0), (5, 4, 3)])
    text.sources = [HEADS, LOOKUP, LOOKUP, HEADS, HEADS]
    own: tuple[Source | None, int] = (None, 0)
    assert text.drafted_by() == [own, (HEADS, 1), (LOOKUP, 2), own, own, (LOOKUP, 1), (HEADS, 2)]
    counts = text.counts(0)
    assert counts == Counts(0, tokens=7, forwards=4, sources={HEADS: [1, 1], LOOKUP: [1, 1]})
    assert (counts.tau, counts.drafted) == (7 / 4, [])
    assert counts + Counts(0, 9, 3, sources={HEADS: [2], "corpus": [0, 0, 1]}) == Counts(
        0, tokens=16, forwards=7, sources={HEADS: [3, 1], LOOKUP: [1, 1], "corpus": [0, 0, 1]}
    )
    # A chain has counts of its depths too, over the rounds that the text has room for.
    chain = Text(Request([1], 10), 0, tokens=[*range(7)], rounds=[(1, 3, 2), (4, 3, 1), (6, 3, 0)], sources=[HEADS] * 3)
    assert chain.counts(3) == Counts(3, 7, 4, drafted=[2] * 3, accepted=[2, 1, 0], sources={HEADS: [2, 1]})


def test_a_tree_of_heads_accepts_what_their_chain_does_and_more(learned: Learned) -> None:
    """Fault: paths beside the likeliest one are read with states or positions of another path."""
    prompts = [learned.sample.prompt_ids]
    [chain] = written(learned.trunk, learned.half, prompts, None, Greedy())
    [tree] = written(learned.trunk, learned.half, prompts, planner(HEADS), Greedy())
    assert tree.tokens == chain.tokens
    assert len(tree.rounds) <= len(chain.rounds)


def test_chances_are_counted_where_decoding_drafts(learned: Learned) -> None:
    """Fault: counts that are moved by a position: heads that are always right would not be."""
    table = count_chances(learned.trunk, learned.perfect, [learned.sample], progress=False)
    assert all(right == drafted > 0 for right, drafted in table.likeliest.values())
    assert len(table.likeliest) == learned.perfect.depth
    assert sum(drafted for _, drafted in table.lookup.values()) > 0
    assert table.head(1, -0.01) > Chances(heads={"1 0": (0, 50)}).head(1, -0.01)


def test_chances_of_texts_shorter_than_a_chain(learned: Learned) -> None:
    """Fault: a response that ends before the deepest head drafts in it ends the counting."""
    for length in (1, 2, 3):
        short = Sample.of("short", learned.sample.prompt_ids, learned.sample.response_ids[:length])
        table = count_chances(learned.trunk, learned.half, [short], progress=False)
        assert all(drafted < length for _, drafted in table.likeliest.values())


def test_costs_lie_between_those_measured() -> None:
    """Fault: a pass that was not timed is taken to be free."""
    costs = Costs({1: 1.0, 3: 2.0, 5: 2.0}, head=0.1, further_row=0.02)
    assert [costs.of_head(rows) for rows in (1, 6)] == pytest.approx([0.1, 0.2])
    assert [costs.of_pass(size) for size in (1, 2, 3, 4, 9)] == pytest.approx([1.0, 1.5, 2.0, 2.0, 2.0])
    assert torch.is_inference_mode_enabled() is False
