"""Memory of a GPU and time of a step on paper, for 8 to 512 GPUs: the tables of docs/results/scaling.md.

    python benchmarks/scaling.py

Nothing is measured: memory comes from `mtpd.plan.scaling`, time from `step_time.py` and the rates below.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from step_time import Machine, Work, step_seconds, work_of

from mtpd.plan.scaling import Sharding, fits, host_memory, memory
from mtpd.recipe import load_recipe

GPU_MEMORY = 80e9
H100 = Machine(
    flops=0.4 * 989e12,
    memory=0.8 * 3.35e12,
    copies=0.8 * 3.35e12,
    softmax=0.1 * 3.35e12,
    link=0.8 * 450e9,
    network=0.8 * 8 * 50e9,
)
"""40% of the dense bfloat16 rate of an H100 SXM; 80% of the bandwidth of its memory, of one direction of NVLink 4, and
of the eight ports of 400 Gb/s of a machine: what has come in through one of them is handed on inside. A softmax takes
as long as reading and writing 8 bytes."""
RANKS = (8, 16, 32, 64, 128, 256, 512)
SHARDED: tuple[Sharding, ...] = ("zero2", "zero3", "zero3-cpu")
SETTINGS = ["heads.depth=4", "data.row_length=2048", "train.micro_batch_rows=2", "dtype=bfloat16", "device=cpu"]
"""A micro batch of 4,096 tokens in each GPU."""

CONFIGS: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
    "Llama-3.1-70B": {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
    # All of its shape is what transformers takes for a configuration of this type that says nothing.
    "DeepSeek-V3, 671B": {"model_type": "deepseek_v3", "max_position_embeddings": 163840},
}
FURTHER = {"DeepSeek-V3, 671B": ["heads.shared=true"]}
"""A head is a layer with 256 experts there: one for all depths, as the model itself was trained."""


def load_of(name: str, *words: str) -> Work:
    """Counts parameters on the meta device, as a plan does."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIGS[name]))
        return work_of(load_recipe(None, [f"model={folder}", *SETTINGS, *FURTHER.get(name, []), *words]))


def amount(bytes_: float) -> str:
    """GB, with what an 80 GB GPU has no room for in brackets."""
    shown = f"{bytes_ / 1e9:,.0f}" if bytes_ >= 1e10 else f"{bytes_ / 1e9:.1f}"
    return shown if bytes_ <= 0.9 * GPU_MEMORY else f"({shown})"


def table(name: str, load: Work) -> str:
    """The table of one model, in Markdown."""
    lines = [
        f"### {name}",
        "",
        f"{load.trunk / 1e9:.1f} billion parameters in the trunk, {load.largest_layer / 1e9:.2f} billion in its "
        f"largest layer, {load.heads / 1e9:.2f} billion in the heads.",
        "",
        "| GPUs | zero2, GB | zero3, GB | zero3-cpu, GB (host) | step zero2, ms (stored) "
        "| step zero3, ms (stored) | first that fits |",
        "|---|---|---|---|---|---|---|",
    ]
    for ranks in RANKS:
        needed = {each: sum(memory(load, each, ranks).values()) for each in SHARDED}
        times = {
            each: [1000 * step_seconds(load, each, ranks, H100, stored=stored) for stored in (False, True)]
            for each in SHARDED
        }
        host = host_memory(load, "zero3-cpu", ranks)
        chosen = next((fit.sharding for fit in fits(load, ranks, GPU_MEMORY) if fit.fits), "nothing")
        cells = [
            str(ranks),
            *(amount(needed[each]) for each in ("zero2", "zero3")),
            f"{amount(needed['zero3-cpu'])} ({host / 1e9:,.1f})",
            *("{:,.0f} ({:,.0f})".format(*times[each]) for each in ("zero2", "zero3")),
            "null" if chosen == "none" else chosen,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def long_rows(name: str, tokens: int, ranks: int) -> str:
    """A table of rows that are split over more and more GPUs, in Markdown."""
    lines = ["| GPUs to a row | zero2, GB | step, ms | a row, ms |", "|---|---|---|---|"]
    for parts in (1, 2, 4, 8):
        words = ["train.micro_batch_rows=1", f"data.row_length={tokens}", f"train.sequence_parallel={parts}"]
        load = load_of(name, *words, "train.deepspeed=zero2")
        needed = sum(memory(load, "zero2", ranks).values())
        seconds = step_seconds(load, "zero2", ranks, H100, stored=False)
        cells = [str(parts), amount(needed), f"{1000 * seconds:,.0f}", f"{1000 * seconds * parts / ranks:,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(CONFIGS), choices=list(CONFIGS))
    options = parser.parse_args()
    print("\n\n".join(table(name, load_of(name)) for name in options.models))
    print(f"\n### Long rows\n\n{long_rows('Llama-3.1-8B', 131_072, 8)}")


if __name__ == "__main__":
    main()
