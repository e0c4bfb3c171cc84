"""Whether answers of another program are the trunk's."""

from __future__ import annotations

from typing import Any

import pytest

from mtpd.data.answers.check import check_answers
from mtpd.data.answers.task import Answered, Task
from mtpd.data.generation import answers
from mtpd.data.models import load_model
from mtpd.data.rows.prompt import Prompt
from mtpd.decode.choice import Choice, Greedy
from mtpd.decode.sampling import Sampling, temperature_and_top_p
from mtpd.errors import UserError
from mtpd.trunk import Trunk


@pytest.fixture(scope="module")
def trunk() -> Trunk:
    return Trunk(load_model("tiny", dtype="float32", device="cpu")[0])


def written(trunk: Trunk, temperature: float, top_p: float = 1.0, count: int = 32) -> list[Answered]:
    tasks = [Task(Prompt(f"p{n}", "text"), [1 + n, 2, 3 + n % 7, 9]) for n in range(count)]
    choice: Choice = Greedy() if temperature == 0 else Sampling(temperature_and_top_p(temperature, top_p))
    return list(answers(trunk, tasks, choice, max_new_tokens=40, ends=[], slots=16, seed=1))


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.0, 1.0), (0.7, 0.9), (1.3, 0.8)])
def test_own_answers_pass(trunk: Trunk, temperature: float, top_p: float) -> None:
    """Fault: the trunk's own answers are refused."""
    found = written(trunk, temperature, top_p)
    check_answers(trunk, found, temperature=temperature, top_p=top_p, source="here")


@pytest.mark.parametrize(
    ("made", "claimed", "message"),
    [
        ((1.0, 1.0), (0.0, 1.0), "of 1,280 tokens are its most likely ones; accepted: 98%"),
        ((0.0, 1.0), (1.0, 1.0), "nats above what the settings imply"),
        ((1.0, 1.0), (0.6, 1.0), "nats below what the settings imply"),
        ((0.6, 1.0), (1.0, 1.0), "nats above what the settings imply"),
        ((1.0, 1.0), (1.0, 0.5), "of 1,280 tokens could not have been drawn; accepted: 2%"),
    ],
)
def test_other_settings_are_found_out(trunk: Trunk, made: Any, claimed: Any, message: str) -> None:
    """Fault: answers of another temperature or nucleus are taken for those of the recipe."""
    found = written(trunk, *made)
    with pytest.raises(UserError, match=message):
        check_answers(trunk, found, temperature=claimed[0], top_p=claimed[1], source="here")


def test_a_few_wrong_tokens_pass_and_more_do_not(trunk: Trunk) -> None:
    """Fault: one token that rounds differently refuses all, or a quantised model passes as the trunk."""
    found = written(trunk, 0.0)

    def changed(count: int) -> list[Answered]:
        # Last tokens: what follows a changed one would differ as well.
        return [
            (task, [*ids[:-1], (ids[-1] + 1) % 250] if number < count else ids)
            for number, (task, ids) in enumerate(found)
        ]

    check_answers(trunk, changed(20), temperature=0.0, top_p=1.0, source="here")
    with pytest.raises(UserError, match="97.5% of 1,280 tokens"):
        check_answers(trunk, changed(32), temperature=0.0, top_p=1.0, source="here")


def test_other_weights_are_found_out(trunk: Trunk) -> None:
    """Fault: a model that is nearly the trunk, as after a coarse quantisation, passes."""
    import torch

    other = Trunk(load_model("tiny", dtype="float32", device="cpu")[0])
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter += 0.1 * parameter.std() * torch.randn_like(parameter)
    with pytest.raises(UserError, match="not the responses of this model"):
        check_answers(trunk, written(other, 0.0), temperature=0.0, top_p=1.0, source="here")
