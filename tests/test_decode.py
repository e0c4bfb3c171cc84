"""Greedy decoding with heads writes what plain `generate` writes, whatever the heads draft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import TOKENS, greedy_text, plain_text, random_heads, random_tokens, tiny_trunk
from conftest import Learned, learn
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from mtpd import alignment
from mtpd.decode import Counts, generate
from mtpd.heads import Heads
from mtpd.trunk import Trunk

LENGTHS = [1, 5, 40]
DEPTH = 3


class Scripted:
    """In the place of heads: drafts that are right up to a place that the script gives for each round."""

    depth = DEPTH

    def __init__(self, prompt: list[int], text: list[int], right: list[int]) -> None:
        self.text = prompt + text + [0] * DEPTH
        self.right = right
        self.rounds = 0
        self.read: list[int] = []

    def drafter(self, trunk: Trunk) -> Scripted:
        return self

    def draft(self, hidden_BTD: Tensor, tokens: Tensor) -> Tensor:
        """As `ChainDrafter.draft`."""
        known = len(tokens)
        assert tokens.tolist() == self.text[:known]
        # The states of all positions but the newest, each once.
        self.read.append(hidden_BTD.shape[1])
        assert sum(self.read) == known - 1
        right = self.right[self.rounds % len(self.right)]
        self.rounds += 1
        drafts = self.text[known : known + DEPTH]
        return torch.tensor([token if k < right else (token + 1) % TOKENS for k, token in enumerate(drafts)])


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
    patchy = Scripted(prompt, text, [3, 0, 1, 2, 2, 0, 3, 1])
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
    assert counts == Counts(DEPTH, tokens=45, forwards=12, drafted=[11] * 3, accepted=[11] * 3)


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
            heads = Scripted(prompt, text, right)
            assert decode(trunk, heads, prompt, max_new_tokens=20, end_tokens=[end])[0] == expected


def test_caches_hold_what_training_computes(trunk: Trunk) -> None:
    """Fault: entries computed from rejected drafts that stay, or entries of a wrong token, state or position."""
    for heads in (random_heads(trunk), random_heads(trunk, shared=True)):
        ids = random_tokens(1, 45, seed=3)
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
        drafter = heads.drafter(trunk)
        logits = trunk.unembedding.select(None)(expected[0][0])
        newest = 0
        for accepted in (1, 0, 0, 3, 2, 0, 1, 3, 3, 3, 15, 0):
            added = accepted + 1
            before, newest = newest, newest + added
            drafts = drafter.draft(hidden[:, before:newest], ids[0, : newest + 1])
            assert drafts.shape == (DEPTH,)
            # Depth 1 reads true tokens only, so its draft is the teacher-forced one.
            assert drafts[0] == logits[newest - 1].argmax()
            for k in range(1, DEPTH + 1):
                true = max(0, newest - k + 1)
                held = drafter.caches[k - 1].layers[0].keys
                assert held.shape[-2] == true
                torch.testing.assert_close(held, keys[k - 1][..., :true, :], rtol=1e-3, atol=1e-3)
        assert newest == 43


def test_draft_vocabulary(llama: Trunk) -> None:
    """Fault: columns of the draft vocabulary taken for token ids."""
    vocabulary = torch.tensor([5, 17, 40, 99])
    heads = random_heads(llama, vocabulary=vocabulary)
    ids = random_tokens(1, 12)
    drafts = heads.drafter(llama).draft(llama.hidden(ids)[:, :-1], ids[0])
    assert set(drafts.tolist()) <= set(vocabulary.tolist())
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
    ids = random_tokens(1, 12)
    heads = random_heads(trunk)
    assert heads.drafter(narrow).draft(trunk.hidden(ids)[:, :-1], ids[0]).max() < 4
    assert heads.drafter(trunk).draft(trunk.hidden(ids)[:, :-1], ids[0]).max() >= 4


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
    hidden = trunk.hidden(ids[None])[:, :-1]
    assert fewer.depth == 2
    assert torch.equal(fewer.drafter(trunk).draft(hidden, ids), whole.drafter(trunk).draft(hidden, ids)[:2])
    assert generate(trunk, fewer, ids, max_new_tokens=20)[0] == generate(trunk, whole, ids, max_new_tokens=20)[0]
