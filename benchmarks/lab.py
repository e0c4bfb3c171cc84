"""What the training experiments share: one trunk, response sets, equal tokens, a training run, a measurement."""

from __future__ import annotations

import json
import platform
import random
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import clock
from transformers import set_seed

from mtpd.data.disk_store import DiskStore, fill
from mtpd.data.models import load_model, trunk_fingerprint
from mtpd.data.packing import PackedRows, Sample, collate, pack
from mtpd.data.prompts import load_prompts, render
from mtpd.data.responses import end_tokens, generate_responses
from mtpd.data.store import HiddenStates, MemoryStore, store_key, with_hidden
from mtpd.data.vocabulary import draft_vocabulary
from mtpd.errors import MtpdError
from mtpd.evaluate.acceptance import SuiteCounts
from mtpd.evaluate.offline import measure_offline
from mtpd.heads import Heads, build_heads, configure_heads, start_heads
from mtpd.recipe import Recipe, parse_recipe
from mtpd.train.arguments import loss_settings, training_arguments
from mtpd.train.finished_depths import FinishedDepths
from mtpd.train.model import DistillModel
from mtpd.train.rows import TrainingRows
from mtpd.train.trainer import HeadTrainer
from mtpd.trunk import Trunk


@dataclass
class Lab:
    """One trunk and a folder in which responses are kept between calls."""

    trunk: Trunk
    tokenizer: Any
    fingerprint: str
    ends: list[int]
    work: Path

    @classmethod
    def open(cls, model: str, work: Path) -> Lab:
        loaded, tokenizer = load_model(model)
        trunk = Trunk(loaded, tokens=len(tokenizer))
        return cls(trunk, tokenizer, trunk_fingerprint(loaded), end_tokens(loaded, tokenizer), work)

    def respond(self, source: str, name: str, *, temperature: float, tokens: int, limit: int | None) -> list[Sample]:
        """The trunk's answers to the prompts of a source."""
        return generate_responses(
            self.trunk.model,
            self.tokenizer,
            load_prompts(source, limit=limit),
            self.work / f"{name}.jsonl",
            trunk=self.fingerprint,
            temperature=temperature,
            max_new_tokens=tokens,
            max_length=self.trunk.context,
        )

    def given(self, source: str, limit: int | None) -> list[Sample]:
        """The words of the prompts themselves: text that the trunk did not write."""
        prompts = load_prompts(source, limit=limit)
        return [Sample.of(p.id, ids[:1], ids[1:], p.family) for p in prompts for ids in [render(self.tokenizer, p)]]

    def rows(self, samples: Sequence[Sample], *, tokens: int, seed: int) -> PackedRows:
        """Samples in a random order until there are so many response tokens, packed."""
        chosen, count = [], 0
        for sample in random.Random(seed).sample(list(samples), len(samples)):
            room = tokens - count
            if room <= 0:
                break
            responses = sample.response_ids[:room]
            chosen.append(Sample.of(sample.id, sample.prompt_ids, responses, sample.family))
            count += len(responses)
        if count < tokens:
            raise SystemExit(f"only {count} response tokens, {tokens} were asked for")
        return pack(chosen, row_length=512)

    def store(self, rows: PackedRows, name: str) -> HiddenStates:
        """The hidden states of all rows, in a directory that holds those of one set of rows at a time."""
        key = store_key(self.fingerprint, self.tokenizer, [], rows)
        directory = self.work / f"hidden-{name}"
        try:
            store = DiskStore(directory, self.trunk, rows, key=key)
        except MtpdError:
            shutil.rmtree(directory)
            store = DiskStore(directory, self.trunk, rows, key=key)
        fill(store, self.trunk, rows)
        return store

    def heads(self, recipe: Recipe, rows: PackedRows, store: HiddenStates, *, source: Heads | None = None) -> Heads:
        """New heads with the recipe's start, or with the weights of others."""
        settings = recipe.heads
        vocabulary = draft_vocabulary(rows, settings.vocabulary, tokens=self.trunk.tokens or 0, always=self.ends)
        size = 0 if vocabulary is None else len(vocabulary)
        config = configure_heads(settings.model_dump(), self.trunk, vocabulary=size, fingerprint=self.fingerprint)
        heads = build_heads(self.trunk, config)
        if vocabulary is not None:
            heads.get_buffer("vocabulary").copy_(vocabulary)
        training = TrainingRows(rows)
        start_heads(
            heads,
            self.trunk,
            settings.init,
            lambda: [with_hidden(collate([training[i]]), self.trunk, store) for i in range(len(rows))],
            seed=recipe.seed,
            source=source,
        )
        return heads

    def train(
        self, recipe: Recipe, heads: Heads, rows: PackedRows, store: HiddenStates, *, finished: Heads | None = None
    ) -> float:
        """Trains in place; gives seconds.

        Args:
            finished: the first depths of the heads, which are not trained; their states are computed in this time.
        """
        set_seed(recipe.seed)
        after = 0 if finished is None else finished.depth
        settings = loss_settings(recipe, depth=heads.depth, after=after)
        with tempfile.TemporaryDirectory() as folder:
            recipe = recipe.model_copy(update={"output": Path(folder)})
            arguments = training_arguments(recipe, dtype=self.trunk.dtype, device=self.trunk.device)
            arguments.save_strategy = "no"
            model = DistillModel(self.trunk, heads, settings, after=after)
            began = clock()
            below = None if finished is None else FinishedDepths(self.trunk, finished, MemoryStore(self.trunk, rows))
            trainer = HeadTrainer(model, arguments, rows, store=store, below=below, progress=False)
            trainer.train()
        return clock() - began

    def measure(self, heads: Heads, samples: Sequence[Sample]) -> SuiteCounts:
        """Offline acceptance, all families together."""
        copy = build_heads(self.trunk, heads.config)
        copy.load_state_dict(heads.state_dict())
        same = [Sample(s.id, s.ids, s.response_mask, "all") for s in samples]
        suites = measure_offline(
            self.trunk, copy.to(self.trunk.dtype).eval(), same, end_tokens=self.ends, progress=False
        )
        return suites["all"]


def recipe(**sections: Any) -> Recipe:
    """A recipe from nested keyword arguments."""
    return parse_recipe({"model": "demo", **sections})


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"


def machine() -> str:
    """Processor and number of threads."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def write_rows(path: Path | None, rows: list[dict[str, Any]]) -> None:
    """The table as JSON, if a file was asked for."""
    if path is not None:
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
