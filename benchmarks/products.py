"""What the matrix products of a small trunk cost for the few rows of a decoding pass.

    python benchmarks/products.py

The linear layers of thirty layers of SmolLM2-135M's shape, by number format, rows and way of multiplying: PyTorch's
own, and weights packed for oneDNN. Milliseconds for all 210 products, medians of nine, in turn.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import torch
from lab import machine
from measure import clock
from torch import Tensor

SHAPES = [(576, 576)] * 2 + [(192, 576)] * 2 + [(1536, 576)] * 2 + [(576, 1536)]
"""[out, in] of the linear layers of one layer."""
LAYERS, RUNS = 30, 9
WAYS = ("linear", "packed")


def once(way: str, weights: list[Tensor], packed: list[Tensor], inputs: dict[int, Tensor]) -> None:
    """All products of a pass."""
    for weight, reordered in zip(weights, packed, strict=True):
        rows = inputs[weight.shape[1]]
        if way == "linear":
            torch.nn.functional.linear(rows, weight)
        else:
            torch.ops.mkldnn._linear_pointwise(rows, reordered, None, "none", [], "")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 2, 3, 4, 5, 8, 24])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    options = parser.parse_args()
    print(machine())
    for name in options.dtypes:
        weights = [torch.randn(shape).to(getattr(torch, name)) for _ in range(LAYERS) for shape in SHAPES]
        packed = [torch.ops.mkldnn._reorder_linear_weight(weight, 8) for weight in weights]
        for rows in options.rows:
            inputs = {size: torch.randn(rows, size).to(weights[0].dtype) for size in {w.shape[1] for w in weights}}
            ways = {way: partial(once, way, weights, packed, inputs) for way in WAYS}
            times: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(RUNS):
                for way, function in ways.items():
                    began = clock()
                    function()
                    times[way].append(1000 * (clock() - began))
            shown = ", ".join(f"{way} {statistics.median(values):.1f} ms" for way, values in times.items())
            print(f"{name}, {rows} rows: {shown}", flush=True)


if __name__ == "__main__":
    main()
