"""Decoding 1, 8 and 64 texts at a time with a model of 1B, with and without CUDA graphs, beside transformers' own ways.

Weights are random, so heads are never right: `heads` is what rounds cost, and says nothing about a gain. That graphs
change neither texts nor what is accepted is seen with two layers in float32, where no rounding decides.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

from measure import alternate

from benchmarks.gpu.outcome import Options, Outcome
from benchmarks.gpu.shapes import SHAPES, TINY, Shape, random_trunk
from mtpd.decode.chances import Chances
from mtpd.decode.drafting import Drafting
from mtpd.decode.engine import Engine
from mtpd.decode.graphs import Graphs
from mtpd.decode.model import Model
from mtpd.decode.planner import Planner
from mtpd.decode.speed import engine_texts, generated
from mtpd.decode.text import Request
from mtpd.heads import Heads, HeadsConfig, build_heads
from mtpd.heads.chain.start import initialise
from mtpd.trunk import Trunk

EAGER = ", no graphs"
WAYS = (
    "plain generate",
    "mtpd without heads",
    f"mtpd without heads{EAGER}",
    "heads",
    f"heads{EAGER}",
    "generate with a static cache, compiled",
)
NEEDED = {"generate with a static cache, compiled": 45.0}
"""Seconds that are left at least where a way is begun."""


def work(options: Options) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    shape = TINY if options.tiny else SHAPES[0]
    for shown, planner in (("a chain", None), ("a tree", Planner(Chances(), None, nodes=12))):
        name = f"graphs beside none, {shown}"
        yield name, lambda name=name, planner=planner: compared(name, shape, planner, options)
    trunk = random_trunk(shape, options, layers=shape.layers)
    heads = _heads(shape, trunk)
    models = {
        "mtpd without heads": Model(trunk, None, drafting=Drafting(sources=("heads",))),
        "heads": Model(trunk, heads, drafting=Drafting(depth=shape.depth)),
    }
    # What has to be compiled comes last: it takes longest.
    for way in WAYS:
        for batch in (1, 2) if options.tiny else (1, 8, 64):
            draw = random.Random(batch)
            prompts = [[draw.randrange(shape.vocabulary) for _ in range(64)] for _ in range(batch)]
            name = f"{batch} at a time, {way}"
            yield name, lambda name=name, way=way, prompts=prompts: timed(name, way, models, prompts, options)


def _heads(shape: Shape, trunk: Trunk) -> Heads:
    config = HeadsConfig(depth=shape.depth, hidden_size=shape.hidden, source_layers=[trunk.depth - 1] * shape.depth)
    heads = build_heads(trunk, config)
    initialise(heads, trunk, "identity", seed=0)
    return heads.to(trunk.dtype).eval()


def _without_graphs() -> AbstractContextManager[Any]:
    return mock.patch.object(Graphs, "of", return_value=None)


def compared(name: str, shape: Shape, planner: Planner | None, options: Options) -> Outcome:
    """Texts, rounds and accepted drafts with graphs, beside those without."""
    trunk = random_trunk(shape, options, layers=2).float()
    heads = _heads(shape, trunk)
    draw = random.Random(0)
    # What is looked up is there to be found, and texts of several lengths end one after the other.
    prompts = [[draw.randrange(100) for _ in range(8 + at)] * 3 for at in range(6)]
    requests = [Request(each, (8 if options.tiny else 48) + 4 * at) for at, each in enumerate(prompts)]

    def written() -> tuple[list[Any], Engine]:
        engine = Engine(trunk, heads, slots=4, capacity=128, planner=planner)
        texts = sorted(engine.run(requests), key=lambda text: text.number)
        return [(text.tokens, text.rounds, text.sources) for text in texts], engine

    found, engine = written()
    with _without_graphs():
        plain, _ = written()
    there = len(engine.graphs) if engine.graphs is not None else 0
    same = sum(left == right for left, right in zip(found, plain, strict=True))
    accepted = sum(accepted for _, rounds, _ in found for _, _, accepted in rounds)
    used = trunk.device.type != "cuda" or there > 0
    said = f"{same} of {len(plain)} texts and their counts are the same, {accepted} drafts accepted, {there} graphs"
    return Outcome(name, same == len(plain) and used, said, {"graphs": there, "accepted": accepted})


def timed(name: str, way: str, models: dict[str, Model], prompts: list[list[int]], options: Options) -> Outcome:
    if options.left < NEEDED.get(way, 10.0):
        return Outcome(name, None, "no time is left")
    limits: dict[str, Any] = {
        "max_new_tokens": 8 if options.tiny else 64,
        "end_tokens": (),
        "batch": len(prompts),
    }
    trunk = models["heads"].trunk
    rounds = 0

    def write() -> list[list[int]]:
        nonlocal rounds
        if way.removesuffix(EAGER) in models:
            with _without_graphs() if way.endswith(EAGER) else nullcontext():
                texts, counts = engine_texts(models[way.removesuffix(EAGER)], prompts, **limits)
            rounds = counts.forwards // len(prompts)
            return texts
        static = {"cache_implementation": "static"} if "static" in way else {}
        return generated(trunk, prompts, **limits, **static)

    tokens = sum(map(len, write()))
    seconds = alternate({way: write}, runs=3)[way]
    figures = {"seconds": seconds, "tokens/s": tokens / seconds, "rounds": rounds or None}
    said = f"{tokens / seconds:,.0f} tokens/s" + (f", {1e3 * seconds / rounds:.1f} ms a round" if rounds else "")
    return Outcome(name, tokens == limits["max_new_tokens"] * len(prompts), said, figures)
