"""The V1 proposer's rounds, with numbers in the place of layers: heads must read what they were trained to read."""

from __future__ import annotations

import random

import pytest
import torch
from mtpd_vllm.window import Window, shifted

TOKENS = 5
PRIME = 2**31 - 1


def mixed(*parts: int) -> int:
    """A number that depends on all of these, in their order."""
    found = 7
    for part in parts:
        found = (found * 31337 + part + 1) % PRIME
    return found


def state(text: list[int], place: int) -> int:
    """The base's state at a position, which has read everything up to it."""
    return mixed(*text[: place + 1])


def expected(text: list[int], depth: int) -> list[int]:
    """Drafts after a text as the definition has them: each head over all positions, on true tokens and its drafts."""
    ids, states = list(text), [state(text, place) for place in range(len(text) - 1)]
    drafts = []
    for head in range(depth):
        read = [mixed(states[place], ids[place + head + 1]) for place in range(len(states))]
        states = [mixed(head, *read[: place + 1]) for place in range(len(states))]
        drafts.append(states[-1] % TOKENS)
        ids.append(drafts[-1])
    return drafts


class Cached:
    """One request as the proposer serves it: entries of each head by position, kept from round to round."""

    def __init__(self, depth: int, prompt: list[int]) -> None:
        self.depth, self.prompt = depth, prompt
        self.window = Window(depth)
        self.entries: list[dict[int, int]] = [{} for _ in range(depth)]

    def round(self, first: int, text: list[int], known: int) -> list[int]:
        """The base has computed positions first..known-1 of a text; drafts after token `known`."""
        ahead = text[known + 1 : known + self.depth]
        states = torch.tensor([[state(text, place)] for place in range(first, known)])
        ids, hidden, begin = self.window.extend(first, text[first:known], states, text[known])
        read, rows = torch.tensor(ids), [int(value) for value in hidden[:, 0]]
        assert len(ids) == len(rows)
        drafts = []
        for head in range(self.depth):
            for row, token in enumerate(read.tolist()):
                self.entries[head][begin + row] = mixed(rows[row], token)
            seen = [self.entries[head][place] for place in range(begin + len(rows))]
            rows = [mixed(head, *seen[: begin + row + 1]) for row in range(len(rows))]
            drafts.append(rows[-1] % TOKENS)
            newest = ahead[head] if head < len(ahead) else drafts[-1]
            read = shifted(read, torch.tensor([len(ids) - 1]), torch.tensor([newest]))
        self.window.read = [*ahead, *drafts[len(ahead) :]][: self.depth - 1]
        return drafts


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("seed", range(20))
def test_drafts_are_those_of_heads_that_read_everything_anew(depth: int, seed: int) -> None:
    """Fault: rows that had read rejected drafts and are not computed again, or one of them too few."""
    draw = random.Random(seed)
    prompt = [draw.randrange(TOKENS) for _ in range(draw.randrange(1, 12))]
    request, text, done = Cached(depth, prompt), list(prompt), 0
    # A prompt in chunks, whose rest is known.
    while done + 1 < len(prompt) - 1 and draw.random() < 0.7:
        chunk = draw.randrange(done + 1, len(prompt))
        request.round(done, text, chunk)
        done = chunk
    drafts: list[int] = []
    for _ in range(25):
        # Drafts that were scheduled, and how many of them the base agrees with.
        scheduled = drafts[: draw.choice([0, depth, depth])]
        accepted = draw.randrange(len(scheduled) + 1)
        text += scheduled[:accepted]
        text.append(draw.randrange(TOKENS))
        known = len(text) - 1
        drafts = request.round(done, text, known)
        assert drafts == expected(text, depth)
        done = known


def test_a_request_that_goes_on_is_not_one_that_begins() -> None:
    """Fault: states of other positions, put before those of a request that was begun again."""
    window = Window(3)
    window.extend(0, [1, 2, 3], torch.zeros(3, 1), 4)
    assert len(window.text) == 4
    window.read = [0, 0]
    tokens, states, begin = window.extend(3, [4], torch.ones(1, 1), 1)
    assert (tokens, begin, len(states)) == ([3, 4, 1], 1, 3)


def test_shifting_stays_inside_of_each_request() -> None:
    """Fault: a token of the next request, read by the last row of one."""
    moved = shifted(torch.tensor([1, 2, 3, 7, 8]), torch.tensor([2, 4]), torch.tensor([4, 9]))
    assert moved.tolist() == [2, 3, 4, 8, 9]
