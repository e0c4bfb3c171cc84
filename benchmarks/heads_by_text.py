"""How much text do heads need? Heads of one model by the response tokens that they were trained on.

    python benchmarks/heads_by_text.py make --prompts gsm8k_train.jsonl --tokens 1000000 --minutes 60
    python benchmarks/heads_by_text.py train --prompts gsm8k_train.jsonl --held-out gsm8k.jsonl
    python benchmarks/heads_by_text.py train --sizes 1000000 3000000 --losses ce kl mtp_d lk --seeds 3 --prompts ...

`make` lets the model answer: the prompts of all files and the built-in ones greedily, then the same prompts again,
drawn at temperature 0.7, as often as it takes. What is answered is kept in --work, and the same command goes on with
it. `train` trains on 30,000, 100,000, 300,000, ... of these tokens once, the smaller sets being parts of the larger
ones, and measures greedy acceptance offline: on prompts like those of the file, on the demo's held-out ones, and on
other families. Each result is written as soon as it is there, and is not measured twice.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from lab import Lab, machine, recipe

from mtpd.data.packing import PackedRows, Sample, collate, pack
from mtpd.data.prompts import Prompt, load_prompts
from mtpd.data.responses import generate_responses
from mtpd.data.store import with_hidden
from mtpd.data.vocabulary import draft_vocabulary
from mtpd.heads import Heads, build_heads, configure_heads, start_heads
from mtpd.recipe import Recipe
from mtpd.train.rows import TrainingRows

SIZES = (30_000, 100_000, 300_000, 1_000_000, 3_000_000)
DRAWN = 0.7
"""Temperature of the second and later answers to a prompt."""
PART = 256
"""Prompts whose answers are one file."""
FITTED_ROWS = 256
"""Rows that heads are fitted to before training, at most."""


class Responses:
    """What the model answered, in files of `PART` prompts each."""

    def __init__(self, lab: Lab, options: Any) -> None:
        self.lab, self.options = lab, options
        prompts = [*load_prompts("builtin")]
        for number, path in enumerate(options.prompts):
            prompts += [Prompt(f"{number}-{each.id}", each.prompt) for each in load_prompts(str(path))]
        self.prompts = random.Random(0).sample(prompts, len(prompts))

    def part(self, turn: int, number: int, *, make: bool) -> list[Sample]:
        """Answers of a part of the prompts; with `make=False`, empty where they are not there yet."""
        path = self.lab.work / f"turn-{turn}" / f"part-{number:04d}.jsonl"
        done = path.with_suffix(".done")
        if not make and not done.is_file():
            return []
        path.parent.mkdir(parents=True, exist_ok=True)
        samples = generate_responses(
            self.lab.trunk.model,
            self.lab.tokenizer,
            self.prompts[PART * number : PART * (number + 1)],
            path,
            trunk=self.lab.fingerprint,
            temperature=DRAWN if turn else 0.0,
            max_new_tokens=self.options.max_new_tokens,
            batch=128,
            seed=turn,
            max_length=self.lab.trunk.context,
            progress=make,
        )
        done.touch()
        return [Sample(f"{each.id}-{turn}", each.ids, each.response_mask, each.family) for each in samples]

    def collect(self, tokens: int, *, make: bool, minutes: float = 1e9) -> list[Sample]:
        """Samples with so many response tokens, or as many as there are."""
        found: list[Sample] = []
        count, began = 0, time.monotonic()
        for turn in range(100):
            for number in range(-(-len(self.prompts) // PART)):
                if count >= tokens or (make and time.monotonic() - began > 60 * minutes):
                    return found
                samples = self.part(turn, number, make=make)
                if not samples:
                    return found
                found += samples
                count += sum(len(each.response_ids) for each in samples)
                if make:
                    print(f"turn {turn}, part {number}: {count:,} response tokens", flush=True)
        return found


def rows_of(samples: list[Sample], tokens: int, seed: int) -> PackedRows:
    """So many response tokens of samples in an order of the seed, of which a smaller number gives the first part."""
    chosen, count = [], 0
    for sample in random.Random(seed).sample(samples, len(samples)):
        if count >= tokens:
            break
        responses = sample.response_ids[: tokens - count]
        chosen.append(Sample.of(sample.id, sample.prompt_ids, responses, sample.family))
        count += len(responses)
    return pack(chosen, row_length=512)


def new_heads(lab: Lab, given: Recipe, rows: PackedRows) -> Heads:
    settings = given.heads
    vocabulary = draft_vocabulary(rows, settings.vocabulary, tokens=lab.trunk.tokens or 0, always=lab.ends)
    size = 0 if vocabulary is None else len(vocabulary)
    config = configure_heads(settings.model_dump(), lab.trunk, vocabulary=size, fingerprint=lab.fingerprint)
    heads = build_heads(lab.trunk, config)
    if vocabulary is not None:
        heads.get_buffer("vocabulary").copy_(vocabulary)
    training = TrainingRows(rows)
    some = range(0, len(rows), max(1, len(rows) // FITTED_ROWS))
    start_heads(
        heads,
        lab.trunk,
        settings.init,
        lambda: [with_hidden(collate([training[number]]), lab.trunk, None) for number in some],
        seed=given.seed,
    )
    return heads


def train(lab: Lab, options: Any) -> None:
    samples = Responses(lab, options).collect(max(options.sizes), make=False)
    there = sum(len(each.response_ids) for each in samples)
    suites = {"held-out": "builtin-held-out", "other families": "builtin-other"}
    suites |= {path.stem: str(path) for path in options.held_out}
    measured = {
        name: lab.respond(source, f"measured-{name.replace(' ', '-')}", temperature=0.0, tokens=128, limit=84)
        for name, source in suites.items()
    }
    lines = options.json.read_text().splitlines() if options.json.is_file() else []
    known = {(row["tokens"], row["loss"], row["seed"]) for row in map(json.loads, lines)}
    for tokens in options.sizes:
        if tokens > there:
            print(f"{tokens:,}: there are {there:,} response tokens; make more", flush=True)
            break
        for seed in range(options.seeds):
            for loss in options.losses:
                if (tokens, loss, seed) in known:
                    continue
                rows = rows_of(samples, tokens, seed)
                training: dict[str, Any] = {
                    "loss": loss,
                    "epochs": 1.0,
                    "learning_rate": options.rate,
                    "micro_batch_rows": 1 if tokens <= 100_000 else 2 if tokens <= 300_000 else 4,
                }
                if loss in ("kl", "mtp_d"):
                    training["top_n"] = 0
                heads_settings = {"depth": options.depth, "vocabulary": 8192, "init": "regression"}
                given = recipe(seed=seed, heads=heads_settings, train=training)
                heads = new_heads(lab, given, rows)
                store: Any = None
                seconds = lab.train(given, heads, rows, store)
                row: dict[str, Any] = {"machine": machine(), "tokens": tokens, "loss": loss, "seed": seed}
                row["seconds"] = seconds
                for name, texts in measured.items():
                    counts = lab.measure(heads, texts)
                    row[name] = {"tau": counts.tau, "car": counts.car, "expected": counts.expected_acceptance}
                with options.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(tokens, loss, seed, {name: round(row[name]["tau"], 3) for name in measured}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("make", "train"))
    parser.add_argument("--model", default="demo")
    parser.add_argument("--work", type=Path, default=Path("runs/heads-by-text"), help="keeps responses between calls")
    parser.add_argument("--prompts", type=Path, nargs="*", default=[], help="files of prompts beside the built-in ones")
    parser.add_argument("--held-out", type=Path, nargs="*", default=[], help="files of prompts to measure on")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="make: response tokens in all")
    parser.add_argument("--minutes", type=float, default=1e9, help="make: ends after so many")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES))
    parser.add_argument("--losses", nargs="*", default=["kl"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--rate", type=float, default=4e-4)
    parser.add_argument("--json", type=Path, default=Path("heads_by_text.json"), help="a line for each training")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    lab = Lab.open(options.model, options.work)
    if options.step == "make":
        Responses(lab, options).collect(options.tokens, make=True, minutes=options.minutes)
    else:
        train(lab, options)


if __name__ == "__main__":
    main()
