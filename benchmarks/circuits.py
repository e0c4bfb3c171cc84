"""Circuit heads beside independent ones, on the byte model of `recipes/bytes-code.yaml`.

    python benchmarks/circuits.py learn runs/bytes-code --json circuits.jsonl
    python benchmarks/circuits.py learn runs/bytes-code --shared-layers 2 --structures btree --json layers.jsonl
    python benchmarks/circuits.py speed runs/bytes-code --json speed.jsonl

learn: each circuit starts from the linear heads that were pretrained beside the model, learns on the same windows of
the standard library, and drafts for held-out modules. Accepted tokens are drafts a round, tau is those and one more.
The circuits are kept in the run.
speed: those circuits and the pretrained heads decode at batch 1, in turns with the engine without heads and with
transformers' `generate`; ratios are medians over runs. It wants a quiet machine.
Each row is written as soon as it is known.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lab import machine
from measure import clock
from torch import Tensor
from transformers import GenerationConfig

from mtpd.data.models import load_model, trunk_fingerprint
from mtpd.data.packing import Sample
from mtpd.decode.chances import Chances
from mtpd.decode.drafting import HEADS
from mtpd.decode.engine import Engine
from mtpd.decode.planner import Planner
from mtpd.decode.sampling import SampledDrafts, Sampling
from mtpd.decode.text import Request
from mtpd.evaluate.offline import measure_offline
from mtpd.heads import Batch, Heads, Readout, build_heads, configure_heads, load_heads, save_heads, start_heads
from mtpd.heads.circuit.config import CircuitConfig
from mtpd.heads.circuit.heads import CircuitHeads
from mtpd.heads.shared_layers.heads import SharedLayerHeads
from mtpd.losses.settings import LossSettings
from mtpd.pretrain.text import stream_rows
from mtpd.recipe.sections import HeadsRecipe
from mtpd.trunk import Trunk

STRUCTURES = ("ff", "cp", "hmm", "btree")
GAMMA = 0.9
DEPTH = 7
PARALLEL = "parallel heads trained jointly"


def new(
    trunk: Trunk,
    structure: str,
    components: int,
    leaves: Any,
    *,
    source: Heads | None = None,
    seed: int = 0,
    shared_layers: int = 0,
) -> Heads:
    """Heads with their first weights; ff has one component, and leaves of its own."""
    if structure == "ff":
        components, leaves = 1, "full"
    circuit = CircuitConfig.model_validate({"structure": structure, "components": components, "leaves": leaves})
    form = {"kind": "circuit", "depth": DEPTH, "circuit": circuit, "shared_layers": shared_layers}
    recipe = HeadsRecipe.model_validate(form)
    heads = build_heads(trunk, configure_heads(recipe.model_dump(), trunk, vocabulary=0, fingerprint=""))
    start_heads(heads, trunk, "identity", lambda: (), seed=seed, source=source)
    return heads


def circuit_of(heads: Heads) -> CircuitHeads:
    """The circuit, behind shared layers or not."""
    inner = heads.inner if isinstance(heads, SharedLayerHeads) else heads
    assert isinstance(inner, CircuitHeads)
    return inner


def alternate(functions: Mapping[str, Callable[[], Any]], *, runs: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of each function by the clock and of the processor, all of them called in turn."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(runs):
        for name, function in functions.items():
            wall, processor = clock(), time.process_time()
            function()
            times[name].append((clock() - wall, time.process_time() - processor))
    clocks = {name: statistics.median(clock for clock, _ in found) for name, found in times.items()}
    return clocks, {name: statistics.median(processor for _, processor in found) for name, found in times.items()}


def batch_of(trunk: Trunk, ids: Tensor, heads: Heads) -> Batch:
    """Rows in which every token counts."""
    ids = ids.long()
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return Batch(ids, ids, positions, trunk.hidden(ids, position_ids=positions, before_last=heads.shared_layers))


def train(trunk: Trunk, heads: Heads, rows: Tensor, *, steps: int, rate: float, seed: int) -> float:
    """AdamW on the discounted conditional NLL; seconds."""
    readout = Readout.of(trunk, None)
    settings = LossSettings(tuple(GAMMA**k for k in range(DEPTH)), (0.0,) * DEPTH)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    size = max(1, len(order) // steps)
    began = clock()
    heads.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * (1.0 - step / steps)
        batch = batch_of(trunk, rows[order[step * size : (step + 1) * size]], heads)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, _ = heads.loss(trunk, batch, readout, settings)
        (loss / batch.input_ids.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    heads.eval()
    return clock() - began


@torch.no_grad()
def likelihood(trunk: Trunk, heads: Heads, rows: Tensor) -> list[float]:
    """Mean log p of the token of each depth after those before it, in nats."""
    readout = Readout.of(trunk, None)
    settings = LossSettings((1.0,) * DEPTH, (0.0,) * DEPTH)
    _, sums = heads.loss(trunk, batch_of(trunk, rows, heads), readout, settings)
    return (-sums.cross_entropy / sums.rows).tolist()


def decode(trunk: Trunk, heads: Heads, prompts: list[list[int]], *, sampled: bool, tokens: int) -> dict[str, Any]:
    """Accepted drafts a round and tau, all prompts in slots."""
    choice = SampledDrafts() if sampled else None
    engine = Engine(trunk, heads, slots=len(prompts), capacity=len(prompts[0]) + tokens, choice=choice)
    accepted = forwards = written = 0
    for text in engine.run(Request(prompt, tokens, seed) for seed, prompt in enumerate(prompts)):
        counts = text.counts(DEPTH)
        # The first token of a text is drafted by nothing.
        accepted += counts.tokens - counts.forwards
        forwards += counts.forwards - 1
        written += counts.tokens - 1
    return {"accepted": accepted / forwards, "tau": written / forwards, "rounds": forwards}


def along(trunk: Trunk, heads: Heads, rows: Tensor) -> dict[str, Any]:
    """The same for greedy drafts along given text, where the main head's choice is what counts."""
    samples = [Sample.of(str(number), row[:16].tolist(), row[16:].tolist()) for number, row in enumerate(rows)]
    counts = measure_offline(trunk, heads, samples, progress=False)["prompts"]
    return {"accepted": sum(counts.car), "tau": counts.tau, "car": counts.car, "expected": counts.expected_acceptance}


def learn(args: argparse.Namespace, write: Callable[[dict[str, Any]], None]) -> None:
    """Trains and measures each circuit."""
    model, tokenizer = load_model(str(args.run / "model"), dtype="bfloat16")
    trunk = Trunk(model, tokens=len(tokenizer))
    source = load_heads(args.run / "heads", trunk, fingerprint=trunk_fingerprint(model))
    rows = stream_rows(tokenizer, "stdlib", row_length=128)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(9))[: args.rows]]
    held_out = stream_rows(tokenizer, "stdlib-held-out", row_length=128, limit=args.prompts)
    exact_model, _ = load_model(str(args.run / "model"), dtype="float32")
    exact = Trunk(exact_model, tokens=len(tokenizer))
    prompts = [row[:64].tolist() for row in held_out]
    if args.parallel:
        _parallel(args, exact, prompts, held_out, write)
    for seed in args.seeds:
        for structure in args.structures:
            heads = new(
                trunk,
                structure,
                args.components,
                args.leaves,
                source=source,
                seed=seed,
                shared_layers=args.shared_layers,
            )
            spent = train(trunk, heads, rows, steps=args.steps, rate=args.rate, seed=seed)
            form = circuit_of(heads).config.own
            known = {"name": structure, "r": form.components, "leaves": form.leaves, "m": args.shared_layers}
            known |= {"steps": args.steps, "seed": seed}
            save_heads(heads, args.run / "circuits" / "-".join(map(str, known.values())))
            heads = heads.float().eval()
            logs = likelihood(exact, heads, held_out)
            write({**known, "mode": "held-out log p by depth", "seconds of training": spent, "log p": logs})
            write({**known, "mode": "sampled", **decode(exact, heads, prompts, sampled=True, tokens=args.tokens)})
            way = "greedy, conditionals"
            write({**known, "mode": f"{way}, along held-out text", **along(exact, heads, held_out)})
            if args.decode:
                write({**known, "mode": way, **decode(exact, heads, prompts, sampled=False, tokens=args.tokens)})


def _parallel(
    args: argparse.Namespace,
    exact: Trunk,
    prompts: list[list[int]],
    held_out: Tensor,
    write: Callable[[dict[str, Any]], None],
) -> None:
    """The linear heads that were pretrained beside the model."""
    heads = load_heads(args.run / "heads", exact).eval()
    known = {"name": PARALLEL}
    for way in (False, True):
        found = decode(exact, heads, prompts, sampled=way, tokens=args.tokens)
        write({**known, "mode": "sampled" if way else "greedy", **found})
    write({**known, "mode": "greedy, along held-out text", **along(exact, heads, held_out)})


def speed(args: argparse.Namespace, write: Callable[[dict[str, Any]], None]) -> None:
    """Bytes a second of everything that `learn` kept."""
    model, tokenizer = load_model(str(args.run / "model"), dtype=args.dtype)
    trunk = Trunk(model, tokens=len(tokenizer))
    rows = stream_rows(tokenizer, "stdlib-held-out", row_length=128, limit=args.prompts)
    prompts = [row[:64].tolist() for row in rows]
    kept = args.run / "circuits"
    folders = {PARALLEL: args.run / "heads"}
    folders |= {path.name: path for path in sorted(kept.iterdir()) if not args.names or path.name in args.names}
    heads = {name: load_heads(path, trunk).to(trunk.dtype).eval() for name, path in folders.items()}
    for sampled in (False, True):
        ways: dict[str, tuple[Heads | None, int]] = {"engine without heads": (None, 0)}
        ways |= {name: (each, 0) for name, each in heads.items()}
        if not sampled:
            ways |= {f"{PARALLEL}, tree of {nodes}": (heads[PARALLEL], nodes) for nodes in args.trees}
        seconds: dict[str, list[float]] = {}
        counted: dict[str, tuple[int, int]] = {}
        for _ in range(args.runs + 1):
            seconds.setdefault("generate", []).append(_plain(trunk, prompts, sampled=sampled, tokens=args.tokens))
            for name, (each, nodes) in ways.items():
                spent, counted[name] = _heads(trunk, each, prompts, nodes, sampled=sampled, tokens=args.tokens)
                seconds.setdefault(name, []).append(spent)
        for name, (tokens, forwards) in counted.items():
            # The first run of each is the one that allocates.
            ratio = [b / a for a, b in zip(seconds[name][1:], seconds["generate"][1:], strict=True)]
            spent = statistics.median(seconds[name][1:])
            row: dict[str, Any] = {"name": name, "mode": "sampled" if sampled else "greedy", "dtype": args.dtype}
            row |= {"tau": tokens / forwards, "ms a round": 1e3 * spent / forwards}
            write({**row, "over generate": statistics.median(ratio), "bytes/s": tokens / spent})


def _heads(
    trunk: Trunk, heads: Heads | None, prompts: list[list[int]], nodes: int, *, sampled: bool, tokens: int
) -> tuple[float, tuple[int, int]]:
    """Seconds, tokens and rounds of decoding all prompts, one at a time."""
    choice = (Sampling() if heads is None else SampledDrafts()) if sampled else None
    began = clock()
    engine = Engine(
        trunk,
        heads,
        slots=1,
        capacity=len(prompts[0]) + tokens,
        choice=choice,
        planner=Planner(Chances(), None, (HEADS,), nodes) if nodes else None,
    )
    texts = list(engine.run(Request(prompt, tokens, seed) for seed, prompt in enumerate(prompts)))
    spent = clock() - began
    # The first token of a text comes with the pass over its prompt.
    return spent, (sum(len(text.tokens) - 1 for text in texts), sum(len(text.rounds) for text in texts))


def _plain(trunk: Trunk, prompts: list[list[int]], *, sampled: bool, tokens: int) -> float:
    """Seconds of transformers' generate, one byte at a time."""
    torch.manual_seed(0)
    config = GenerationConfig(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=sampled, top_k=0, pad_token_id=0)
    began = clock()
    for prompt in prompts:
        ids = torch.tensor([prompt])
        trunk.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return clock() - began


def writer(path: Path) -> Callable[[dict[str, Any]], None]:
    """Prints rows and adds them to a file."""

    def write(row: dict[str, Any]) -> None:
        row = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
        print(json.dumps(row), flush=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "machine": machine()}) + "\n")

    return write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("learn", "speed"))
    parser.add_argument("run", type=Path, help="run directory of mtpd pretrain")
    parser.add_argument("--structures", nargs="+", choices=STRUCTURES, default=STRUCTURES)
    parser.add_argument("--components", type=int, default=32)
    parser.add_argument("--leaves", choices=("full", "shared", "tilted"), default="tilted", help="of all but ff")
    parser.add_argument("--shared-layers", type=int, default=0, help="layers of the trunk that learn adapters")
    parser.add_argument("--parallel", action="store_true", help="learn: measure the pretrained heads too")
    parser.add_argument("--decode", action="store_true", help="learn: greedy texts too, which repeat themselves")
    parser.add_argument("--rows", type=int, default=2400, help="learn: rows of 128 bytes to learn from")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--names", nargs="*", help="speed: circuits of the run; all by default")
    parser.add_argument("--trees", type=int, nargs="*", default=[8, 16], help="speed: trees of the pretrained heads")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="speed: number format")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    {"learn": learn, "speed": speed}[args.what](args, writer(args.json))


if __name__ == "__main__":
    main()
