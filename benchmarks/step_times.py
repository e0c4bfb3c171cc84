"""Steps of one process and of two, timed beside what the formula of `step_time.py` says of them.

    python benchmarks/step_times.py --json benchmarks/step-times.json

A Llama with random weights, and chain heads for it, in float32; each process has a core and one thread. What the
machine can do is measured before and after each case, by the processes at the same time, as they work in a step:
operations a second of the products of a layer, a head and the loss; bytes a second of a sweep over what lies between
them, and of a copy of a layer's weights; numbers a second of a softmax; bytes a second that gloo's collectives bring
in. Steps are timed as `mtpd distill` takes them: the median, without the first ones. `test_step_time.py` holds
what was found to the formula.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lab import machine
from measure import clock
from step_time import Machine, Work, step_seconds, work_of
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from mtpd.data.disk_store import fill
from mtpd.data.packing import PackedRows
from mtpd.data.store import MemoryStore
from mtpd.heads import build_heads, configure_heads, start_heads
from mtpd.losses.fused import TILE_BYTES
from mtpd.parallel import ranks
from mtpd.plan.scaling import Sharding
from mtpd.recipe import Recipe, load_recipe
from mtpd.run.directory import RunDirectory
from mtpd.run.session import Session
from mtpd.run.training import train_heads
from mtpd.trunk import Trunk

MODEL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 16384,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
WORDS = ["heads.depth=2", "dtype=float32", "device=cpu", "data.max_new_tokens=64", "train.micro_batch_rows=1"]
CASES: dict[int, list[tuple[Sharding, int, bool]]] = {
    # Sharding, tokens of a row, and whether the trunk's states are stored.
    1: [("none", 512, False), ("none", 512, True), ("none", 128, False)],
    2: [
        *(
            ("none", 512, False),
            ("none", 512, True),
            ("zero2", 512, False),
            ("zero3", 512, False),
            ("zero3", 512, True),
        ),
        *(("none", 128, False), ("zero2", 128, False), ("zero3", 128, False)),
    ],
}
WARM = 2
"""Steps that are not counted."""


def recipe_of(sharding: str, tokens: int, steps: int, folder: Path, *, name: str) -> Recipe:
    preset = "null" if sharding == "none" else sharding
    given = [f"model={folder}", f"output={folder / name}", f"data.row_length={tokens}", f"train.deepspeed={preset}"]
    return load_recipe(None, [*WORDS, *given, f"train.max_steps={steps}", "train.save_steps=1000000"])


def load_of(model: dict[str, Any], words: Sequence[str], tokens: int) -> Work:
    """What the formula is given, from the configuration alone."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(model))
        return work_of(load_recipe(None, [*words, f"model={folder}", f"data.row_length={tokens}"]))


class Clock(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._began = clock()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(clock() - self._began)


def timed(function: Callable[[], Any], *, runs: int = 5) -> float:
    """Median seconds of a call, which all processes make at the same time."""
    found = []
    for _ in range(runs):
        ranks.barrier()
        began = clock()
        function()
        found.append(clock() - began)
    return statistics.median(found)


def product_rate(config: LlamaConfig, tokens: int, depth: int) -> float:
    """Operations a second of the products of a step: forward of the trunk; forward and backward of heads and loss."""
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    # [out, in] of the linear layers of a decoder layer, and of the projection of a head.
    linear = {(width, width): 4, (inner, width): 2, (width, inner): 1}
    head = {**linear, (width, 2 * width): 1}
    rows = min(256, tokens)
    logits = Products(rows, config.vocab_size, width)
    operations = total = 0.0
    for shape in head:
        one = Products(tokens, *shape)
        forward = layers * linear.get(shape, 0) + depth * head[shape]
        operations += one.operations * (forward + 2 * depth * head[shape])
        total += forward * one.forward() + depth * head[shape] * (one.of_input() + one.of_weight())
    operations += (1 + 2 * depth) * tokens / rows * logits.operations
    total += tokens / rows * ((1 + depth) * logits.forward() + depth * logits.of_input())
    # Two products forward, and five back.
    attention = 4 * tokens**2 * width
    forward, back = attention_seconds(config, tokens)
    operations += (layers + 3.5 * depth) * attention
    total += (layers + depth) * forward + depth * back
    return operations / total


class Products:
    """Those of a linear layer, with another matrix of weights each time, as in a step."""

    def __init__(self, tokens: int, out: int, inside: int) -> None:
        self.read, self.written = torch.full((tokens, inside), 0.1), torch.full((tokens, out), 0.1)
        self.weights = [torch.full((out, inside), 0.1) for _ in range(6)]
        self.operations = 2 * tokens * out * inside

    def forward(self) -> float:
        each = iter(self.weights * 2)
        return timed(lambda: torch.mm(self.read, next(each).T, out=self.written))

    def of_input(self) -> float:
        each = iter(self.weights * 2)
        return timed(lambda: torch.mm(self.written, next(each), out=self.read))

    def of_weight(self) -> float:
        each = iter(self.weights * 2)
        return timed(lambda: torch.mm(self.written.T, self.read, out=next(each)))


def attention_seconds(config: LlamaConfig, tokens: int) -> tuple[float, float]:
    """Of the attention of a layer over a row: forward, and backward."""
    shape = 1, config.num_attention_heads, tokens, config.hidden_size // config.num_attention_heads
    parts = [torch.full(shape, 0.1, requires_grad=True) for _ in range(3)]
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]

    def forward() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask)

    alone = timed(forward)
    return alone, timed(lambda: torch.autograd.grad(forward().sum(), parts)) - alone


def sweep_rate(config: LlamaConfig, tokens: int) -> float:
    """Bytes a second, read and written ones together, of what makes a new tensor of two, as wide as an MLP is."""
    one, other = (torch.randn(tokens, config.intermediate_size) for _ in range(2))
    return 3 * one.nbytes / timed(lambda: torch.mul(one, other), runs=21)


def copy_rate(elements: int) -> float:
    """Bytes a second, read and written ones together, of a copy of so many numbers into new memory."""
    tensor = torch.ones(elements)
    return 2 * tensor.nbytes / timed(tensor.clone, runs=9)


def softmax_rate(config: LlamaConfig) -> float:
    """Numbers a second of a softmax over a tile of the loss."""
    tile = torch.randn(max(1, TILE_BYTES // (4 * config.vocab_size)), config.vocab_size)
    return tile.numel() / timed(lambda: torch.softmax(tile, dim=1), runs=21)


def link_rate(elements: int) -> float:
    """Bytes a second that come in while gradients of so many elements are summed over the processes."""
    tensor = torch.ones(elements)
    dist.all_reduce(tensor)
    count = dist.get_world_size()
    return 2 * tensor.nbytes * (count - 1) / count / timed(lambda: dist.all_reduce(tensor))


def rates(config: LlamaConfig, tokens: int, depth: int) -> dict[str, float]:
    found = {"flops": product_rate(config, tokens, depth), "memory": sweep_rate(config, tokens)}
    found["softmax"] = softmax_rate(config)
    # As many as a decoder layer has, about.
    found["copies"] = copy_rate(4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size)
    if ranks.count() > 1:
        found["link"] = link_rate(6 * 2**20)
    return found


def steps(trunk: Trunk, sharding: Sharding, tokens: int, stored: bool, count: int, folder: Path) -> list[float]:
    """Seconds of so many steps, as `mtpd distill` takes them."""
    recipe = recipe_of(sharding, tokens, WARM + count, folder, name=f"{sharding}-{tokens}-{stored}")
    config = configure_heads(recipe.heads.model_dump(), trunk, vocabulary=0, fingerprint="")
    heads = build_heads(trunk, config)
    start_heads(heads, trunk, "identity", lambda: [], seed=0)
    ids = torch.randint(MODEL["vocab_size"], (4, tokens), generator=torch.Generator().manual_seed(0))
    rows = PackedRows(ids, ids, torch.arange(tokens).expand(4, tokens), documents=4, cut=0, dropped=0)
    store = MemoryStore(trunk, rows) if stored else None
    if store is not None:
        fill(store, trunk, rows, batch_rows=1, progress=False)
    session = Session(recipe, RunDirectory(recipe.output), trunk, None, "", [2], False)
    clock = Clock()
    train_heads(session, heads, rows, store, [], callbacks=[clock])
    return clock.seconds[WARM:]


def work(folder: Path, count: int, shardings: Sequence[str], lengths: Sequence[int]) -> None:
    """What one process does; the first one writes what was found."""
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["RANK"]) % len(cores)]})
    torch.manual_seed(0)
    config = LlamaConfig(**{key: value for key, value in MODEL.items() if key != "model_type"})
    trunk = Trunk(LlamaForCausalLM(config).eval())
    with ranks.joined(torch.device("cpu")):
        found: dict[str, Any] = {"rates": {}, "steps": []}
        before: dict[str, float] = {}
        length = 0
        chosen = [case for case in CASES[ranks.count()] if case[0] in shardings and case[1] in lengths]
        for sharding, tokens, stored in chosen:
            # The machine is not the same from one minute to the next.
            now = before if tokens == length else rates(config, tokens, 2)
            seconds = steps(trunk, sharding, tokens, stored, count, folder)
            after = rates(config, tokens, 2)
            before, length = after, tokens
            case = {"sharding": sharding, "tokens": tokens, "stored": stored, "seconds": statistics.median(seconds)}
            case["rates"] = {name: (now[name] + after[name]) / 2 for name in now}
            found["steps"].append(case)
            if ranks.is_main():
                print(f"{ranks.count()} {case} {[round(each, 3) for each in seconds]}", flush=True)
                (folder / "found.json").write_text(json.dumps(found))


def in_processes(number: int, words: Sequence[str]) -> list[dict[str, Any]]:
    """The steps of so many processes, of what the words of the command line chose."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (Path(folder) / "config.json").write_text(json.dumps(MODEL))
        common = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1"}
        common |= {"MASTER_PORT": free.getsockname()[1], "OMP_NUM_THREADS": 1, "MKL_NUM_THREADS": 1}
        free.close()
        command = [sys.executable, "-W", "ignore", __file__, *words, "--work", folder]
        each = [
            subprocess.Popen(
                command,
                env=os.environ
                | {name: str(value) for name, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()},
            )
            for rank in range(number)
        ]
        codes = [process.wait() for process in each]
        if any(codes):
            raise SystemExit(f"the processes ended with {codes}")
        found: list[dict[str, Any]] = json.loads((Path(folder) / "found.json").read_text())["steps"]
        return [{"ranks": number, **case} for case in found]


def name_of(case: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(case[key] for key in ("ranks", "sharding", "tokens", "stored"))


def machine_of(rates: dict[str, float]) -> Machine:
    """As the formula takes it: gloo's messages are carried by the cores that compute."""
    link = rates.get("link", float("inf"))
    own = {name: rates[name] for name in ("flops", "memory", "copies", "softmax")}
    return Machine(**own, link=link, network=link, overlaps=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="keeps what it has of other cases")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--shardings", nargs="*", default=["none", "zero2", "zero3"])
    parser.add_argument("--tokens", type=int, nargs="*", default=[512, 128])
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        work(options.work, options.steps, options.shardings, options.tokens)
        return
    found = [case for number in options.ranks for case in in_processes(number, sys.argv[1:])]
    loads = {tokens: load_of(MODEL, WORDS, tokens) for tokens in {case["tokens"] for case in found}}
    print("| processes | sharding | tokens | stored | measured, s | formula, s | formula / measured |")
    print("|---|---|---|---|---|---|---|")
    for case in found:
        said = step_seconds(
            loads[case["tokens"]], case["sharding"], case["ranks"], machine_of(case["rates"]), stored=case["stored"]
        )
        stored = "yes" if case["stored"] else "no"
        name = "null" if case["sharding"] == "none" else case["sharding"]
        print(
            f"| {case['ranks']} | {name} | {case['tokens']} | {stored} | {case['seconds']:.3f} | {said:.3f} "
            f"| {said / case['seconds']:.2f} |"
        )
    if options.json is not None:
        own = f"{machine().partition(',')[0]}, one thread a process"
        about = {"machine": own, "date": date.today().isoformat(), "command": f"python {' '.join(sys.argv)}"}
        before = json.loads(options.json.read_text())["steps"] if options.json.is_file() else []
        known = {name_of(case) for case in found}
        found = [*(case for case in before if name_of(case) not in known), *found]
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**about, "model": MODEL, "words": WORDS, "steps": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
