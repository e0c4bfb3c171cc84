"""The three papers in their own regime: model and heads trained together from scratch, arm by arm.

    python benchmarks/joint.py papers/mtp-d --seeds 3 --work runs/joint
    python benchmarks/joint.py papers/mtp-d --arms beta-0.25 beta-1.5 top-2% together not-detached --work runs/joint
    python benchmarks/joint.py papers/mtp-d --arms one-ce one-mtp_d --loops 2 4 8 16 --work runs/joint
    python benchmarks/joint.py papers/parallel --arms alone heads-1 heads-3 heads-7 --work runs/joint
    python benchmarks/joint.py --table runs/joint

Each run of an arm and a seed is one of `mtpd pretrain` in a folder of --work, which the same command goes on with. What
is measured is written beside it (`measured.json`) as soon as it is there:

- held-out loss of the main head and of each head, and CAR along the text (all positions, teacher-forced);
- CAR by the walk of decoding along greedy text of the model itself, and along text drawn at temperature 1, where the
  chance that a drawn draft is accepted, Σ min(p, q), is given too;
- the same for looped heads, untrained, at each depth of --loops; with --train-loops N, also after N steps of training
  of the new depths with the trunk frozen;
- exact match of the next identifier and of a bracket's partner: a small downstream measure of the model alone.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lab import machine
from measure import clock
from torch import Tensor

from mtpd import alignment
from mtpd.data.models import load_model
from mtpd.data.packing import Sample
from mtpd.decode.choice import Greedy
from mtpd.decode.engine import Engine
from mtpd.decode.sampling import Sampling, temperature_and_top_p
from mtpd.decode.text import Request
from mtpd.evaluate.offline import measure_offline
from mtpd.heads import Heads, load_heads
from mtpd.losses.kinds import top_n
from mtpd.losses.settings import LossSettings
from mtpd.pretrain import pretrain as pretraining
from mtpd.pretrain.text import as_packed, stream_rows
from mtpd.recipe import PretrainRecipe, load_pretrain_recipe
from mtpd.train.arguments import arguments_of, loss_of
from mtpd.train.finished_depths import FinishedDepths
from mtpd.train.model import DistillModel
from mtpd.train.trainer import HeadTrainer
from mtpd.trunk import Trunk

CE = ["train.loss=ce", "train.top_n=null", "train.weights=[0.3, 0.3, 0.3, 0.3]"]
ARMS: dict[str, list[str]] = {
    "ce": CE,
    "mtp_d": [],
    **{f"beta-{beta}": [f"train.beta={beta}"] for beta in (0.15, 0.25, 1.0, 1.5)},
    "top-100%": ["train.top_n=0"],
    "top-2%": ["train.top_n=0.02"],
    "top-10%": ["train.top_n=0.1"],
    "not-detached": [],
    "no-trunk-gradient": ["heads.trunk_gradient=false"],
    "trunk-gradient-of-1": [],
    "one-ce": ["heads.depth=1", "train.loss=ce", "train.top_n=null", "train.weights=[0.3]"],
    "one-mtp_d": ["heads.depth=1"],
    "alone": ["heads.depth=0"],
    **{f"heads-{depth}": [f"heads.depth={depth}"] for depth in (1, 3, 7)},
}
"""By name, what is changed in the recipe. A `train.top_n` below 1 is a share of the vocabulary."""
PROMPT, WRITTEN = 64, 128
"""Tokens of a held-out row that are given, and that the model writes after them."""


class NotDetached(DistillModel):
    """The loss with a teacher that is trained by it too: as in the paper's ablation, by autograd over all logits."""

    def _sum(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor, *_: Any) -> Tensor:
        total = super()._sum(input_ids, labels, position_ids, None, None, None)
        if not torch.is_grad_enabled():
            return total
        assert self.joint is not None
        readout = self.joint.readout(self.readout)
        states = self.joint.states(input_ids, position_ids)
        heads: Any = self.heads
        drafts = heads(self.trunk, states, input_ids, position_ids_BT=position_ids)
        length = input_ids.shape[1]
        for depth, (draft, beta) in enumerate(zip(drafts, self.settings.beta, strict=True), start=1):
            places = slice(0, length - depth - 1)
            y = readout.main(draft[:, places]).float().detach()
            z = readout.main(states[:, depth:][:, places]).float()
            kept = top_n(z.detach().flatten(0, 1), self.settings.top_n).view(z.shape)
            log_q = z.masked_fill(~kept, -1e9).log_softmax(-1)
            log_p = y.masked_fill(~kept, -1e9).log_softmax(-1)
            # The gradient that the detached teacher lacks: that of the KL in the teacher's logits.
            lacking = beta * (log_q.exp() * (log_q - log_p)).sum()
            total = total + lacking - lacking.detach()
        return total


class TrunkGradientOfOne(DistillModel):
    """The gradient of the first head alone reaches the trunk."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        second: Any = self.heads.layers[1]
        inside = second.forward

        def forward(embed: Tensor, hidden: Tensor, **others: Any) -> Any:
            return inside(embed, hidden.detach(), **others)

        second.forward = forward


MODELS: dict[str, type[DistillModel]] = {"not-detached": NotDetached, "trunk-gradient-of-1": TrunkGradientOfOne}


def recipe_of(options: Any, arm: str, seed: int) -> PretrainRecipe:
    changes = [f"output={options.work / f'{Path(options.recipe).stem}-{arm}-{seed}'}", f"seed={seed}"]
    for change in ARMS[arm]:
        key, _, value = change.partition("=")
        if key == "train.top_n" and value.startswith("0."):
            vocabulary = int(str(load_pretrain_recipe(options.recipe).tokenizer).rpartition(":")[2])
            change = f"{key}={round(float(value) * vocabulary)}"
        changes.append(change)
    return load_pretrain_recipe(options.recipe, [*changes, *options.set])


@contextmanager
def trained_as(arm: str) -> Iterator[None]:
    """Within it `mtpd pretrain` trains the model of an arm."""
    plain = pretraining.DistillModel
    pretraining.DistillModel = MODELS.get(arm, plain)  # type: ignore[misc]
    try:
        yield
    finally:
        pretraining.DistillModel = plain  # type: ignore[misc]


def train(options: Any, arm: str, seed: int) -> Path:
    recipe = recipe_of(options, arm, seed)
    finished = recipe.output / "held-out.json"
    if not finished.is_file():
        began = clock()
        with trained_as(arm):
            pretraining.pretrain(recipe)
        (recipe.output / "seconds.json").write_text(json.dumps(clock() - began))
    return recipe.output


class Measured:
    """What a run is worth: its model in float32, and heads."""

    def __init__(self, run: Path, options: Any) -> None:
        self.run, self.options = run, options
        self.recipe = load_pretrain_recipe(run / "recipe.yaml")
        model, self.tokenizer = load_model(str(run / "model"), dtype="float32")
        self.trunk = Trunk(model, tokens=len(self.tokenizer))
        self.held_out = self.rows("stdlib-held-out", limit=options.rows)
        self.found: dict[str, Any] = {
            "run": run.name,
            "machine": machine(),
            "held_out": json.loads((run / "held-out.json").read_text()),
            "model": downstream(self.trunk, self.held_out, self.tokenizer),
        }
        if (run / "heads").is_dir():
            heads = load_heads(run / "heads", self.trunk).eval()
            self.texts = {"greedy": self.write(0.0), "drawn": self.write(1.0)}
            self.measure("heads", heads)
            if heads.config.kind == "chain":
                self.loop(heads)

    def rows(self, source: str, *, limit: int | None = None) -> Tensor:
        return stream_rows(self.tokenizer, source, row_length=self.recipe.data.row_length, limit=limit)

    def write(self, temperature: float) -> list[Sample]:
        """Texts of the model itself after the beginnings of held-out rows."""
        requests = [
            Request(row[:PROMPT].tolist(), WRITTEN, seed)
            for seed, row in enumerate(self.held_out[: self.options.texts])
        ]
        choice: Any = Sampling(temperature_and_top_p(temperature, 1.0)) if temperature else Greedy()
        engine = Engine(self.trunk, slots=16, capacity=PROMPT + WRITTEN, choice=choice)
        return [Sample.of(str(text.number), text.request.prompt, text.tokens, "all") for text in engine.run(requests)]

    def measure(self, name: str, heads: Heads) -> None:
        """CAR along the text and along the model's own."""
        found: dict[str, Any] = {"along_text": along_text(self.trunk, heads, self.held_out)}
        for kind, samples in self.texts.items():
            counts = measure_offline(self.trunk, heads, samples, progress=False)["all"]
            found[kind] = {"tau": counts.tau, "car": counts.car, "expected": counts.expected_acceptance}
        self.found[name] = found
        print(self.run.name, name, json.dumps(found), flush=True)

    def loop(self, heads: Any) -> None:
        for trained in [False, True][: 1 + bool(self.options.train_loops)]:
            longer = heads
            for depth in self.options.loops:
                if depth <= longer.depth:
                    continue
                while longer.depth < depth:
                    before = longer
                    longer = before.extended(self.trunk, depth=min(depth, 2 * before.depth), form="copies").eval()
                    if trained:
                        self.train_loop(before, longer)
                self.measure(f"looped-{depth}{'-trained' if trained else ''}", longer)

    def train_loop(self, before: Any, longer: Any) -> None:
        """Trains the new depths, the trunk and the earlier ones frozen, on the text of the run."""
        steps, recipe = self.options.train_loops, self.recipe
        rows = self.rows("stdlib")
        some = torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.seed + 1))
        packed = as_packed(rows[some[: steps * recipe.train.micro_batch_rows]])
        depth, after = longer.depth, before.depth
        settings = loss_of(recipe.train, before.depth)
        new = depth - after
        settings = LossSettings(settings.alpha[:1] * new, settings.beta[:1] * new, settings.loss, settings.top_n, 1.0)
        arguments = arguments_of(
            recipe.train.model_copy(update={"learning_rate": self.options.loop_rate, "max_steps": steps}),
            {"weight_decay": recipe.train.weight_decay, "save_strategy": "no"},
            output=self.run / "loop",
            seed=recipe.seed,
            dtype=self.trunk.dtype,
            device=self.trunk.device,
        )
        model = DistillModel(self.trunk, longer.train(), settings, after=after)
        HeadTrainer(model, arguments, packed, below=FinishedDepths(self.trunk, before, None), progress=False).train()
        longer.eval()


@torch.no_grad()
def along_text(trunk: Trunk, heads: Heads, rows: Tensor) -> list[float]:
    """The share of positions at which the first k drafts are what the main head chooses, by depth."""
    sums: Tensor | None = None
    for part in rows.split(16):
        ids = part.long()
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        hidden = trunk.hidden(ids, position_ids=positions)
        chosen = trunk.unembedding.select(None)(hidden).argmax(-1)
        along = heads.along(trunk, hidden, ids, position_ids_BT=positions)
        room = ids.shape[1] - heads.depth - 1
        counted = (positions < room).flatten().nonzero().squeeze(1)
        agree = torch.ones(len(counted), dtype=torch.bool)
        found = []
        for depth in range(1, along.depth + 1):
            drafted = along.logits(depth, counted).argmax(-1)
            agree &= drafted == chosen.flatten()[alignment.teacher_row(counted, depth)]
            found.append(agree.double().mean())
        part_sums = torch.stack([*found, torch.ones(())]) * len(part)
        sums = part_sums if sums is None else sums + part_sums
    assert sums is not None
    return (sums[:-1] / sums[-1]).tolist()


OPEN, CLOSE = "([{", ")]}"


@torch.no_grad()
def downstream(trunk: Trunk, rows: Tensor, tokenizer: Any) -> dict[str, float]:
    """Share of identifiers that the model completes to the letter, and of closing brackets that it gets right.

    An identifier counts where it stood in the row before, and is to be written from its first token on, teacher-forced.
    """
    right = {"identifier": 0, "bracket": 0}
    asked = {"identifier": 0, "bracket": 0}
    for row in rows:
        ids = row.long()[None]
        chosen = trunk.unembedding.select(None)(trunk.hidden(ids))[0].argmax(-1).tolist()
        pieces = [tokenizer.decode([token]) for token in row.tolist()]
        starts = [0]
        for piece in pieces:
            starts.append(starts[-1] + len(piece))
        text = "".join(pieces)
        of_place = {start: number for number, start in enumerate(starts)}
        seen: set[str] = set()
        for match in re.finditer(r"[A-Za-z_]\w{3,}", text):
            first, end = of_place.get(match.start()), of_place.get(match.end())
            if match.group() in seen and first and end:
                asked["identifier"] += 1
                right["identifier"] += all(chosen[at - 1] == int(ids[0, at]) for at in range(first, end))
            seen.add(match.group())
        for number, piece in enumerate(pieces):
            if number and piece.strip() and piece.strip()[0] in CLOSE:
                asked["bracket"] += 1
                right["bracket"] += chosen[number - 1] == int(ids[0, number])
    return {name: right[name] / max(1, asked[name]) for name in right} | {f"{k}s": float(v) for k, v in asked.items()}


def table(work: Path) -> None:
    """Means over seeds, with the standard deviation."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(work.glob("*/measured.json")):
        found = json.loads(path.read_text())
        arms.setdefault(found["run"].rpartition("-")[0], []).append(found)
    for arm, runs in arms.items():
        main_head = _mean([run["held_out"]["ce_0"] for run in runs])
        print(f"\n{arm} ({len(runs)} seeds): main head {main_head} nats")
        print(
            "  "
            + ", ".join(f"{name} {_mean([run['model'][name] for run in runs])}" for name in ("identifier", "bracket"))
        )
        for name in [key for key in runs[0] if key == "heads" or key.startswith("looped")]:
            there = [run[name] for run in runs if name in run]
            depth = len(there[0]["along_text"])
            columns = {
                "along text": [[run["along_text"][k] for run in there] for k in range(depth)],
                "greedy": [[run["greedy"]["car"][k] for run in there] for k in range(depth)],
                "drawn, Σ min": [[run["drawn"]["expected"][k] for run in there] for k in range(depth)],
            }
            tau = _mean([run["greedy"]["tau"] for run in there])
            print(f"  {name}: tau {tau}; " + "; ".join(f"{k}: {' '.join(map(_mean, v))}" for k, v in columns.items()))


def _mean(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f}±{deviation:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="papers/mtp-d", help="a recipe of mtpd pretrain")
    parser.add_argument("--arms", nargs="*", default=["ce", "mtp_d"], choices=list(ARMS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/joint"))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further changes of the recipe")
    parser.add_argument("--loops", type=int, nargs="*", default=[8, 16])
    parser.add_argument("--train-loops", type=int, default=0, metavar="STEPS")
    parser.add_argument("--loop-rate", type=float, default=1e-3, help="learning rate of those steps (AdamW)")
    parser.add_argument("--rows", type=int, default=96, help="held-out rows measured")
    parser.add_argument("--texts", type=int, default=48, help="texts that the model writes")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--table", type=Path, metavar="WORK", help="print what is measured there, and stop")
    options = parser.parse_args()
    if options.table is not None:
        table(options.table)
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for arm in options.arms:
            run = train(options, arm, seed)
            path = run / "measured.json"
            if not path.is_file():
                found = Measured(run, options).found
                path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
