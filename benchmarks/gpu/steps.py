"""A training step of chain heads at the shapes of models of 1B, 8B and 70B: time, share of the roofline, memory.

States of the trunk are random and at hand, as from a store: a step is heads, loss, backward pass and optimizer. The
roofline is the time that its products, counted while it runs, would take at the rate of one large product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from measure import alternate, peak_bytes, product_rate
from step import Ours, autocast
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.outcome import Options, Outcome, gigabytes
from benchmarks.gpu.shapes import SHAPES, TINY, Shape, random_trunk
from mtpd.losses.settings import LossSettings
from mtpd.parallel.document_attention import by_documents

DOCUMENT = 400
"""Tokens of a document in a row."""


def work(options: Options) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    for shape in (TINY,) if options.tiny else SHAPES:
        name = f"step, heads of {shape.name}"
        yield name, lambda name=name, shape=shape: step(name, shape, options)


def step(name: str, shape: Shape, options: Options) -> Outcome:
    on_gpu = options.device.startswith("cuda")
    if on_gpu and shape.bytes_of_step > torch.cuda.mem_get_info(options.device)[0]:
        needed = gigabytes(shape.bytes_of_step)
        return Outcome(name, None, f"about {needed} needed, and the GPU has less free")
    trunk = random_trunk(shape, options, layers=1)
    settings = LossSettings(
        (0.3,) * shape.depth, (1.0,) * shape.depth, loss="mtp_d", top_n=min(10_000, shape.vocabulary // 2)
    )
    ours = Ours(trunk, settings, shared=False)
    batch = random_batch(shape, trunk.dtype, options.device)
    attention = by_documents(trunk, shape.row_length)

    def once() -> None:
        with autocast(trunk):
            loss = ours.model(**batch)["loss"]
        loss.backward()
        ours.optimizer.step()
        ours.optimizer.zero_grad()

    def run() -> None:
        if attention is None:
            return once()
        with attention.attending(trunk.decoder, ours.model.heads):
            return once()

    run()
    with FlopCounterMode(display=False) as counted:
        run()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(options.device)
        run()
        memory = torch.cuda.max_memory_allocated(options.device)
    else:
        memory = peak_bytes(run)
    seconds = alternate({"step": run}, runs=2 if options.tiny else 5)["step"]
    tokens = shape.rows * shape.row_length
    rate = product_rate(tokens, shape.hidden, shape.vocabulary, trunk.dtype, device=options.device)
    share = counted.get_total_flops() / rate / seconds
    figures = {
        "seconds": seconds,
        "tokens/s": tokens / seconds,
        "flop": counted.get_total_flops(),
        "flop/s of a product": rate,
        "share of the roofline": share,
        "peak bytes": memory,
        "depth": shape.depth,
    }
    said = f"{1e3 * seconds:.0f} ms, {tokens / seconds:,.0f} tokens/s, {share:.0%} of the roofline, {gigabytes(memory)}"
    return Outcome(name, True, said, figures)


def random_batch(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Rows of documents with random tokens and states."""
    size = (shape.rows, shape.row_length)
    ids = torch.randint(shape.vocabulary, size, device=device)
    positions = (torch.arange(shape.row_length, device=device) % DOCUMENT).expand(size).contiguous()
    hidden = torch.randn(*size, shape.hidden, device=device).to(dtype)
    return {"input_ids": ids, "labels": ids, "position_ids": positions, "hidden": hidden}
