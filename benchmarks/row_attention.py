"""Attention over packed rows: document after document, beside one pass with a mask of the whole row.

    python benchmarks/row_attention.py

SmolLM2-135M-Instruct and four chain heads over 8,192 tokens: the pass of the trunk, and the whole of forward and
backward pass with the loss, by the tokens of a row, in documents of 100 to 350 tokens. Both ways in turns, in one
process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from lab import machine
from measure import alternate

from mtpd.data.models import load_model
from mtpd.heads import build_heads, configure_heads
from mtpd.heads.chain.start import initialise
from mtpd.losses.settings import LossSettings
from mtpd.parallel.document_attention import RowAttention
from mtpd.recipe import load_recipe
from mtpd.train.model import DistillModel
from mtpd.trunk import Trunk

DEPTH, VOCABULARY, TOKENS = 4, 8192, 2048


def packed(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """Rows of random documents that are trained on as a whole."""
    random = torch.Generator().manual_seed(0)
    positions = torch.empty(rows, tokens, dtype=torch.long)
    for row in positions:
        start = 0
        while start < tokens:
            length = min(tokens - start, int(torch.randint(100, 350, (), generator=random)))
            row[start : start + length] = torch.arange(length)
            start += length
    ids = torch.randint(0, 40_000, (rows, tokens), generator=random)
    return {"input_ids": ids, "labels": ids, "position_ids": positions}


def compared(dtype: str, lengths: Sequence[int], runs: int) -> Iterator[str]:
    """A line of the table for each length of rows."""
    loaded, _ = load_model("demo", dtype=dtype)
    trunk = Trunk(loaded)
    recipe = load_recipe(None, ["model=demo", f"heads.depth={DEPTH}"])
    heads = build_heads(trunk, configure_heads(recipe.heads.model_dump(), trunk, vocabulary=VOCABULARY, fingerprint=""))
    heads.get_buffer("vocabulary").copy_(torch.arange(VOCABULARY))
    initialise(heads, trunk, "identity")
    settings = LossSettings((0.3,) * DEPTH, (0.5,) * DEPTH)
    model = DistillModel(trunk, heads, settings, autocast=None if dtype == "float32" else torch.bfloat16)

    def passed(batch: dict[str, torch.Tensor]) -> Any:
        return trunk.hidden(batch["input_ids"], position_ids=batch["position_ids"])

    def step(batch: dict[str, torch.Tensor]) -> None:
        heads.zero_grad()
        model(**batch)["loss"].backward()

    def by_document(function: Callable[[Any], Any], batch: dict[str, torch.Tensor]) -> None:
        with RowAttention().attending(trunk.decoder, heads):
            function(batch)

    for length in lengths:
        batch = packed(max(1, TOKENS // length), length)
        ways = {
            "trunk": partial(passed, batch),
            "trunk by document": partial(by_document, passed, batch),
            "step": partial(step, batch),
            "step by document": partial(by_document, step, batch),
        }
        found = alternate(ways, runs=runs)
        cells = [dtype, f"{len(batch['input_ids'])} of {length:,}"]
        for name in ("trunk", "step"):
            plain, other = found[name], found[f"{name} by document"]
            cells += [f"{plain:.2f}", f"{other:.2f}", f"{other / plain:.2f}x"]
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 1024, 2048, 4096])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine())
    print("| number format | rows | trunk, s | by document | ratio | step, s | by document | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for dtype in options.dtypes:
        for line in compared(dtype, options.lengths, options.runs):
            print(line, flush=True)


if __name__ == "__main__":
    main()
