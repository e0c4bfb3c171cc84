"""How fast rows of data are read, told apart and rendered, and in how much memory.

    python benchmarks/rows.py --json rows.json
    python benchmarks/rows.py --rows 20000 --model tiny

Conversations of ShareGPT's form, with lengths drawn as people write (log-normal, 60 words in the median) out of the
words of the built-in prompts, a tenth of them repeated in other letters. Reading is `load_prompts`, telling apart is
`split_held_out`, rendering is the chat template and the tokenizer. Beside the rate stands that by CPU seconds of all
threads, which does not depend on what else the machine does. Memory is what Python holds at most while so many rows are
drawn out of all.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab import machine, write_rows

from mtpd.data.models import load_model
from mtpd.data.prompts import load_prompts, split_held_out
from mtpd.data.rendering import render_all
from mtpd.data.rows.left_out import LeftOut

LEAST = 2000
"""Rows a second that reading, telling apart and rendering reach together, at least."""


def write_conversations(path: Path, rows: int) -> None:
    """Writes so many rows."""
    draw = random.Random(0)
    words = " ".join(prompt.text for prompt in load_prompts("builtin")).split()

    def said() -> str:
        return " ".join(draw.choices(words, k=min(1000, max(3, round(draw.lognormvariate(4.1, 0.9))))))

    earlier: list[str] = []
    with open(path, "w", encoding="utf-8") as file:
        for number in range(rows):
            asked = draw.choice(earlier).upper() if earlier and number % 10 == 9 else said()
            if number % 50 == 0:
                earlier.append(asked)
            turns = [("human", asked), ("gpt", said()), ("human", said()), ("gpt", said())]
            conversation = [{"from": role, "value": value} for role, value in turns]
            file.write(json.dumps({"id": f"row-{number}", "conversations": conversation}) + "\n")


def timed(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """What a function gives, its seconds, and its CPU seconds."""
    began, computed = time.perf_counter(), time.process_time()
    found = function()
    return found, time.perf_counter() - began, time.process_time() - computed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--drawn", type=int, default=2000, help="rows that are drawn out of all, to measure memory")
    parser.add_argument("--model", default="demo", help="whose tokenizer and template")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    _, tokenizer = load_model(options.model, config_only=True)
    assert tokenizer is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_conversations(path, options.rows)
        megabytes = path.stat().st_size / 2**20
        # Once for imports, compiled templates and caches.
        render_all(tokenizer, load_prompts(str(path), limit=10), LeftOut())
        prompts, *reading = timed(lambda: load_prompts(str(path)))
        split, *telling = timed(lambda: split_held_out(prompts, None))
        left_out = LeftOut()
        rendered, *rendering = timed(lambda: render_all(tokenizer, split.train, left_out))
        assert len(rendered) == len(split.train)
        assert not left_out.total
        tokens = sum(len(ids) for _, ids in rendered)
        print(f"{options.rows:,} rows, {megabytes:.0f} MB, {split.duplicates:,} repeated; {tokens:,} tokens of prompts")
        results = []
        for name, (seconds, computed), count in (
            ("reading", reading, options.rows),
            ("telling apart", telling, options.rows),
            ("rendering", rendering, len(split.train)),
            ("all three", [sum(each) for each in zip(reading, telling, rendering, strict=True)], options.rows),
        ):
            rate = count / seconds
            print(f"{name:15}{seconds:8.1f} s {rate:10,.0f} rows/s {count / computed:10,.0f} rows/s of CPU time")
            row = {"name": name, "ours": rate, "other": LEAST, "against": "the least wanted", "unit": "rows/s"}
            results.append({**row, "ratio": rate / LEAST, "runs": 1, "machine": machine()})
        tracemalloc.start()
        load_prompts(str(path), limit=options.drawn)
        peak = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        print(f"{options.drawn:,} drawn out of all: {peak:.0f} MB at most, of a file of {megabytes:.0f} MB")
        row = {
            "name": "memory of a draw",
            "ours": peak,
            "other": megabytes,
            "against": "size of the file",
            "unit": "MB",
        }
        results.append({**row, "ratio": peak / megabytes, "runs": 1, "machine": machine()})
    if options.json is not None:
        write_rows(options.json, results)


if __name__ == "__main__":
    main()
