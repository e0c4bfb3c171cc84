"""Circuit heads beside independent ones, on the byte model of `recipes/bytes-code.yaml`.

    python benchmarks/circuits.py runs/bytes-code --part learn --json circuits.jsonl
    python benchmarks/circuits.py runs/bytes-code --part learn --shared-layers 2 --structures btree --json layers.jsonl
    python benchmarks/circuits.py runs/bytes-code --part steps --json steps.jsonl
    python benchmarks/circuits.py runs/bytes-code --part drafts --json drafts.jsonl

learn: each circuit starts from the linear heads that were pretrained beside the model, learns on the same windows of
the standard library, and drafts for held-out modules. Accepted tokens are drafts a round, tau is those and one more.
steps: a training step beside that of ff, with the trunk's pass in it and with states from a store.
drafts: the drafts of a window beside a pass of the trunk over one token.
Times are medians of alternating runs, of the clock and of the processor (one thread): other work on the machine
disturbs the second less. Each row is written as soon as it is known.
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
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from mtpd.data.models import load_model, trunk_fingerprint
from mtpd.data.packing import Sample
from mtpd.data.streams import stream_rows
from mtpd.decode.engine import Engine, Request
from mtpd.decode.sampling import SampledDrafts, Sampling
from mtpd.evaluate.offline import measure_offline
from mtpd.heads import Batch, Heads, Readout, build_heads, configure_heads, load_heads, start_heads
from mtpd.heads.base import Pick
from mtpd.heads.circuit_heads import CircuitHeads
from mtpd.heads.shared_layers import SharedLayerHeads
from mtpd.losses.settings import LossSettings
from mtpd.recipe.sections import CircuitRecipe, HeadsRecipe
from mtpd.slots import Span
from mtpd.trunk import Trunk

STRUCTURES = ("ff", "cp", "hmm", "btree")
FORMS = ("full", "shared", "tilted")
GAMMA = 0.9
DEPTH = 7


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
    """Heads with their first weights; of `components`, ff has one."""
    circuit = CircuitRecipe.model_validate(
        {"structure": structure, "components": 1 if structure == "ff" else components, "leaves": leaves}
    )
    recipe = HeadsRecipe(kind="circuit", depth=DEPTH, circuit=circuit, shared_layers=shared_layers)
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
            clock, processor = time.perf_counter(), time.process_time()
            function()
            times[name].append((time.perf_counter() - clock, time.process_time() - processor))
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
    began = time.perf_counter()
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
    return time.perf_counter() - began


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


def wall_clock(
    trunk: Trunk, heads: Heads, prompts: list[list[int]], *, sampled: bool, tokens: int, runs: int
) -> dict[str, float]:
    """Speed at batch 1, against the engine without heads and transformers' generate."""

    def engine(each: Heads | None) -> Callable[[], None]:
        def run() -> None:
            drafts = SampledDrafts() if each is not None else Sampling()
            decoder = Engine(
                trunk, each, slots=1, capacity=len(prompts[0]) + tokens, choice=drafts if sampled else None
            )
            list(decoder.run(Request(prompt, tokens, seed) for seed, prompt in enumerate(prompts)))

        return run

    def plain() -> None:
        torch.manual_seed(0)
        config = GenerationConfig(
            max_new_tokens=tokens, min_new_tokens=tokens, do_sample=sampled, top_k=0, pad_token_id=0
        )
        for prompt in prompts:
            ids = torch.tensor([prompt])
            trunk.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)

    clock, processor = alternate(
        {"heads": engine(heads), "engine without heads": engine(None), "transformers": plain}, runs=runs
    )
    return {
        **{f"{name}, bytes/s": len(prompts) * tokens / seconds for name, seconds in clock.items()},
        "speed-up": clock["transformers"] / clock["heads"],
        "speed-up, processor": processor["transformers"] / processor["heads"],
        "over the engine, processor": processor["engine without heads"] / processor["heads"],
    }


def learn(args: argparse.Namespace, write: Callable[[dict[str, Any]], None]) -> None:
    """Trains and measures each circuit."""
    model, tokenizer = load_model(str(args.run / "model"), dtype="bfloat16")
    trunk = Trunk(model, tokens=len(tokenizer))
    source = load_heads(args.run / "heads", trunk, fingerprint=trunk_fingerprint(model))
    rows = stream_rows(tokenizer, "stdlib", row_length=128)
    # From the end of the library: what the model was trained on in random order.
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(9))[: args.rows]]
    held_out = stream_rows(tokenizer, "stdlib-held-out", row_length=128, limit=args.prompts)
    exact_model, _ = load_model(str(args.run / "model"), dtype="float32")
    exact = Trunk(exact_model, tokens=len(tokenizer))
    prompts = [row[:64].tolist() for row in held_out]
    if args.joint:
        _joint(args, exact, prompts, held_out, write)
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
            known = {"name": structure, "r": args.components, "leaves": args.leaves, "m": args.shared_layers}
            known |= {"seed": seed, "steps": args.steps}
            heads = heads.float().eval()
            logs = likelihood(exact, heads, held_out)
            write({**known, "mode": "held-out log p by depth", "seconds of training": spent, "log p": logs})
            write({**known, "mode": "sampled", **decode(exact, heads, prompts, sampled=True, tokens=args.tokens)})
            circuit = circuit_of(heads)
            for circuit.joint in (False, True) if structure != "ff" else (False,):
                way = "greedy, max-product" if circuit.joint else "greedy, conditionals"
                write({**known, "mode": f"{way}, along held-out text", **along(exact, heads, held_out)})
                if args.decode:
                    write({**known, "mode": way, **decode(exact, heads, prompts, sampled=False, tokens=args.tokens)})
                if args.speed and not circuit.joint:
                    rates = wall_clock(exact, heads, prompts[:2], sampled=False, tokens=args.tokens, runs=args.runs)
                    write({**known, "mode": f"wall clock, {way}", **rates})
            if args.speed:
                rates = wall_clock(exact, heads, prompts[:2], sampled=True, tokens=args.tokens, runs=args.runs)
                write({**known, "mode": "wall clock, sampled", **rates})


def _joint(
    args: argparse.Namespace,
    exact: Trunk,
    prompts: list[list[int]],
    held_out: Tensor,
    write: Callable[[dict[str, Any]], None],
) -> None:
    """The linear heads that were pretrained beside the model."""
    parallel = load_heads(args.run / "heads", exact).eval()
    joint = {"name": "parallel heads trained jointly", "seed": 0}
    for way in (False, True):
        found = decode(exact, parallel, prompts, sampled=way, tokens=args.tokens)
        write({**joint, "mode": "sampled" if way else "greedy", **found})
    write({**joint, "mode": "greedy, along held-out text", **along(exact, parallel, held_out)})
    for way in (False, True):
        rates = wall_clock(exact, parallel, prompts[:2], sampled=way, tokens=args.tokens, runs=args.runs)
        write({**joint, "mode": f"wall clock, {'sampled' if way else 'greedy'}", **rates})


def small_trunk(dtype: torch.dtype) -> Trunk:
    """The model of `recipes/bytes-code.yaml`, with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}
    config = LlamaConfig(vocab_size=320, max_position_embeddings=1024, **sizes)
    return Trunk(LlamaForCausalLM(config).eval().to(dtype))


def steps(args: argparse.Namespace, write: Callable[[dict[str, Any]], None]) -> None:
    """A training step relative to ff."""
    trunk = small_trunk(torch.bfloat16)
    ids = torch.randint(320, (4, 256))
    for leaves in args.forms:
        ways: dict[str, Callable[[], Any]] = {}
        for structure in args.structures:
            for stored in (False, True):
                name = f"{structure}, {'stored states' if stored else 'with the trunk'}"
                ways[name] = _step(trunk, structure, args.components, leaves, ids, stored=stored)
        _, found = alternate(ways, runs=args.runs)
        for name, seconds in found.items():
            ratio = seconds / found[f"ff,{name.partition(',')[2]}"]
            write({"name": f"step {name}", "r": args.components, "leaves": leaves, "ms": 1e3 * seconds, "to ff": ratio})


def _step(
    trunk: Trunk, structure: str, components: int, leaves: str, ids: Tensor, *, stored: bool
) -> Callable[[], None]:
    heads = new(trunk, structure, components, "full" if structure == "ff" else leaves)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-4, fused=True)
    settings = LossSettings(tuple(GAMMA**k for k in range(DEPTH)), (0.0,) * DEPTH)
    readout = Readout.of(trunk, None)
    kept = batch_of(trunk, ids, heads) if stored else None

    def run() -> None:
        batch = kept or batch_of(trunk, ids, heads)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, _ = heads.loss(trunk, batch, readout, settings)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def drafts(args: argparse.Namespace, write: Callable[[dict[str, Any]], None]) -> None:
    """The drafts of a window relative to a pass of the trunk."""
    for dtype in (torch.float32, torch.bfloat16):
        trunk = small_trunk(dtype)
        for leaves in args.forms:
            for components in (8, 32):
                _drafts(trunk, components, leaves, args, write)


def _drafts(
    trunk: Trunk, components: int, leaves: str, args: argparse.Namespace, write: Callable[[dict[str, Any]], None]
) -> None:
    tokens = torch.randint(3, 250, (1, 128))
    ways: dict[str, Callable[[], Any]] = {}
    pick = {"max_product": Pick(lambda logits, _: logits.argmax(-1), joint=True)}
    pick["conditionals"] = Pick(lambda logits, _: logits.argmax(-1))
    engine = Engine(trunk, None, slots=1, capacity=128)
    list(engine.run([Request(tokens[0, :64].tolist(), 2)]))
    span = Span([64], 1, tokens.device)

    def trunk_pass() -> None:
        engine.unembedding(engine._pass(span.read(engine.tokens), span, engine.cache.go_on(span)))

    ways["trunk"] = torch.inference_mode()(trunk_pass)
    for structure in args.structures:
        heads = new(trunk, structure, components, leaves, shared_layers=args.shared_layers).to(trunk.dtype).eval()
        drafter = heads.drafter(trunk, slots=1, capacity=128)
        for name, each in pick.items():
            ways[f"{structure} {name}"] = torch.inference_mode()(
                lambda drafter=drafter, each=each: drafter.draft(tokens, [64], DEPTH, each)
            )
    _, found = alternate(ways, runs=10 * args.runs)
    base = found.pop("trunk")
    for name, seconds in found.items():
        known = {"r": components, "leaves": leaves, "m": args.shared_layers}
        known |= {"dtype": str(trunk.dtype).removeprefix("torch.")}
        write({"name": f"drafts {name}", **known, "ms": 1e3 * seconds, "to a trunk pass": seconds / base})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory of mtpd pretrain")
    parser.add_argument("--part", choices=("learn", "steps", "drafts"), default="learn")
    parser.add_argument("--structures", nargs="+", choices=STRUCTURES, default=STRUCTURES)
    parser.add_argument("--components", type=int, default=8)
    parser.add_argument("--leaves", choices=FORMS, default="full", help="what learns")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="leaves that are timed")
    parser.add_argument("--shared-layers", type=int, default=0, help="layers of the trunk that learn adapters")
    parser.add_argument("--joint", action="store_true", help="the parallel heads of the run, too")
    parser.add_argument("--speed", action="store_true", help="the clock, too")
    parser.add_argument("--decode", action="store_true", help="greedy texts too, which repeat themselves")
    parser.add_argument("--rows", type=int, default=2400, help="rows of 128 bytes to learn from")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()

    def write(row: dict[str, Any]) -> None:
        row = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
        print(json.dumps(row), flush=True)
        with open(args.json, "a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "machine": machine()}) + "\n")

    {"learn": learn, "steps": steps, "drafts": drafts}[args.part](args, write)


if __name__ == "__main__":
    main()
