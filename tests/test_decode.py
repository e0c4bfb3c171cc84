"""Greedy decoding with heads writes what plain `generate` writes, whatever the heads draft."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from architectures import TOKENS, greedy_text, plain_text, random_heads, random_tokens, tiny_trunk
from conftest import FREE, Learned, learn
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from mtpd import alignment
from mtpd.decode.chances import Chances
from mtpd.decode.choice import Greedy
from mtpd.decode.counts import Counts
from mtpd.decode.drafting import HEADS
from mtpd.decode.drafts import Drafts
from mtpd.decode.engine import Engine
from mtpd.decode.greedy import generate
from mtpd.decode.planner import BEAM, MOST, Planner
from mtpd.decode.text import Request
from mtpd.errors import UserError
from mtpd.heads import Heads
from mtpd.heads.drafting import Drafter, Pick
from mtpd.slots import Span
from mtpd.trunk import Trunk

LENGTHS = [1, 5, 40]
DEPTH = 3
PATCHY = [3, 0, 1, 2, 2, 0, 3, 1]


class Scripted(Drafter):
    """In the place of heads: drafts that are right up to a place that the script gives for each round.

    Before each round it looks whether the engine keeps its promises: the known tokens are those of one of
    the texts, and the states that were given are those of the trunk.
    """

    depth = DEPTH
    shared_layers = 0
    independent = False

    def __init__(self, texts: Sequence[tuple[list[int], list[int]]], right: Sequence[int]) -> None:
        self.texts = [prompt + text + [0] * DEPTH for prompt, text in texts]
        self.right = right
        self.rounds = 0

    def drafter(self, trunk: Trunk, *, slots: int, capacity: int) -> Scripted:
        self.trunk = trunk
        self.held = torch.zeros(slots, capacity, trunk.hidden_size)
        return self

    def begin(self, span: Span, hidden: Tensor, tokens: Tensor, lengths: Sequence[int]) -> None:
        self.read(span, hidden)

    def read(self, span: Span, hidden: Tensor) -> None:
        span.write(self.held, hidden)

    def copy_row(self, source: int, target: int, length: int) -> None:
        self.held[target] = self.held[source]

    def drafts(
        self, tokens: Tensor, newest: Sequence[int], depth: int, pick: Pick
    ) -> Iterator[tuple[Tensor | None, Tensor]]:
        """As `ChainDrafter.drafts`."""
        logits = torch.full((depth, len(newest), TOKENS), -9.0)
        for row, end in enumerate(newest):
            known = tokens[row, : end + 1].tolist()
            [text] = [text for text in self.texts if text[: len(known)] == known]
            states = self.trunk.hidden(tokens[row : row + 1, :end])[0]
            torch.testing.assert_close(self.held[row, :end], states, rtol=1e-3, atol=1e-3)
            right = self.right[(self.rounds + row) % len(self.right)]
            drafts = text[end + 1 : end + 1 + depth]
            wrong = [token if k < right else (token + 1) % TOKENS for k, token in enumerate(drafts)]
            # Where the draft is wrong, the right token comes close behind it.
            for k, (draft, token) in enumerate(zip(wrong, drafts, strict=True)):
                logits[k, row, token], logits[k, row, draft] = 1.0, 2.0
        self.rounds += 1
        for k in range(depth):
            yield logits[k], pick(logits[k], k)


def tree_of_heads(nodes: int) -> Planner:
    """Verifies so many drafts of the heads in every round."""
    return Planner(Chances(), None, (HEADS,), nodes)


def decode(trunk: Trunk, heads: Any, prompt: list[int], **limits: Any) -> tuple[list[int], Counts]:
    return generate(trunk, heads, torch.tensor(prompt), **limits)


@pytest.mark.parametrize("length", LENGTHS)
def test_text_is_that_of_generate(name: str, trunk: Trunk, length: int) -> None:
    """Fault: positions, masks, sliding windows or caches that differ after accepted and rejected drafts."""
    prompt, text = greedy_text(name, length)
    random = {
        1: random_heads(trunk, vocabulary=torch.arange(0, TOKENS, 2)),
        5: random_heads(trunk, shared=True),
        40: random_heads(trunk),
    }[length]
    assert decode(trunk, random, prompt, max_new_tokens=len(text))[0] == text
    patchy = Scripted([(prompt, text)], PATCHY)
    ours, counts = decode(trunk, patchy, prompt, max_new_tokens=len(text))
    assert ours == text
    assert counts.tokens == len(text)
    # Of the patchy drafts each number is accepted: the trunk's cache was cropped and went on in every way.
    assert 0 < counts.accepted[2] < counts.accepted[0] < counts.drafted[0]


def test_learned_heads_are_always_right(name: str) -> None:
    """Fault: drafts that training and decoding compute from different inputs."""
    learned = learn(name)
    prompt, text = learned.sample.prompt_ids, learned.sample.response_ids
    ours, counts = decode(learned.trunk, learned.perfect, prompt, max_new_tokens=len(text) - 3)
    assert ours == text[:-3]
    # The prompt's pass writes one token, and each of the 11 rounds K + 1.
    assert counts == Counts(DEPTH, 45, 12, drafted=[11] * 3, accepted=[11] * 3, sources={HEADS: [11] * 3})


@pytest.mark.parametrize("heads", ["untrained", "half", "perfect"])
def test_limits_and_end_tokens(learned: Learned, heads: str) -> None:
    """Fault: text behind an end token inside of an accepted draft, or past a limit that falls inside of one."""
    drafting: Heads = getattr(learned, heads)
    prompt, text = learned.sample.prompt_ids, learned.sample.response_ids
    for limit in range(1, 12):
        assert decode(learned.trunk, drafting, prompt, max_new_tokens=limit)[0] == text[:limit]
    for ends in [[token] for token in dict.fromkeys(text)] + [text[5:7], text[9:30]]:
        first = min(text.index(token) for token in ends)
        ours, counts = decode(learned.trunk, drafting, prompt, max_new_tokens=len(text), end_tokens=ends)
        assert ours == text[: first + 1]
        assert counts.tokens == len(ours)
        assert all(0 <= a <= d <= counts.forwards - 1 for a, d in zip(counts.accepted, counts.drafted, strict=True))


def test_end_tokens_as_in_transformers(name: str, trunk: Trunk) -> None:
    """Fault: an end token that `generate` writes and we do not, or the other way round."""
    prompt, text = greedy_text(name, 5)
    for end in (text[0], text[7], text[12]):
        config = GenerationConfig(max_new_tokens=20, eos_token_id=end)
        expected = plain_text(trunk, torch.tensor(prompt), config)
        for right in ([3], [0, 2]):
            heads = Scripted([(prompt, text)], right)
            assert decode(trunk, heads, prompt, max_new_tokens=20, end_tokens=[end])[0] == expected


def test_rows_are_texts_of_their_own(name: str, trunk: Trunk) -> None:
    """Fault: rows that see each other's slots, lengths or drafts; a slot that keeps what its last text left."""
    texts = {number: greedy_text(name, length) for number, length in enumerate((5, 40, 1, 3, 20, 9))}
    limits = [30, 4, 30, 11, 1, 30]
    requests = [Request(prompt, limits[number]) for number, (prompt, _) in texts.items()]
    for heads in (None, random_heads(trunk), Scripted(list(texts.values()), PATCHY)):
        # A chain of heads, and heads and look-up together.
        for slots, plan in ((2, None), (3, None), (6, None), (2, Planner(Chances(), FREE))):
            engine = Engine(trunk, heads, slots=slots, capacity=72, planner=plan)  # type: ignore[arg-type]
            written = list(engine.run(requests))
            assert sorted(text.number for text in written) == list(texts)
            for text in written:
                assert text.tokens == texts[text.number][1][: limits[text.number]]
            # The engine serves again, and nothing of before is left.
            assert [text.tokens for text in engine.run(requests[:1])] == [texts[0][1]]


@pytest.mark.parametrize("slots", [1, 4])
def test_alternatives_beside_a_chain(name: str, trunk: Trunk, slots: int) -> None:
    """Fault: a draft that sees the one beside it, or one that is accepted and stays where the next round writes."""
    texts = [greedy_text(name, length) for length in (5, 40, 1, 20)]
    requests = [Request(prompt, 30) for prompt, _ in texts]

    def rounds(heads: Any, plan: Planner | None) -> int:
        engine = Engine(trunk, heads, slots=slots, capacity=72, planner=plan)
        written = sorted(engine.run(requests), key=lambda text: text.number)
        assert [text.tokens for text in written] == [text for _, text in texts]
        return sum(len(text.rounds) for text in written)

    chain = rounds(Scripted(texts, PATCHY), None)
    assert rounds(Scripted(texts, PATCHY), tree_of_heads(8)) < chain, "alternatives were accepted"
    rounds(random_heads(trunk), tree_of_heads(10))


def test_alternatives_are_the_likeliest(learned: Learned) -> None:
    """Fault: alternatives at a wrong depth, drafts that are repeated, or tokens of another column."""
    prompt = learned.sample.prompt_ids
    vocabulary = torch.arange(1, TOKENS, 2)
    for heads in (learned.half, random_heads(learned.trunk, vocabulary=vocabulary)):
        seen: list[Drafts] = []

        class Watch(Greedy):
            def choose(self, logits: Tensor, texts: Any, drafts: Drafts | None, seen: Any = seen) -> list[list[int]]:
                seen += [] if drafts is None else [drafts]
                return super().choose(logits, texts, drafts)

        engine = Engine(learned.trunk, heads, slots=1, capacity=40, planner=tree_of_heads(20), choice=Watch())
        [text] = engine.run([Request(prompt, 10)])
        drafts = seen[0]
        assert drafts.depths is not None
        assert drafts.parents is not None
        rows = torch.arange(TOKENS) if heads.rows() is None else heads.rows()
        # The likeliest four of each path that goes on, which are the likeliest four of a depth.
        weights: dict[tuple[int, ...], float] = {(): 1.0}
        going: list[tuple[int, ...]] = [()]
        for k in range(DEPTH):
            reached = {}
            for path in going:
                ids = torch.tensor([[*prompt, text.tokens[0], *path, *[0] * (DEPTH - k)]])
                with torch.no_grad():
                    states = heads(
                        learned.trunk, learned.trunk.hidden(ids), ids, position_ids_BT=torch.arange(ids.shape[1])[None]
                    )
                logits = learned.trunk.unembedding(states[k][0, len(prompt) - 1])
                best = logits[rows].softmax(-1).topk(BEAM)
                for chance, column in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                    reached[*path, int(rows[column])] = weights[path] * chance
            weights |= reached
            going = sorted(reached, key=lambda path: -reached[path])[:BEAM]
        del weights[()]
        found: list[tuple[int, ...]] = [()]
        for token, parent in zip(drafts.tokens[0].tolist(), drafts.parents[0].tolist(), strict=True):
            found.append((*found[parent], token))
        assert drafts.depths[0].tolist() == [len(path) for path in found[1:]]
        assert found[1:] == sorted(weights, key=lambda path: -weights[path])[:20]


def test_counts_of_rows_are_those_of_one(learned: Learned) -> None:
    """Fault: rounds of one row counted for another."""
    prompts = [greedy_text("llama", length)[0] for length in (5, 40, 1, 3)]
    engine = Engine(learned.trunk, learned.half, slots=3, capacity=72)
    for text in engine.run([Request(prompt, 30) for prompt in prompts]):
        alone = decode(learned.trunk, learned.half, prompts[text.number], max_new_tokens=30)
        assert (text.tokens, text.counts(DEPTH)) == alone


def tell(known: Tensor, ids: Tensor, newest: list[int]) -> None:
    """Makes the tokens of each row known up to its newest one, over what was drafted there."""
    for row, end in enumerate(newest):
        known[row, : end + 1] = ids[row, : end + 1]


def test_caches_hold_what_training_computes(trunk: Trunk) -> None:
    """Fault: entries computed from rejected drafts that stay, or entries of a wrong token, state or position."""
    for heads in (random_heads(trunk), random_heads(trunk, shared=True)):
        ids = random_tokens(2, 45, seed=3)
        positions = torch.arange(ids.shape[1])[None]
        hidden = trunk.hidden(ids)
        state, expected, keys = hidden, [], []
        with torch.no_grad():
            for k, head in enumerate(heads.chain(), start=1):
                cache = DynamicCache()
                embed = trunk.embed(alignment.tokens_read(ids, k))
                state = head(embed, state, position_ids_BT=positions, cache=cache)
                expected.append(state)
                keys.append(cache.layers[0].keys)
        logits = trunk.unembedding.select(None)(expected[0])
        drafter = heads.drafter(trunk, slots=3, capacity=60)
        known = torch.zeros(3, 64, dtype=torch.long)
        lengths = [2, 5]

        with torch.no_grad():
            tell(known, ids, lengths)
            drafter.begin(Span([0, 0], 5, trunk.device), hidden[:, :5], known, [length + 1 for length in lengths])
            # Depths between 1 and 3: heads that were left out in a round catch up.
            rounds = [(1, 0, 3), (0, 0, 3), (0, 3, 1), (3, 2, 1), (2, 2, 3), (0, 1, 2), (1, 0, 3), (15, 3, 3)]
            for first, second, depth in rounds:
                before = list(lengths)
                drafted = drafter.draft(known, lengths, depth, lambda logits, number: logits.argmax(-1))
                assert drafted == depth
                for row, end in enumerate(lengths):
                    # Depth 1 reads true tokens only, so its draft is the teacher-forced one.
                    assert known[row, end + 1] == logits[row, end - 1].argmax()
                    for k in range(1, depth + 1):
                        true = max(0, end - k + 1)
                        assert drafter.true[k - 1][row] == true
                        held = drafter.caches[k - 1].layers[0].keys
                        assert held is not None
                        torch.testing.assert_close(
                            held[row, :, :true], keys[k - 1][row, :, :true], rtol=1e-3, atol=1e-3
                        )
                lengths = [lengths[0] + first + 1, lengths[1] + second + 1]
                tell(known, ids, lengths)
                width = max(first, second) + 1
                # The shorter row is given states of rejected drafts behind its true ones.
                new = torch.full((2, width, trunk.hidden_size), 9.0)
                for row, (start, end) in enumerate(zip(before, lengths, strict=True)):
                    new[row, : end - start] = hidden[row, start:end]
                drafter.read(Span(before, width, trunk.device), new)


def drafts_of(trunk: Trunk, heads: Heads, ids: Tensor) -> list[int]:
    """What the heads draft after one text [n]."""
    drafter = heads.drafter(trunk, slots=1, capacity=len(ids) + 8)
    tokens = torch.zeros(1, len(ids) + 8, dtype=torch.long)
    tokens[0, : len(ids)] = ids
    with torch.no_grad():
        drafter.begin(Span([0], len(ids) - 1, trunk.device), trunk.hidden(ids[None, :-1]), tokens, [len(ids)])
        drafted = drafter.draft(tokens, [len(ids) - 1], heads.depth, lambda logits, number: logits.argmax(-1))
    return tokens[0, len(ids) : len(ids) + drafted].tolist()


def test_draft_vocabulary(llama: Trunk) -> None:
    """Fault: columns of the draft vocabulary taken for token ids."""
    vocabulary = torch.tensor([5, 17, 40, 99])
    heads = random_heads(llama, vocabulary=vocabulary)
    ids = random_tokens(1, 12)
    drafts = drafts_of(llama, heads, ids[0])
    assert set(drafts) <= set(vocabulary.tolist())
    whole = random_heads(llama)
    whole.load_state_dict(heads.state_dict() | {"vocabulary": whole.vocabulary})
    hidden = llama.hidden(ids)
    with torch.no_grad():
        states = whole(llama, hidden, ids, position_ids_BT=torch.arange(12)[None])
    best = llama.unembedding(states[0][0, 10])[vocabulary].argmax()
    assert drafts[0] == vocabulary[best]


def test_drafts_are_never_padding_rows() -> None:
    """Fault: rows that only pad the vocabulary drafted as tokens."""
    trunk = tiny_trunk("qwen3")
    narrow = Trunk(trunk.model, tokens=4)
    ids = random_tokens(12)
    heads = random_heads(trunk)
    assert max(drafts_of(narrow, heads, ids)) < 4
    assert max(drafts_of(trunk, heads, ids)) >= 4


def test_counts_by_hand() -> None:
    """Fault: drafts counted that the text had no room for, or at some depths and not at others (AR above 1)."""
    counts = Counts(3)
    counts.start()
    assert counts.round(2, room=9) == 3
    assert (counts.drafted, counts.accepted) == ([1, 1, 1], [1, 1, 0])
    assert counts.round(3, room=3) == 3
    assert (counts.drafted, counts.accepted) == ([2, 2, 2], [2, 2, 1])
    # The text has two more tokens: the third draft has no place in it, so the round counts at no depth.
    assert counts.round(1, room=2) == 2
    assert (counts.drafted, counts.accepted) == ([2, 2, 2], [2, 2, 1])
    assert (counts.tokens, counts.forwards) == (1 + 3 + 3 + 2, 4)


def test_fewer_heads_draft_the_same() -> None:
    """Fault: heads that were shortened draft other tokens, or their text is another one."""
    trunk = tiny_trunk("llama")
    whole, fewer = random_heads(trunk), random_heads(trunk)
    fewer.shorten(2)
    ids = torch.arange(3, 15)
    assert fewer.depth == 2
    assert drafts_of(trunk, fewer, ids) == drafts_of(trunk, whole, ids)[:2]
    assert generate(trunk, fewer, ids, max_new_tokens=20)[0] == generate(trunk, whole, ids, max_new_tokens=20)[0]


def test_depths_that_do_not_exist(llama: Trunk) -> None:
    """Fault: more drafts a round than heads, or none, taken without a word."""
    for depth in (0, 4, -1):
        with pytest.raises(UserError, match=f"depth: {depth} is not accepted; accepted: 1 to 3"):
            Engine(llama, random_heads(llama), slots=1, capacity=8, depth=depth)


@pytest.mark.parametrize("prompt", [1, 3, 20])
def test_far_fewer_drafts_than_heads(llama: Trunk, prompt: int) -> None:
    """Fault: heads that do not draft read past the buffer of tokens while a prompt is read."""
    ids, text = greedy_text("llama", prompt)
    engine = Engine(llama, random_heads(llama, depth=8), slots=1, capacity=len(ids) + len(text), depth=1)
    assert next(iter(engine.run([Request(ids, len(text))]))).tokens == text


@pytest.mark.parametrize("slots", [1, 2])
def test_trees_of_the_most_heads(llama: Trunk, slots: int) -> None:
    """Fault: paths of a deep tree that lie behind the end of a slot, where another row begins or nothing is."""
    texts = [greedy_text("llama", length) for length in (5, 20)]
    for vocabulary in (None, torch.tensor([5, 17, 40])):
        heads = random_heads(llama, depth=16, vocabulary=vocabulary)
        engine = Engine(llama, heads, slots=slots, capacity=50, planner=tree_of_heads(MOST))
        written = sorted(engine.run([Request(prompt, 30) for prompt, _ in texts]), key=lambda text: text.number)
        assert [text.tokens for text in written] == [text for _, text in texts]
