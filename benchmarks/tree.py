"""Trees of drafts beside chains of them, with the linear heads of the byte model of `recipes/bytes-code.yaml`.

    python benchmarks/tree.py runs/bytes-code --json tree.jsonl

Held-out modules of the library, one prompt at a time, in one process and in turns: greedy text, and text that is drawn
(from the main head, with the heads' likeliest tokens as drafts). Rates are medians over runs, ratios those of each
run's own neighbours; tau is tokens for each pass of the trunk behind the prompt.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from lab import machine
from measure import clock

from mtpd.data.models import load_model
from mtpd.decode.chances import Chances
from mtpd.decode.drafting import HEADS
from mtpd.decode.engine import Engine
from mtpd.decode.planner import Planner
from mtpd.decode.sampling import Sampling
from mtpd.decode.text import Request
from mtpd.heads import load_heads
from mtpd.pretrain.text import stream_rows
from mtpd.trunk import Trunk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory of mtpd pretrain")
    parser.add_argument("--trees", type=int, nargs="+", default=[0, 8, 16, 32], help="nodes; 0 is the chain")
    parser.add_argument("--texts", nargs="+", choices=("greedy", "drawn"), default=["greedy", "drawn"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    model, tokenizer = load_model(str(args.run / "model"), dtype=args.dtype)
    trunk = Trunk(model, tokens=len(tokenizer))
    heads = load_heads(args.run / "heads", trunk).to(trunk.dtype)
    rows = stream_rows(tokenizer, "stdlib-held-out", row_length=128, limit=args.prompts)
    requests = [Request(row[:64].tolist(), args.tokens, seed) for seed, row in enumerate(rows)]
    for kind in args.texts:
        drawn = kind == "drawn"
        seconds: dict[str, list[float]] = {}
        passes: dict[str, int] = {}
        texts: dict[str, list[list[int]]] = {}

        def once(name: str, nodes: int | None, drawn: bool = drawn) -> tuple[float, int, list[list[int]]]:
            plan = Planner(Chances(), None, (HEADS,), nodes) if nodes else None
            choice = Sampling() if drawn else None
            engine = Engine(
                trunk,
                None if nodes is None else heads,
                slots=1,
                capacity=64 + args.tokens,
                choice=choice,
                planner=plan,
            )
            began = clock()
            written = sorted(engine.run(requests), key=lambda text: text.number)
            spent = clock() - began
            return spent, sum(len(text.rounds) for text in written), [text.tokens for text in written]

        ways: dict[str, int | None] = {"without heads": None}
        ways |= {f"tree of {nodes}" if nodes else "chain": nodes for nodes in args.trees}
        for name, nodes in ways.items():
            once(name, nodes)
        for run in range(args.runs):
            turn = run % len(ways)
            for name, nodes in [*ways.items()][turn:] + [*ways.items()][:turn]:
                spent, passes[name], texts[name] = once(name, nodes)
                seconds.setdefault(name, []).append(spent)
        written = sum(map(len, texts["chain"])) - len(requests)
        for name in ways:
            against = {
                other: statistics.median(b / a for a, b in zip(seconds[name], seconds[other], strict=True))
                for other in ("without heads", "chain")
            }
            row = {
                "name": name,
                "text": kind,
                "tau": round(written / passes[name], 3),
                "tokens/s": round(written / statistics.median(seconds[name]), 1),
                **{f"times {other}": round(ratio, 3) for other, ratio in against.items()},
                "texts of the chain": sum(a == b for a, b in zip(texts[name], texts["chain"], strict=True)),
            }
            print(json.dumps(row), flush=True)
            if args.json is not None:
                with open(args.json, "a", encoding="utf-8") as file:
                    file.write(json.dumps({**row, "machine": machine()}) + "\n")


if __name__ == "__main__":
    main()
