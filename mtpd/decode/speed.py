"""How fast heads decode: against other ways of decoding the same prompts, in one process, in turns.

All ways write the same number of tokens at most and stop at the same end tokens. Each run times every way
once; which one goes first changes from run to run. Figures are medians over runs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from mtpd.decode.counts import Counts
from mtpd.decode.drafting import HEADS, LOOKUP, Drafting
from mtpd.decode.engine import Engine
from mtpd.decode.model import Model
from mtpd.decode.plain import plain_texts
from mtpd.decode.text import Request
from mtpd.decode.transformers_mtp import mtp_in_transformers
from mtpd.errors import UserError
from mtpd.heads import Heads
from mtpd.trunk import Trunk

WAYS = {
    "plain": "transformers' generate without drafts",
    "engine": "this package without drafts",
    "lookup": "transformers' generate with its prompt look-up",
    "own-lookup": "this package, look-up alone",
    "chain": "this package, a chain of all heads in every round",
    "heads": "this package, heads alone",
    "mtpd": "this package, heads and look-up together",
    "assistant": "transformers' generate with a smaller model that drafts",
    "transformers": "transformers' generate(use_mtp=True) with the same heads",
}
"""In the order in which they are shown; `mtpd` is what a run's model does."""
ALONE = ("lookup", "assistant", "transformers")
"""Ways that take one prompt at a time."""
PROMPT_LOOKUP = 4
"""Tokens that transformers looks up at most: its `prompt_lookup_num_tokens`. More were slower on a CPU."""
PARTS = ("trunk", "drafts", "verification", "bookkeeping")


@dataclass
class Speed:
    """One way of decoding."""

    name: str
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    counts: Counts | None = None
    """Of all texts; None where they are not counted."""
    texts: list[list[int]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tokens a second, median over runs."""
        return self.tokens / statistics.median(self.seconds)

    @property
    def tau(self) -> float | None:
        """Tokens for each pass of the trunk that a row took part in."""
        return None if self.counts is None else self.counts.tokens / self.counts.forwards

    def against(self, other: Speed) -> float:
        """Ratio of the rates: the median over runs, each compared with its own neighbour."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return statistics.median((self.tokens / mine) / (other.tokens / theirs) for mine, theirs in pairs)


def compare(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    ways: Sequence[str] = ("mtpd", "plain"),
    max_new_tokens: int = 128,
    end_tokens: Collection[int] = (),
    batch: int = 1,
    runs: int = 3,
    assistant: Any = None,
) -> dict[str, Speed]:
    """Times greedy decoding of all prompts, `batch` at a time.

    Args:
        ways: names of `WAYS`.
        assistant: a model of transformers, for the way of that name.

    Raises:
        UserError: an unknown way, or one that does not decode so many prompts at a time.
    """
    for way in ways:
        if way not in WAYS:
            raise UserError(f"against: {way} is not known; accepted: {', '.join(WAYS)}")
    alone = [way for way in ways if way in ALONE]
    if batch > 1 and alone:
        raise UserError(
            f"batch: {batch} is not accepted with {alone[0]}, which takes one prompt at a time; accepted: 1"
        )
    if "assistant" in ways and assistant is None:
        raise UserError("against: assistant needs a smaller model of the same tokenizer; name it with --assistant")
    speeds = {way: Speed(way) for way in ways}
    with mtp_in_transformers(model.trunk, _heads(model)) if "transformers" in ways else nullcontext():
        trunk = model.trunk
        calls: dict[str, Callable[[], tuple[list[list[int]], Counts | None]]] = {
            "plain": lambda: (generated(trunk, prompts, **limits), None),
            "engine": lambda: engine_texts(Model(trunk, None, drafting=Drafting(sources=(HEADS,))), prompts, **limits),
            "lookup": lambda: (generated(trunk, prompts, prompt_lookup_num_tokens=PROMPT_LOOKUP, **limits), None),
            "own-lookup": lambda: engine_texts(model.drafting_with(sources=(LOOKUP,)), prompts, **limits),
            "chain": lambda: engine_texts(model.drafting_with(depth=_heads(model).depth), prompts, **limits),
            "heads": lambda: engine_texts(model.drafting_with(sources=(HEADS,)), prompts, **limits),
            "mtpd": lambda: engine_texts(model, prompts, **limits),
            "assistant": lambda: (generated(trunk, prompts, assistant_model=assistant, **limits), None),
            "transformers": lambda: (generated(trunk, prompts, use_mtp=True, **limits), None),
        }
        limits: dict[str, Any] = {"max_new_tokens": 4, "end_tokens": end_tokens, "batch": batch}
        for way in ways:
            calls[way]()
        limits["max_new_tokens"] = max_new_tokens
        for run in range(runs):
            turn = run % len(ways)
            for way in [*ways[turn:], *ways[:turn]]:
                began = now(model.trunk)
                texts, counts = calls[way]()
                speed = speeds[way]
                speed.seconds.append(now(model.trunk) - began)
                speed.texts, speed.counts, speed.tokens = texts, counts, sum(map(len, texts))
    return speeds


def engine_texts(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_tokens: Collection[int],
    batch: int,
) -> tuple[list[list[int]], Counts]:
    """Texts of a model in the order of the prompts, `batch` at a time, and the counts of all."""
    requests = [Request(each, max_new_tokens) for each in prompts]
    texts = sorted(
        model.engine(requests, slots=batch, end_tokens=end_tokens).run(requests), key=lambda text: text.number
    )
    counts = [text.counts(model.depth) for text in texts]
    return [text.tokens for text in texts], sum(counts[1:], counts[0])


def generated(
    trunk: Trunk,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_tokens: Collection[int],
    batch: int,
    **drafts: Any,
) -> list[list[int]]:
    """Greedy texts of transformers' `generate`, padded on the left, without penalties that a checkpoint asks for.

    Args:
        drafts: as for `mtpd.decode.plain.plain_texts`.
    """
    texts: list[list[int]] = []
    for start in range(0, len(prompts), batch):
        rows = prompts[start : start + batch]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=trunk.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=trunk.device)
        output = plain_texts(trunk.model, ids, max_new_tokens=max_new_tokens, ends=end_tokens, mask=mask, **drafts)
        for new in output[:, width:].tolist():
            end = next((place for place, token in enumerate(new, start=1) if token in end_tokens), None)
            texts.append(new[:end])
    return texts


@dataclass
class Breakdown:
    """Where the rounds of some texts spent their time, in seconds."""

    rounds: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    """By part: `PARTS`."""

    def share(self, part: str) -> float:
        return self.seconds[part] / sum(self.seconds.values())


def breakdown(model: Model, prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 64, batch: int = 1) -> Breakdown:
    """Times the parts of a round: the trunk's pass, drafting, main head with choice, and everything else."""
    requests = [Request(each, max_new_tokens) for each in prompts]
    engine = model.engine(requests, slots=batch)
    found = watch(engine, model.trunk)
    for _ in engine.run(requests):
        pass
    return found


def watch(engine: Engine, trunk: Trunk) -> Breakdown:
    """Times the parts of an engine's rounds from now on, as they run. Reading prompts is in none of them."""
    found = Breakdown()

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = now(trunk)
            result = call(*args, **kwargs)
            found.seconds[part] += now(trunk) - began
            return result

        return run

    whole, reading = engine._round, engine._read_prompts

    def one_round() -> None:
        before = sum(found.seconds.values())
        began = now(trunk)
        whole()
        found.seconds["bookkeeping"] += now(trunk) - began - (sum(found.seconds.values()) - before)
        found.rounds += 1

    def read(group: Any) -> None:
        kept = dict(found.seconds)
        reading(group)
        found.seconds.update(kept)

    patched: Any = engine
    patched._round, patched._read_prompts = one_round, read
    patched.verify = timed("trunk", engine.verify)
    patched._draft = timed("drafts", engine._draft)
    patched.unembedding = timed("verification", engine.unembedding)
    patched.choice.choose = timed("verification", engine.choice.choose)
    return found


def now(trunk: Trunk) -> float:
    """A clock that waits for the device."""
    if trunk.device.type == "cuda":
        torch.cuda.synchronize(trunk.device)
    return time.perf_counter()


def _heads(model: Model) -> Heads:
    if model.heads is None:
        raise UserError("bench: there are no heads to measure")
    return model.heads
