"""Decoding 1, 8 and 64 texts at a time with a model of 1B, beside transformers' own ways.

Weights are random, so heads are never right: `heads` is what rounds cost, and says nothing about a gain.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from measure import alternate

from benchmarks.gpu.outcome import Options, Outcome
from benchmarks.gpu.shapes import SHAPES, TINY, random_trunk
from mtpd.decode.drafting import Drafting
from mtpd.decode.model import Model
from mtpd.decode.speed import engine_texts, generated
from mtpd.heads import HeadsConfig, build_heads
from mtpd.heads.chain.start import initialise

WAYS = ("plain generate", "mtpd without heads", "heads", "generate with a static cache, compiled")
NEEDED = {"generate with a static cache, compiled": 45.0}
"""Seconds that are left at least where a way is begun."""


def work(options: Options) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    shape = TINY if options.tiny else SHAPES[0]
    trunk = random_trunk(shape, options, layers=shape.layers)
    config = HeadsConfig(depth=shape.depth, hidden_size=shape.hidden, source_layers=[shape.layers - 1] * shape.depth)
    heads = build_heads(trunk, config)
    initialise(heads, trunk, "identity", seed=0)
    heads = heads.to(trunk.dtype).eval()
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
        if way in models:
            texts, counts = engine_texts(models[way], prompts, **limits)
            rounds = counts.forwards // len(prompts)
            return texts
        static = {"cache_implementation": "static"} if "static" in way else {}
        return generated(trunk, prompts, **limits, **static)

    tokens = sum(map(len, write()))
    seconds = alternate({way: write}, runs=3)[way]
    figures = {"seconds": seconds, "tokens/s": tokens / seconds, "rounds": rounds or None}
    said = f"{tokens / seconds:,.0f} tokens/s" + (f", {1e3 * seconds / rounds:.1f} ms a round" if rounds else "")
    return Outcome(name, tokens == limits["max_new_tokens"] * len(prompts), said, figures)
