"""Look-up: what followed the newest tokens when they last stood in the text."""

from __future__ import annotations

import random

from mtpd_vllm.lookup import Lookup


def searched(text: list[int], least: int, count: int) -> list[int]:
    """The same by searching the whole text."""
    for place in range(len(text) - 1, least - 1, -1):
        if text[place - least : place] == text[len(text) - least :]:
            found: list[int] = []
            while len(found) < count:
                found.append([*text, *found][place + len(found)])
            return found
    return []


def test_the_index_finds_what_a_search_finds() -> None:
    """Fault: an older place, or a run that is indexed before it is followed by anything."""
    draw = random.Random(0)
    found = 0
    for least in (1, 2, 3):
        text = [draw.randrange(4)]
        lookup = Lookup(least)
        for _ in range(120):
            text += [draw.randrange(4) for _ in range(draw.randrange(1, 4))]
            assert lookup.after(text, 4) == searched(text, least, 4)
            found += bool(lookup.after(text, 4))
    assert found > 100


def test_a_text_that_repeats_itself_goes_on() -> None:
    """Fault: a draft that ends where the text does."""
    assert Lookup(2).after([1, 2, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]
    assert Lookup(2).after([1], 5) == []
