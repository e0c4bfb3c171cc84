"""What heads and look-up bring, alone and together: wall clock, trees, the cost of choosing, suites of prompts.

    python benchmarks/drafting.py runs/demo --part speed --dtypes bfloat16,float32 --batches 1,8
    python benchmarks/drafting.py runs/demo --part trees
    python benchmarks/drafting.py runs/demo --part controller
    python benchmarks/drafting.py runs/demo --part suites --folder suites

`speed` and `suites` decode greedily, in turns, in one process; ratios are medians of the runs' own ratios. `trees`
walks along the run's held-out texts, without decoding: tau of the chain, and of the heads' tree with 8 and 21 nodes.
`controller` times what is neither trunk, nor heads, nor the choice of tokens: looking up, choosing, and bookkeeping.
`suites` takes a folder of .jsonl files, {"id": ..., "turns": [...]} a line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab import machine, write_rows
from measure import clock

import mtpd
from mtpd.data.packing import Sample
from mtpd.data.prompts import Prompt, load_prompts, render
from mtpd.data.responses import end_tokens
from mtpd.decode.model import Model
from mtpd.decode.speed import ALONE, Speed, compare, now
from mtpd.decode.text import Request
from mtpd.evaluate.acceptance import DrafterCounts
from mtpd.evaluate.drafters import measure_drafters
from mtpd.evaluate.offline import measure_offline


def speed(model: Model, prompts: list[list[int]], options: Any, *, ways: list[str], batch: int) -> dict[str, Speed]:
    return compare(
        model,
        prompts,
        ways=[way for way in ways if batch == 1 or way not in ALONE],
        max_new_tokens=options.tokens,
        end_tokens=end_tokens(model.trunk.model, model.tokenizer),
        batch=batch,
        runs=options.runs,
    )


def trees(model: Model, run: Path) -> list[dict[str, Any]]:
    """Tau along the held-out texts of a run, all families."""
    lines = (run / "held-out.jsonl").read_text().splitlines()[1:]
    samples = [Sample.of(row["id"], row["prompt_ids"], row["response_ids"], "all") for row in map(json.loads, lines)]
    assert model.heads is not None
    chain = measure_offline(model.trunk, model.heads, samples, progress=False)["all"].tau
    table: list[dict[str, Any]] = [{"name": "chain of all heads", "tau": chain}]
    for nodes in (4, 8, 16, 21):
        found = measure_drafters(model.trunk, model.heads, samples, model.chances, nodes=nodes, progress=False)
        sums = {name: DrafterCounts.of([each[name] for each in found.values()]) for name in ("heads", "together")}
        for name, each in sums.items():
            table.append({"name": f"{name}, {nodes} nodes", "tau": each.tau, "against chain": each.tau / chain - 1})
    return table


def controller(model: Model, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """Milliseconds a round, and those of choosing drafts, at batch 1."""
    requests = [Request(prompt, tokens) for prompt in prompts]
    engine = model.engine(requests, slots=1)
    planner: Any = engine.planner
    drafter: Any = engine.drafter
    spent = {"round": 0.0, "draft": 0.0, "heads": 0.0}
    rounds = 0

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = now(model.trunk)
            try:
                return call(*args, **kwargs)
            finally:
                spent[name] += now(model.trunk) - began

        return run

    def level_aside(call: Callable[..., Any]) -> Callable[..., Any]:
        """The heads' own time: what their candidates are judged by is called from within and is not theirs."""

        def run(first: Any, newest: Any, depth: int, beam: int, level: Callable[..., bool]) -> None:
            inside = 0.0

            def aside(*args: Any) -> bool:
                nonlocal inside
                began = clock()
                goes_on = level(*args)
                inside += clock() - began
                return goes_on

            began = now(model.trunk)
            call(first, newest, depth, beam, aside)
            spent["heads"] += now(model.trunk) - began - inside

        return run

    patched: Any = engine
    patched._round = timed("round", engine._round)
    planner.draft = timed("draft", planner.draft)
    drafter.draft_tree = level_aside(drafter.draft_tree)
    for text in engine.run(requests):
        rounds += len(text.rounds)
    each = {name: 1000 * seconds / rounds for name, seconds in spent.items()}
    chosen = each["draft"] - each["heads"]
    return {
        "round, ms": each["round"],
        "heads, ms": each["heads"],
        "choosing, ms": chosen,
        "share": chosen / each["round"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--part", choices=("speed", "trees", "controller", "suites"), required=True)
    parser.add_argument("--dtypes", default="bfloat16")
    parser.add_argument("--batches", default="1")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--ways", default="plain,engine,lookup,own-lookup,chain,heads,mtpd")
    parser.add_argument("--folder", type=Path, help="of suites")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    table: list[dict[str, Any]] = []

    def add(**row: Any) -> None:
        table.append(row)
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
        write_rows(options.json, [{"machine": machine(), **each} for each in table])

    for dtype in options.dtypes.split(","):
        model = mtpd.load(options.run, dtype=dtype)
        held_out = load_prompts("builtin-held-out")
        chosen = [render(model.tokenizer, prompt) for prompt in held_out[:: len(held_out) // options.prompts]]
        prompts = chosen[: options.prompts]
        if options.part == "trees":
            for row in trees(model, options.run):
                add(dtype=dtype, **row)
        elif options.part == "controller":
            add(dtype=dtype, **controller(model, prompts, options.tokens))
        else:
            folder = sorted(options.folder.glob("*.jsonl")) if options.part == "suites" else []
            sources = [(file.stem, suite(model, file, options)) for file in folder] or [("held-out", prompts)]
            for name, texts in sources:
                for batch in map(int, options.batches.split(",")):
                    speeds = speed(model, texts, options, ways=options.ways.split(","), batch=batch)
                    ours = speeds["mtpd"]
                    for way, each in speeds.items():
                        same = sum(a == b for a, b in zip(ours.texts, each.texts, strict=True))
                        add(
                            suite=name,
                            dtype=dtype,
                            batch=batch,
                            way=way,
                            rate=each.rate,
                            tau=each.tau,
                            together_against_it=ours.against(each),
                            same_texts=f"{same} of {len(texts)}",
                        )


def suite(model: Model, file: Path, options: Any) -> list[list[int]]:
    """Prompts of a suite, spread over it, that leave room for the text."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    prompts = [Prompt(str(line["id"]), [{"role": "user", "content": line["turns"][0]}]) for line in lines]
    rendered = [render(model.tokenizer, prompt) for prompt in prompts]
    fitting = [ids for ids in rendered if len(ids) + options.tokens <= min(2048, model.trunk.context)]
    return fitting[:: max(1, len(fitting) // options.prompts)][: options.prompts]


if __name__ == "__main__":
    main()
