"""Slots of generation: how many, and what happens where memory ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mtpd.data import generation
from mtpd.data.answers.task import Task
from mtpd.data.generation import answers, bytes_of_a_token, groups
from mtpd.data.models import load_model
from mtpd.data.rows.prompt import Prompt
from mtpd.decode.choice import Greedy
from mtpd.slots import SlotCache
from mtpd.trunk import Trunk


@pytest.fixture(scope="module")
def trunk() -> Trunk:
    return Trunk(load_model("tiny", dtype="float32", device="cpu")[0])


def tasks(*lengths: int) -> list[Task]:
    return [
        Task(Prompt(f"p{n}", "text"), [1 + (n + k) % 200 for k in range(length)]) for n, length in enumerate(lengths)
    ]


def test_slots_fit_into_memory() -> None:
    """Fault: one long prompt makes all slots so long that memory ends."""
    long = tasks(4000, 900, 800, 100, 90)
    assert [(len(group), slots) for group, slots in groups(long, 100, slots=64, room=10**9)] == [(1, 1), (2, 2), (2, 2)]
    for room in (500, 5000, 20_000):
        found = list(groups(long, 100, slots=64, room=room))
        assert [task for group, _ in found for task in group] == long
        for group, slots in found:
            assert slots == 1 or slots * (len(group[0].ids) + 100) <= room
    assert [slots for _, slots in groups(tasks(*[100] * 10), 100, slots=4, room=10**9)] == [4]
    assert not list(groups([], 100, slots=4, room=10**9))


def test_bytes_of_a_token_are_those_of_the_cache(trunk: Trunk) -> None:
    """Fault: slots are counted with a size that the cache does not have."""
    cache = SlotCache(trunk.config, slots=3, capacity=9, dtype=trunk.dtype, device=trunk.device)
    seen: list[int] = []
    before = torch.Tensor.new_zeros

    def new_zeros(self: torch.Tensor, shape: Any, **options: Any) -> torch.Tensor:
        made = before(self, shape, **options)
        if len(shape) == 4 and shape[0] == 3 and shape[2] == 10:
            seen.append(made.nbytes)
        return made

    from mtpd.slots import Span

    span = Span([0], 2, trunk.device)
    cache.begin(span)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_zeros", new_zeros)
        trunk.decoder(input_ids=torch.ones(1, 2, dtype=torch.long), past_key_values=cache, use_cache=True)
    assert sum(seen) == 3 * 10 * bytes_of_a_token(trunk)


def test_memory_that_ends_halves_the_slots(trunk: Trunk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: what another process took meanwhile ends the run, or prompts that were answered are answered again."""
    asked = tasks(5, 6, 7, 8, 9, 10)
    settings: dict[str, Any] = {"max_new_tokens": 6, "ends": [257], "slots": 4, "seed": 0}
    whole = {task.prompt.id: tokens for task, tokens in answers(trunk, asked, Greedy(), **settings)}
    made: list[int] = []
    engine = generation.Engine

    class Small(engine):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, slots: int, **options: Any) -> None:
            made.append(slots)
            super().__init__(*args, slots=slots, **options)

        def _round(self) -> None:
            if self.slots > 2 and any(text.number == 4 for text in self.active):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            super()._round()

    monkeypatch.setattr(generation, "Engine", Small)
    found = list(answers(trunk, asked, Greedy(), **settings))
    assert made == [4, 2]
    assert len(found) == len(asked)
    assert {task.prompt.id: tokens for task, tokens in found} == whole


def test_no_slot_less_than_one(trunk: Trunk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: memory that ends with one slot is tried for ever, or hidden."""

    class Full(generation.Engine):
        def _round(self) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(generation, "Engine", Full)
    with pytest.raises(torch.OutOfMemoryError):
        list(answers(trunk, tasks(5, 6), Greedy(), max_new_tokens=6, ends=[257], slots=2, seed=0))
