"""How fast heads decode against plain `generate` and against transformers' `generate(use_mtp=True)`.

    python benchmarks/decode.py runs/demo --dtype float32

Greedy, held-out prompts, ratios in one process and in turns, medians. Two more rows measure what decoding itself
costs, whatever the heads are worth: drafts that are always right (the known continuation takes their place after
they have been computed), and drafts that are always wrong.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab import machine, write_rows
from measure import clock
from torch import Tensor

import mtpd
from mtpd.data.prompts import load_prompts, render
from mtpd.data.responses import end_tokens
from mtpd.decode.drafting import Drafting
from mtpd.decode.model import Model
from mtpd.decode.speed import PARTS, Speed, breakdown, compare, engine_texts, generated
from mtpd.heads import Heads


class Known:
    """Heads whose drafts, once computed, give way to the known continuation of a text, or to other tokens."""

    def __init__(self, heads: Heads, text: Sequence[int], *, right: bool) -> None:
        self.heads = heads
        self.depth, self.shared_layers, self.independent = heads.depth, heads.shared_layers, heads.independent
        self.text = list(text) + [0] * (heads.depth + 1)
        self.step = 0 if right else 1

    def drafter(self, trunk: Any, **room: Any) -> Known:
        self.real = self.heads.drafter(trunk, **room)
        self.begin, self.read = self.real.begin, self.real.read
        return self

    def draft(self, tokens: Tensor, newest: Sequence[int], *rest: Any) -> int:
        drafted = self.real.draft(tokens, newest, *rest)
        [end] = newest
        known = self.text[end + 1 : end + 1 + drafted]
        tokens[0, end + 1 : end + 1 + drafted] = tokens.new_tensor([token + self.step for token in known])
        return drafted


def overhead(model: Model, prompts: list[list[int]], *, tokens: int, runs: int) -> dict[str, Speed]:
    """Speeds with drafts that are always right and always wrong, and of plain `generate`; one prompt at a time.

    Args:
        model: drafts a chain in every round: alternatives would mend what is wrong on purpose.
    """
    heads: Any = model.heads
    limits: dict[str, Any] = {"max_new_tokens": tokens, "end_tokens": (), "batch": 1}
    # What this very decoder writes: in 16 bits plain `generate` parts from it at a tie, and is wrong from there on.
    texts, _ = engine_texts(model, prompts, **limits)
    speeds = {name: Speed(name) for name in ("right", "wrong", "plain")}
    for _ in range(runs):
        for name, speed in speeds.items():
            seconds, count = 0.0, 0
            for prompt, text in zip(prompts, texts, strict=True):
                began = clock()
                if name == "plain":
                    written = generated(model.trunk, [prompt], **limits)
                else:
                    known: Any = Known(heads, [*prompt, *text], right=name == "right")
                    written, _ = engine_texts(Model(model.trunk, known, drafting=model.drafting), [prompt], **limits)
                seconds += clock() - began
                count += len(written[0])
            speed.seconds.append(seconds)
            speed.tokens = count
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--depth", type=int, default=None, help="a chain of so many; by default what pays in each round"
    )
    parser.add_argument("--prompts", type=int, default=3, help="decoded one at a time; 8 at a time come from as many")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", default="one,eight,overhead", help="parts to run")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()

    model = mtpd.load(options.run, dtype=options.dtype)
    assert model.heads is not None
    model.drafting = Drafting(depth=options.depth)
    ends = end_tokens(model.trunk.model, model.tokenizer)
    source = load_prompts("builtin-held-out")
    table: list[dict[str, Any]] = []

    def chosen(count: int) -> list[list[int]]:
        return [render(model.tokenizer, prompt) for prompt in source[:: len(source) // count][:count]]

    def row(name: str, ours: Speed, other: Speed, against: str, target: float | None) -> None:
        ratio = ours.against(other)
        table.append(
            {
                "name": f"{name}, {options.dtype}",
                "ours": round(ours.rate, 2),
                "other": round(other.rate, 2),
                "against": against,
                "unit": "tokens/s",
                "ratio": round(ratio, 3),
                "target": None if target is None else round(target, 3),
                "tau": None if ours.tau is None else round(ours.tau, 3),
                "same_texts": sum(a == b for a, b in zip(ours.texts, other.texts, strict=True)) if ours.texts else None,
                "runs": options.runs,
                "machine": machine(),
            }
        )
        print(json.dumps({key: value for key, value in table[-1].items() if key != "machine"}), flush=True)

    common: dict[str, Any] = {"max_new_tokens": options.tokens, "end_tokens": ends, "runs": options.runs}
    if "one" in options.only:
        prompts = chosen(options.prompts)
        speeds = compare(model, prompts, ways=("mtpd", "plain", "transformers", "engine"), **common)
        ours = speeds["mtpd"]
        row("1 prompt at a time", ours, speeds["plain"], "plain generate", 0.75 * (ours.tau or 0))
        row("1 prompt at a time", ours, speeds["transformers"], "generate(use_mtp=True)", 1.5)
        row("1 prompt at a time", ours, speeds["engine"], "mtpd without heads", None)
        parts = breakdown(model, prompts)
        print({part: f"{1000 * parts.seconds[part] / parts.rounds:.1f} ms, {parts.share(part):.1%}" for part in PARTS})
    if "eight" in options.only:
        speeds = compare(model, chosen(8), ways=("mtpd", "plain", "engine"), batch=8, **common)
        row("8 prompts at a time", speeds["mtpd"], speeds["plain"], "plain generate", 1.3)
        row("8 prompts at a time", speeds["mtpd"], speeds["engine"], "mtpd without heads", None)
        parts = breakdown(model, chosen(8), batch=8)
        print({part: f"{1000 * parts.seconds[part] / parts.rounds:.1f} ms, {parts.share(part):.1%}" for part in PARTS})
    if "overhead" in options.only:
        prompts = chosen(options.prompts)
        chain = model.drafting_with(depth=options.depth or model.heads.depth)
        speeds = overhead(chain, prompts, tokens=options.tokens, runs=options.runs)
        parts = breakdown(chain, prompts)
        step = statistics.median(speeds["plain"].seconds) / speeds["plain"].tokens
        cost = parts.seconds["drafts"] / parts.rounds / step
        depth = chain.depth
        print(f"c, the cost of {depth} drafts relative to a step of plain generate: {cost:.3f}")
        right, wrong = 0.85 * (depth + 1) / (1 + cost), 1 / (1 + cost + 0.05)
        row(f"{depth} drafts that are always right", speeds["right"], speeds["plain"], "plain generate", right)
        row(f"{depth} drafts that are always wrong", speeds["wrong"], speeds["plain"], "plain generate", wrong)
    write_rows(options.json, table)


if __name__ == "__main__":
    main()
