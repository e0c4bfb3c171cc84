"""What circuit heads cost beside independent ones: a step of training, and the drafts of a window.

    python benchmarks/circuit_costs.py steps --json steps.jsonl
    python benchmarks/circuit_costs.py drafts --json drafts.jsonl

The model of `recipes/bytes-code.yaml` with random weights. steps: a training step beside that of ff, with the trunk's
pass in it and with states from a store. drafts: the drafts of a window beside a pass of the trunk over one token. Times
are medians of alternating runs, of the clock and of the processor (one thread): other work on the machine disturbs the
second less. Each row is written as soon as it is known.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from circuits import DEPTH, GAMMA, STRUCTURES, alternate, batch_of, new, writer
from transformers import LlamaConfig, LlamaForCausalLM

from mtpd.decode.engine import Engine
from mtpd.decode.text import Request
from mtpd.heads import Readout
from mtpd.losses.settings import LossSettings
from mtpd.trunk import Trunk

FORMS = ("full", "shared", "tilted")


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
    for leaves, components in itertools.product(args.forms, args.components):
        ways: dict[str, Callable[[], Any]] = {}
        for structure in args.structures:
            for stored in (False, True):
                name = f"{structure}, {'stored states' if stored else 'with the trunk'}"
                ways[name] = _step(trunk, structure, components, leaves, ids, stored=stored)
        _, found = alternate(ways, runs=args.runs)
        for name, seconds in found.items():
            ratio = seconds / found[f"ff,{name.partition(',')[2]}"]
            write({"name": f"step {name}", "r": components, "leaves": leaves, "ms": 1e3 * seconds, "to ff": ratio})


def _step(
    trunk: Trunk, structure: str, components: int, leaves: str, ids: torch.Tensor, *, stored: bool
) -> Callable[[], None]:
    heads = new(trunk, structure, components, leaves)
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
        for leaves, components in itertools.product(args.forms, args.components):
            _drafts(trunk, components, leaves, args, write)


def _drafts(
    trunk: Trunk, components: int, leaves: str, args: argparse.Namespace, write: Callable[[dict[str, Any]], None]
) -> None:
    tokens = torch.randint(3, 250, (1, 128))
    ways: dict[str, Callable[[], Any]] = {}

    def pick(logits: torch.Tensor, _: int) -> torch.Tensor:
        return logits.argmax(-1)

    engine = Engine(trunk, None, slots=1, capacity=128)
    list(engine.run([Request(tokens[0, :64].tolist(), 2)]))

    def trunk_pass() -> None:
        engine.unembedding(engine.verify(engine.places([64]), 1, None)[0])

    ways["trunk"] = torch.inference_mode()(trunk_pass)
    for structure in args.structures:
        heads = new(trunk, structure, components, leaves, shared_layers=args.shared_layers).to(trunk.dtype).eval()
        drafter = heads.drafter(trunk, slots=1, capacity=128)
        ways[structure] = torch.inference_mode()(lambda drafter=drafter: drafter.draft(tokens, [64], DEPTH, pick))
    _, found = alternate(ways, runs=10 * args.runs)
    base = found.pop("trunk")
    for name, seconds in found.items():
        known = {"r": components, "leaves": leaves, "m": args.shared_layers}
        known |= {"dtype": str(trunk.dtype).removeprefix("torch.")}
        write({"name": f"drafts {name}", **known, "ms": 1e3 * seconds, "to a trunk pass": seconds / base})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("steps", "drafts"))
    parser.add_argument("--structures", nargs="+", choices=STRUCTURES, default=STRUCTURES)
    parser.add_argument("--components", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--shared-layers", type=int, default=0, help="layers of the trunk that learn adapters")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    {"steps": steps, "drafts": drafts}[args.what](args, writer(args.json))


if __name__ == "__main__":
    main()
