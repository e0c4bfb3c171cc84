"""How fast vLLM serves heads, against the same vLLM without drafts: tokens/s, one request and several at a time.

    python benchmarks/serving.py runs/demo --environment ENVIRONMENT --json serving.json

Greedy, float32, held-out prompts over HTTP. Of each pair of passes one goes to a server with drafts and one to a server
without, in turns; figures are medians, and a ratio is the median of the pairs' own. What is in the JSON file already is
not measured again. Look-up alone is vLLM's own (`ngram`); beside the heads it is the plugin's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab import machine

from mtpd.data.answers.task import Task
from mtpd.data.prompts import load_prompts
from mtpd.data.rendering import render
from mtpd.evaluate.served import DraftingServer
from mtpd.files import write_whole
from mtpd.finished_run import open_finished
from mtpd.formats.engines import with_vllm
from mtpd.formats.engines.plugin import PLUGIN, lay_out
from mtpd.formats.export import export
from mtpd.formats.serving import base_of
from mtpd.heads import read_config
from mtpd.run.without_weights import without_weights

LEAST = 2
"""Tokens that look-up goes by."""
ALONE = 4
"""Prompts of a pass with one request at a time."""


def ways(out: Path, depth: int) -> dict[str, list[str]]:
    """Arguments of a server, by what it drafts with."""
    heads: dict[str, Any] = {"method": "mtp", "model": str(out.resolve())}
    ngram = {"method": "ngram", "prompt_lookup_min": LEAST, "prompt_lookup_max": LEAST}
    both = ["--additional-config", json.dumps({"mtpd_lookup": LEAST})]
    found = {
        f"heads, {count} draft{'s' * (count > 1)}": _speculative(heads, count) for count in (depth, *range(1, depth))
    }
    found[f"look-up, {depth} drafts"] = _speculative(ngram, depth)
    found[f"heads and look-up, {depth} drafts"] = [*_speculative(heads, depth), *both]
    return found


def _speculative(settings: dict[str, Any], count: int) -> list[str]:
    return ["--speculative-config", json.dumps(settings | {"num_speculative_tokens": count})]


class Asked:
    """A server, and its answers to prompts."""

    def __init__(self, url: str, tokenizer: Any, tasks: Sequence[Task], **settings: Any) -> None:
        self.url, self.tasks = url, tasks
        self.server = DraftingServer(url, tokenizer, key="server", **settings)
        self.texts: dict[str, list[int]] = {}

    def speed(self, at_a_time: int, *, prompts: int) -> float:
        """Tokens/s of a pass over so many prompts."""
        self.server.server.at_a_time = at_a_time
        began = time.monotonic()
        found = list(self.server.server(self.tasks[:prompts]))
        seconds = time.monotonic() - began
        self.texts |= {task.key: text for task, text in found}
        return sum(len(text) for _, text in found) / seconds


def measured(drafting: Asked, plain: Asked, batches: Sequence[int], *, runs: int) -> list[dict[str, Any]]:
    """A row for each number of requests at a time."""
    for asked in (drafting, plain):
        asked.speed(1, prompts=1)
    rows = []
    for at_a_time in batches:
        before = drafting.server.counters()
        pairs = []
        for run in range(runs):
            order = (drafting, plain) if run % 2 else (plain, drafting)
            speeds = {asked.url: asked.speed(at_a_time, prompts=max(at_a_time, ALONE)) for asked in order}
            pairs.append((speeds[drafting.url], speeds[plain.url]))
        counted = drafting.server.counters().since(before, place=drafting.url)
        rows.append(
            {
                "at_a_time": at_a_time,
                "ours": statistics.median(ours for ours, _ in pairs),
                "other": statistics.median(other for _, other in pairs),
                "against": "vLLM without drafts",
                "unit": "tokens/s",
                "ratio": statistics.median(ours / other for ours, other in pairs),
                "runs": pairs,
                "tokens": counted.tokens,
                "accepted": sum(counted.accepted),
                "texts": len(drafting.texts),
                "same_texts": sum(plain.texts.get(key) == text for key, text in drafting.texts.items()),
                "machine": machine(),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--environment", type=Path, help="a virtual environment with vLLM, made if it is missing")
    parser.add_argument("--json", type=Path, default=Path("serving.json"))
    options = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(options.json.read_text()) if options.json.is_file() else []
    finished, new = open_finished(options.run), options.max_new_tokens
    _, tokenizer, ends = without_weights(finished.recipe, finished.model)
    base = base_of(finished.model)
    prompts = load_prompts("builtin-held-out")
    chosen = prompts[:: max(1, len(prompts) // options.prompts)][: options.prompts]
    tasks = [Task(prompt, render(tokenizer, prompt)) for prompt in chosen]
    python = with_vllm.environment(options.environment)
    settings: dict[str, Any] = {"length": max(len(task.ids) for task in tasks) + new + 16}
    asked: dict[str, Any] = {
        "model": base,
        "ends": ends,
        "tokens": len(tokenizer),
        "max_new_tokens": new,
        "at_a_time": max(options.batches),
    }
    common = ["--max-num-seqs", str(max(options.batches)), "--no-enable-prefix-caching"]
    with tempfile.TemporaryDirectory() as folder:
        out, path = Path(folder) / "out", Path(folder) / "path"
        export(options.run, out, to="mtpd-vllm", perturb=False)
        lay_out(out / PLUGIN, path)
        with with_vllm.server(python, base, arguments=common, **settings) as url:
            plain = Asked(url, tokenizer, tasks, **asked)
            for name, arguments in ways(out, read_config(options.run / "heads").depth).items():
                if any(row["name"] == name for row in rows):
                    continue
                with with_vllm.server(python, base, arguments=[*common, *arguments], path=path, **settings) as other:
                    drafting = Asked(other, tokenizer, tasks, **asked)
                    found = measured(drafting, plain, options.batches, runs=options.runs)
                rows += [{"name": name, **row} for row in found]
                write_whole(options.json, json.dumps(rows, indent=1) + "\n")
    print("| drafts | at a time | tokens/s | without | ratio | tokens a pass | texts |\n|---|---|---|---|---|---|---|")
    for row in rows:
        # Each pass of the model writes a token besides those that were accepted.
        tokens = row["tokens"] / (row["tokens"] - row["accepted"])
        print(
            f"| {row['name']} | {row['at_a_time']} | {row['ours']:.1f} | {row['other']:.1f} | {row['ratio']:.2f}x | "
            f"{tokens:.2f} | {row['same_texts']} of {row['texts']} |"
        )


if __name__ == "__main__":
    main()
