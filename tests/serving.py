"""A stand-in for a server that decodes with the heads of a run, or without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stand_in import StandIn

import mtpd
from mtpd.decode.engine import Engine
from mtpd.decode.text import Request
from mtpd.recipe import load_recipe
from mtpd.run.without_weights import without_weights


@contextmanager
def serving(
    run: Path, prompts: Sequence[Sequence[int]], *, tokens: int, drafts: bool = True, wrong: int = 0
) -> Iterator[StandIn]:
    """A server that answers these prompts.

    Args:
        tokens: of each answer, at most.
        wrong: is added to every token of its texts.
    """
    model = mtpd.load(run)
    _, _, ends = without_weights(load_recipe(run / "recipe.yaml"))
    engine = Engine(
        model.trunk, model.heads, depth=2, slots=4, capacity=max(map(len, prompts)) + tokens, end_tokens=ends
    )
    answers: dict[Any, list[int]] = {}
    rounds: dict[Any, list[tuple[int, int]]] = {}
    for text in engine.run([Request(list(prompt), tokens) for prompt in prompts]):
        key = tuple(prompts[text.number])
        answers[key] = [token + wrong for token in text.tokens]
        rounds[key] = [(drafted, accepted) for _, drafted, accepted in text.rounds]
    server = StandIn(answers)
    if drafts:
        server.rounds = rounds
    else:
        server.pages = {"/metrics": "vllm:generation_tokens_total 7.0\n"}
    try:
        yield server
    finally:
        server.close()
