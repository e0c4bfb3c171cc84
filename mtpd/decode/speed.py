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
from transformers import GenerationConfig

from mtpd.decode.drafting import Drafting
from mtpd.decode.engine import Engine
from mtpd.decode.model import Model
from mtpd.decode.text import Request
from mtpd.decode.transformers_mtp import mtp_in_transformers
from mtpd.errors import UserError
from mtpd.heads import Heads
from mtpd.trunk import Trunk

WAYS = {
    "mtpd": "this package with the heads",
    "plain": "transformers' generate without heads",
    "transformers": "transformers' generate(use_mtp=True) with the same heads, one prompt at a time",
    "engine": "this package without drafts",
}
PARTS = ("trunk", "drafts", "verification", "bookkeeping")
SIBLINGS = (1, 2, 4, 8)
TREES = (8, 16, 32)
THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.5)


@dataclass
class Speed:
    """One way of decoding."""

    name: str
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    forwards: int = 0
    """Passes of the trunk, summed over rows; 0 where they are not counted."""
    texts: list[list[int]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tokens a second, median over runs."""
        return self.tokens / statistics.median(self.seconds)

    @property
    def tau(self) -> float | None:
        """Tokens for each pass of the trunk that a row took part in."""
        return self.tokens / self.forwards if self.forwards else None

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
) -> dict[str, Speed]:
    """Times greedy decoding of all prompts, `batch` at a time.

    Raises:
        UserError: an unknown way, or one that does not decode so many prompts at a time.
    """
    for way in ways:
        if way not in WAYS:
            raise UserError(f"against: {way} is not known; accepted: {', '.join(WAYS)}")
    if batch > 1 and "transformers" in ways:
        raise UserError("batch: transformers' generate(use_mtp=True) takes one prompt at a time; accepted with it: 1")
    speeds = {way: Speed(way) for way in ways}
    with mtp_in_transformers(model.trunk, _heads(model)) if "transformers" in ways else nullcontext():
        calls: dict[str, Callable[[], tuple[list[list[int]], int]]] = {
            "mtpd": lambda: engine_texts(model.trunk, model.heads, prompts, drafting=model.drafting, **limits),
            "engine": lambda: engine_texts(model.trunk, None, prompts, **limits),
            "plain": lambda: (generated(model.trunk, prompts, **limits), 0),
            "transformers": lambda: (generated(model.trunk, prompts, use_mtp=True, **limits), 0),
        }
        limits: dict[str, Any] = {"max_new_tokens": 4, "end_tokens": end_tokens, "batch": batch}
        for way in ways:
            calls[way]()
        limits["max_new_tokens"] = max_new_tokens
        for run in range(runs):
            turn = run % len(ways)
            for way in [*ways[turn:], *ways[:turn]]:
                began = now(model.trunk)
                texts, forwards = calls[way]()
                speed = speeds[way]
                speed.seconds.append(now(model.trunk) - began)
                speed.texts, speed.forwards, speed.tokens = texts, forwards, sum(map(len, texts))
    return speeds


def engine_texts(
    trunk: Trunk,
    heads: Heads | None,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_tokens: Collection[int],
    batch: int,
    drafting: Drafting | None = None,
) -> tuple[list[list[int]], int]:
    """Texts of this package in the order of the prompts, and the passes of the trunk, summed over rows."""
    engine = Engine(
        trunk,
        heads,
        slots=batch,
        capacity=max(map(len, prompts)) + max_new_tokens,
        end_tokens=end_tokens,
        drafting=drafting,
    )
    texts = sorted(engine.run(Request(each, max_new_tokens) for each in prompts), key=lambda text: text.number)
    return [text.tokens for text in texts], sum(1 + len(text.rounds) for text in texts)


def generated(
    trunk: Trunk,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_tokens: Collection[int],
    batch: int,
    use_mtp: bool = False,
) -> list[list[int]]:
    """Greedy texts of transformers' `generate`, padded on the left, without penalties that a checkpoint asks for."""
    ends = sorted(end_tokens)
    texts: list[list[int]] = []
    before = trunk.model.generation_config
    trunk.model.generation_config = GenerationConfig()
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        use_mtp=use_mtp or None,
    )
    try:
        for start in range(0, len(prompts), batch):
            rows = prompts[start : start + batch]
            width = max(map(len, rows))
            ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=trunk.device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=trunk.device)
            output = trunk.model.generate(ids, attention_mask=mask, generation_config=config)
            for new in output[:, width:].tolist():
                end = next((place for place, token in enumerate(new, start=1) if token in end_tokens), None)
                texts.append(new[:end])
    finally:
        trunk.model.generation_config = before
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
    engine = Engine(
        model.trunk,
        model.heads,
        slots=batch,
        capacity=max(map(len, prompts)) + max_new_tokens,
        drafting=model.drafting,
    )
    found = watch(engine, model.trunk)
    for _ in engine.run(Request(each, max_new_tokens) for each in prompts):
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
    patched._pass = timed("trunk", engine._pass)
    patched._draft = timed("drafts", engine._draft)
    patched.unembedding = timed("verification", engine.unembedding)
    patched.choice.choose = timed("verification", engine.choice.choose)
    return found


def tune(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    end_tokens: Collection[int] = (),
    batch: int = 1,
    runs: int = 2,
) -> list[tuple[Drafting, float]]:
    """Measures tokens/s of every depth, then of siblings or trees, then of thresholds; fastest first."""
    heads = _heads(model)
    limits: dict[str, Any] = {"end_tokens": end_tokens, "batch": batch}

    def rates(candidates: Sequence[Drafting]) -> list[float]:
        seconds: list[list[float]] = [[] for _ in candidates]
        tokens = [0] * len(candidates)
        for each in candidates:
            engine_texts(model.trunk, heads, prompts[:1], drafting=each, max_new_tokens=2, **limits)
        for run in range(runs):
            order = list(range(len(candidates)))
            for place in order if run % 2 == 0 else reversed(order):
                began = now(model.trunk)
                texts, _ = engine_texts(
                    model.trunk, heads, prompts, drafting=candidates[place], max_new_tokens=max_new_tokens, **limits
                )
                seconds[place].append(now(model.trunk) - began)
                tokens[place] = sum(map(len, texts))
        return [count / min(times) for count, times in zip(tokens, seconds, strict=True)]

    measured: list[tuple[Drafting, float]] = []

    def best(candidates: Sequence[Drafting]) -> Drafting:
        measured.extend(zip(candidates, rates(candidates), strict=True))
        measured.sort(key=lambda pair: -pair[1])
        return measured[0][0]

    fastest = best([Drafting(depth=depth) for depth in range(1, heads.depth + 1)])
    fastest = best([fastest.model_copy(update={"siblings": count}) for count in SIBLINGS])
    if heads.independent:
        # A tree is as deep as pays by itself.
        fastest = best([Drafting(depth=heads.depth, tree=nodes) for nodes in TREES])
    if heads.depth > 1:
        # Drafting stops by itself where it does not pay: deeper than the best fixed depth is worth a try.
        deeper = {"depth": min(fastest.depth + 1, heads.depth)}
        best([fastest.model_copy(update={**deeper, "threshold": each}) for each in THRESHOLDS])
    return measured


def now(trunk: Trunk) -> float:
    """A clock that waits for the device."""
    if trunk.device.type == "cuda":
        torch.cuda.synchronize(trunk.device)
    return time.perf_counter()


def _heads(model: Model) -> Heads:
    if model.heads is None:
        raise UserError("bench: there are no heads to measure")
    return model.heads
