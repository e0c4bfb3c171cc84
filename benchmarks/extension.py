"""Looped extension: what further depths gain untrained and trained, in each form, and what they cost.

    python benchmarks/extension.py train --json extension.json
    python benchmarks/extension.py cost
    python benchmarks/extension.py speed

`train` trains heads of 1, 4 and 8 depths, loops them to 4, 8 and 16, and measures all offline on held-out prompts. All
trainings see the same tokens once, and every stage those of the heads that it starts from. A row is written as soon as
it is there. Heads of the first seed are kept in --work; `speed` decodes with them, and wants a quiet machine.

A .jsonl file of mathematical prompts (--prompts, --held-out) gives deep drafts more to accept than the built-in ones.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lab import Lab, machine, recipe, spread, write_rows
from measure import clock

from mtpd.data.packing import PackedRows, Sample, collate
from mtpd.data.store import HiddenStates, MemoryStore, with_hidden
from mtpd.evaluate.depths import measure_depths
from mtpd.heads import Heads, load_heads, save_heads
from mtpd.heads.chain.heads import Form
from mtpd.heads.chain.start import initialise
from mtpd.recipe import Recipe
from mtpd.train.arguments import loss_settings
from mtpd.train.finished_depths import FinishedDepths
from mtpd.train.model import DistillModel
from mtpd.train.rows import TrainingRows

FORMS: tuple[Form, ...] = ("copies", "adapters", "shared")


class Experiment:
    """All of one seed."""

    def __init__(self, lab: Lab, options: Any, seed: int, note: Callable[..., None]) -> None:
        self.lab, self.options, self.seed, self.note = lab, options, seed, note
        samples = lab.respond(options.prompts, "train", temperature=0.0, tokens=160, limit=options.limit)
        self.measured: list[Sample] = lab.respond(
            options.held_out, "held-out", temperature=0.0, tokens=128, limit=options.held_out_limit
        )
        self.rows: PackedRows = lab.rows(samples, tokens=options.tokens, seed=seed)
        self.store: HiddenStates = lab.store(self.rows, "extension")

    def recipe(self, depth: int, **train: Any) -> Recipe:
        settings = {"depth": depth, "vocabulary": self.options.vocabulary, "init": "regression"}
        training = {"micro_batch_rows": 1, "epochs": 1.0, "top_n": 0, "learning_rate": self.options.rate, **train}
        if training.get("loss") == "ce":
            del training["top_n"]
        return recipe(seed=self.seed, heads=settings, train=training)

    def start(self, depth: int) -> Heads:
        return self.lab.heads(self.recipe(depth), self.rows, self.store)

    def base(self, name: str, depth: int, **train: Any) -> Heads:
        """Heads that are trained as `mtpd distill` does."""
        heads = self.start(depth)
        seconds = self.lab.train(self.recipe(depth, **train), heads, self.rows, self.store)
        self.found(name, heads, seconds, heads)
        return heads

    def stage(
        self, name: str, old: Heads, depth: int, form: Form, *, change: Callable[..., None] | None = None
    ) -> Heads:
        """One stage of an extension, measured before (where it has no other start) and after."""
        options = self.options
        heads = old.extended(self.lab.trunk, depth=depth, form=form, rank=options.rank, seed=self.seed).train()
        if change is not None:
            change(heads)
        elif form == "copies":
            self.found(f"{name}, untrained", heads, 0.0, None)
        rate = options.adapter_rate if form == "adapters" else options.rate
        # List lengths and weights are those of the recipe; nothing here depends on its depth.
        settings = self.recipe(old.depth, learning_rate=rate)
        finished = None if form == "shared" else old
        seconds = self.lab.train(settings, heads, self.rows, self.store, finished=finished)
        self.found(f"{name}, {form if change is None else 'random start'}", heads, seconds, heads)
        return heads

    def found(self, name: str, heads: Heads, seconds: float, trained: Heads | None) -> None:
        counts = self.lab.measure(heads, self.measured)
        parameters = sum(p.numel() for p in trained.parameters() if p.requires_grad) if trained is not None else 0
        tokens = len(self.rows) * self.rows.row_length
        self.note(
            name=name, seed=self.seed, tau=counts.tau, car=counts.car, parameters=parameters, seconds=seconds,
            microseconds_per_token=1e6 * seconds / tokens,
        )  # fmt: skip
        if self.seed == 0:
            save_heads(heads, self.options.work / "heads" / name.replace(", ", "-").replace(" ", "-"))

    def random(self, heads: Heads) -> None:
        """Gives the newest half of the depths random weights."""
        fresh = self.start(heads.depth)
        initialise(fresh, self.lab.trunk, "random", seed=self.seed)
        for new, other in list(zip(heads.layers, fresh.layers, strict=True))[heads.depth // 2 :]:
            new.load_state_dict(other.state_dict())

    def run(self) -> None:
        ce = self.base("4 heads CE", 4, loss="ce")
        heads = self.base("4 heads", 4)
        eight = {form: self.stage("4 to 8", heads, 8, form) for form in FORMS}
        self.base("8 heads at once", 8)
        self.stage("4 to 8", heads, 8, "copies", change=self.random)
        self.found("CE 4 to 8, untrained", ce.extended(self.lab.trunk, depth=8, form="shared"), 0.0, None)
        for loss in ("mtp_d", "ce"):
            one = self.base(f"1 head {loss}", 1, loss=loss)
            two = one.extended(self.lab.trunk, depth=2, form="shared")
            self.found(f"1 to 4 {loss}, untrained", two.extended(self.lab.trunk, depth=4, form="shared"), 0.0, None)
        for form in FORMS:
            self.stage("8 to 16", eight[form], 16, form)


def train(lab: Lab, options: Any) -> None:
    table: list[dict[str, Any]] = []

    def note(**row: Any) -> None:
        table.append(row)
        car = "/".join(f"{value:.3f}" for value in row["car"])
        print(f"{row['name']}, seed {row['seed']}: tau {row['tau']:.3f}, CAR {car}, {row['seconds']:.0f} s", flush=True)
        write_rows(options.json, [{"machine": machine(), **each} for each in table])

    for seed in range(options.seeds):
        Experiment(lab, options, seed, note).run()
    print("\n| heads | tau | CAR by depth | trained parameters | minutes | µs a token |\n|---|---|---|---|---|---|")
    for name in dict.fromkeys(row["name"] for row in table):
        rows = [row for row in table if row["name"] == name]
        cars = [statistics.mean(column) for column in zip(*(row["car"] for row in rows), strict=True)]
        print(
            f"| {name} | {spread([row['tau'] for row in rows])} | {' '.join(f'{car:.3f}' for car in cars)} "
            f"| {rows[0]['parameters']:,} | {statistics.mean(row['seconds'] for row in rows) / 60:.1f} "
            f"| {statistics.mean(row['microseconds_per_token'] for row in rows):.0f} |"
        )


def cost(lab: Lab, options: Any) -> None:
    """Time of an optimizer step for a row: heads 5 to 8 after 4 finished ones, against 8 heads at once, in turns."""
    experiment = Experiment(lab, options, 0, lambda **_: None)
    rows, store = TrainingRows(experiment.rows), experiment.store
    old = experiment.start(4)
    kept = FinishedDepths(lab.trunk, old, MemoryStore(lab.trunk, experiment.rows))
    finished = {"8 heads at once": None, "5 to 8, first epoch": FinishedDepths(lab.trunk, old, None), "5 to 8": kept}
    steps: dict[str, Callable[[dict[str, torch.Tensor]], None]] = {}
    for name, below in finished.items():
        heads = old.extended(lab.trunk, depth=8, form="copies") if below is not None else experiment.start(8)
        steps[name] = _step(lab, experiment.recipe(4), heads.train(), below)
    seconds: dict[str, list[float]] = {name: [] for name in ["trunk", *steps]}
    for number in range(min(len(rows), options.cost_rows)):
        row = collate([rows[number]])
        kept({**with_hidden(row, lab.trunk, store), "row": row["row"]})
        began = clock()
        with_hidden(row, lab.trunk, None)
        seconds["trunk"].append(clock() - began)
        order = list(steps)
        for name in order[number % 3 :] + order[: number % 3]:
            batch = {**with_hidden(row, lab.trunk, store), "row": row["row"]}
            began = clock()
            steps[name](batch)
            seconds[name].append(clock() - began)
    length = experiment.rows.row_length
    print("| | ms a token | against 8 heads at once |\n|---|---|---|")
    for name, taken in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(taken, seconds["8 heads at once"], strict=True))
        print(f"| {name} | {1e3 * statistics.median(taken) / length:.2f} | {ratio:.2f} |")
        write_rows(
            options.json,
            [{"machine": machine(), "name": each, "seconds": found} for each, found in seconds.items()],
        )


def _step(
    lab: Lab, settings: Recipe, heads: Heads, below: FinishedDepths | None
) -> Callable[[dict[str, torch.Tensor]], None]:
    """A function that trains on one row as the trainer does."""
    after = 0 if below is None else below.depth
    model = DistillModel(lab.trunk, heads, loss_settings(settings, depth=heads.depth, after=after), after=after)
    optimizer = torch.optim.AdamW([p for p in heads.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step(batch: dict[str, torch.Tensor]) -> None:
        states = {"below": below(batch)} if below is not None else {}
        inputs = {name: tensor for name, tensor in batch.items() if name not in ("row", "tokens")}
        with torch.autocast(lab.trunk.device.type, lab.trunk.dtype):
            loss = model(**inputs, **states)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def speed(lab: Lab, options: Any) -> None:
    """Tokens/s by the number of drafts, of all heads that `train` kept."""
    samples = lab.respond(options.held_out, "held-out", temperature=0.0, tokens=128, limit=options.held_out_limit)
    prompts = [sample.prompt_ids for sample in samples[: options.speed_prompts]]
    print(
        "| heads | fastest | speed-up there | speed-up by drafts, from 0 | draft ms by drafts |\n|---|---|---|---|---|"
    )
    table = []
    for name in options.heads or sorted(folder.name for folder in (options.work / "heads").iterdir()):
        folder = options.work / "heads" / name
        heads = load_heads(folder, lab.trunk, fingerprint=lab.fingerprint).to(lab.trunk.dtype)
        found = measure_depths(lab.trunk, heads, prompts, max_new_tokens=options.speed_tokens, end_tokens=lab.ends)
        best = found.fastest
        rates = " ".join(f"{found.speed_up(each.depth):.2f}" for each in found.depths)
        costs = " ".join(f"{each.draft_ms:.1f}" for each in found.depths[1:])
        print(f"| {folder.name} | {best} | {found.speed_up(best):.2f}x | {rates} | {costs} |", flush=True)
        table.append({"machine": machine(), "name": folder.name, **found.model_dump()})
        write_rows(options.json, table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "cost", "speed"))
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompts", default="builtin", help="trained on: builtin, or a .jsonl file")
    parser.add_argument("--held-out", default="builtin-held-out", help="measured on")
    parser.add_argument("--limit", type=int, default=900, help="prompts at most")
    parser.add_argument("--held-out-limit", type=int, default=32)
    parser.add_argument("--work", type=Path, default=Path("runs/extension-lab"), help="keeps responses and heads")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokens", type=int, default=16_000, help="response tokens trained on, the same for all")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapter-rate", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cost-rows", type=int, default=12)
    parser.add_argument("--heads", nargs="+", help="folders in WORK/heads to decode with; all by default")
    parser.add_argument("--speed-prompts", type=int, default=4)
    parser.add_argument("--speed-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    {"train": train, "cost": cost, "speed": speed}[options.what](Lab.open(options.model, options.work), options)


if __name__ == "__main__":
    main()
