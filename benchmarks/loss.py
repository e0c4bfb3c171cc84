"""The fused loss of all depths, forward and backward, beside an eager one and beside TRL's chunked divergence.

    python benchmarks/loss.py --json loss.json

Forward KL, four depths. `eager` is `losses/reference.py`, head by head with a backward pass each, so that one
head's logits live at a time. `trl` is `ChunkedDivergenceFunction` of TRL, called once a head. All run in turn in one
process; times are medians, memory is the peak of the bytes of live tensors. The roofline is the time that the
products alone take at the rate measured for one large product, or their bytes at the bandwidth measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lab import machine, write_rows
from measure import alternate, bandwidth, peak_bytes, product_rate
from torch import Tensor
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from mtpd.losses import reference
from mtpd.losses.fused import multi_depth_loss
from mtpd.losses.settings import LossSettings
from mtpd.trunk import Unembedding

SHAPES = ((49_152, 576), (151_936, 1_024))


class Work:
    """Random states and an unembedding of one shape, and the contenders on them."""

    def __init__(
        self,
        positions: int,
        depths: int,
        vocabulary: int,
        size: int,
        dtype: torch.dtype,
        top_n: int,
        device: str = "cpu",
    ) -> None:
        draw = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, device=device).to(dtype)

        self.students = [normal(positions, size).requires_grad_() for _ in range(depths)]
        self.trunk = normal(positions, size)
        self.head = Unembedding(normal(vocabulary, size).mul_(0.05))
        self.masks = [torch.arange(positions, device=device) < positions - k for k in range(1, depths + 1)]
        self.targets = [torch.randint(vocabulary, (positions,), generator=draw, device=device) for _ in range(depths)]
        labels = 0.3 if top_n else 0.0
        self.settings = LossSettings((labels,) * depths, (1.0,) * depths, top_n=top_n)
        self.rows = sum(int(mask.sum()) for mask in self.masks)
        # Products: one for the teacher rows, two for each row of a head.
        teachers = positions - 1
        self.operations = 2 * vocabulary * size * (teachers + 2 * self.rows)
        item = self.head.weight.dtype.itemsize
        products = 1 + 2 * depths
        self.bytes = products * item * (vocabulary * size + positions * size + positions * vocabulary)

    def fused(self, *, compiled: bool = False) -> None:
        loss, _ = multi_depth_loss(
            self.students,
            self.trunk,
            self.head,
            targets_P=self.targets,
            masks_P=self.masks,
            settings=self.settings,
            compiled=compiled,
        )
        torch.autograd.grad(loss, self.students)

    def eager(self) -> None:
        for k, (student, target) in enumerate(zip(self.students, self.targets, strict=True), start=1):
            count = len(self.trunk) - k + 1
            one = LossSettings(self.settings.alpha[:1], self.settings.beta[:1], top_n=self.settings.top_n)
            loss = reference.multi_depth_loss(
                [student[:count]],
                self.trunk[k - 1 :],
                self.head,
                targets_P=[target[:count]],
                masks_P=[self.masks[k - 1][:count]],
                settings=one,
            )
            torch.autograd.grad(loss, student)

    def trl(self) -> None:
        for k, student in enumerate(self.students, start=1):
            count = len(self.trunk) - k
            weight = self.head.weight
            divergence, _ = ChunkedDivergenceFunction.apply(
                student[:count], weight, None, self.trunk[k:], weight, None, 0.0
            )
            torch.autograd.grad(divergence.sum(), student)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--shapes", type=int, nargs="*", default=range(len(SHAPES)), help="which of the shapes, 0 or 1")
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--against", nargs="*", default=["eager", "trl"])
    parser.add_argument("--top-n", type=int, default=0, help="MTP-D with so many tokens instead of the KL")
    parser.add_argument("--compile", action="store_true", help="ours with torch.compile")
    options = parser.parse_args()
    if options.top_n and "trl" in options.against:
        parser.error("--top-n: trl has no top n; accepted: --against eager")
    table: list[dict[str, Any]] = []
    speed = bandwidth()
    print(f"{machine()}; bandwidth {speed / 1e9:.1f} GB/s", flush=True)
    for shape in options.shapes:
        vocabulary, size = SHAPES[shape]
        for name in options.dtypes:
            dtype = getattr(torch, name)
            work = Work(options.positions, options.depth, vocabulary, size, dtype, options.top_n)
            contenders: dict[str, Callable[[], None]] = {"ours": lambda work=work: work.fused(compiled=options.compile)}
            contenders |= {against: getattr(work, against) for against in options.against}
            if options.compile:
                work.fused(compiled=True)
            memory = {each: peak_bytes(function) for each, function in contenders.items()}
            times = alternate(contenders, runs=options.runs)
            rate = product_rate(options.positions, size, vocabulary, dtype)
            roofline = max(work.operations / rate, work.bytes / speed)
            label = f"loss {vocabulary} x {size} {name}"
            label += f" top {options.top_n}" if options.top_n else ""
            label += " compiled" if options.compile else ""
            common = {"runs": options.runs, "machine": machine()}
            rows = [
                {"name": label, "ours": found["ours"], "other": found[against], "against": against, "unit": unit}
                for against in options.against
                for found, unit in ((times, "seconds"), (memory, "bytes"))
            ]
            rows.append(
                {"name": label, "ours": times["ours"], "other": roofline, "against": "roofline", "unit": "seconds"}
            )
            for row in rows:
                row |= {"ratio": row["ours"] / row["other"], **common}
                print(
                    f"{label:45} {row['unit']:8} ours {row['ours']:.4g}, {row['against']} {row['other']:.4g}: "
                    f"{row['ratio']:.3f}",
                    flush=True,
                )
            print(
                f"{label:45} {work.operations / 1e12:.2f} TFLOP and {work.bytes / 1e9:.1f} GB; products at "
                f"{rate / 1e9:.0f} GFLOP/s; share of the roofline {roofline / times['ours']:.0%}",
                flush=True,
            )
            table += rows
            write_rows(options.json, table)


if __name__ == "__main__":
    main()
