"""Which heads a run keeps: those that training made, unless those that it started from are better.

The start is a candidate like every checkpoint. Both are measured on the same held-out prompts, and tau is compared by
the bootstrap over prompts that the gate has, both files resampled together:

    better    the 95% interval of the change of tau lies above 0: the trained heads are kept
    worse     it lies below 0: the heads are kept as they started
    unclear   it holds 0, or there are too few prompts for one: the trained heads are kept

Where the prompts do not decide, chance must not: the trained heads stay, which is what was asked for. Both outcomes
but the first are said, with what the heads accept on text that they were trained on: heads that learned that text and
nothing else want more of it.

A model that was trained too has other heads than it began with, and no start to compare them with.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mtpd.alignment import IGNORED
from mtpd.data.packing import PackedRows, Sample
from mtpd.evaluate import gate
from mtpd.evaluate.acceptance import Acceptance
from mtpd.evaluate.intervals import FEWEST
from mtpd.files import replacing, sync
from mtpd.heads import WEIGHTS, load_heads
from mtpd.parallel import ranks
from mtpd.recipe import Recipe
from mtpd.run.acceptance import measure, measured_offline
from mtpd.run.directory import RunDirectory
from mtpd.run.material import other_families as other_families
from mtpd.run.session import Session

Outcome = Literal["better", "worse", "unclear"]
OUTCOMES: dict[str, Outcome] = {"up": "better", "down": "worse", "flat": "unclear"}
"""By the side of no change on which the interval lies."""
TRAINED_TEXTS = 28
"""Texts that were trained on, on which the heads are measured where training gained nothing."""
DEMO = "for comparison: the demo's model of 135 million parameters gains 16% from 123,000 response tokens"


@dataclass(frozen=True)
class Gain:
    """The change that training made."""

    tau: gate.Change
    prompts: int

    @property
    def outcome(self) -> Outcome:
        return OUTCOMES[self.tau.direction]

    @property
    def told(self) -> bool:
        """Whether there are prompts enough for an interval."""
        return self.tau.change.low is not None

    @property
    def kept(self) -> Literal["trained", "start"]:
        """Name of the heads that a run keeps after it."""
        return "start" if self.outcome == "worse" else "trained"

    def shown(self) -> str:
        """tau 1.30 → 1.51 (+16.20% [+14.00, +18.50]) on 84 prompts"""
        return f"tau {self.tau.before:.3f} → {self.tau.after:.3f} ({self.tau.shown()}) on {self.prompts} prompts"

    def noted(self) -> dict[str, Any]:
        """Entry of the provenance."""
        change = self.tau.change
        return {
            "kept": self.kept,
            "tau_of_the_start": self.tau.before,
            "tau_of_the_trained": self.tau.after,
            "change": {"value": change.value, "low": change.low, "high": change.high},
            "prompts": self.prompts,
        }


def gain_of(before: Acceptance, trained: Acceptance, apart: frozenset[str] = frozenset()) -> Gain:
    """Compares the heads after training with those before it.

    Args:
        apart: suites of other families, which do not decide unless there are no others.
    """
    names = [name for name in before.suites if name not in apart] or list(before.suites)
    first, second = (
        each.model_copy(update={"suites": {name: each.suites[name] for name in names}}) for each in (before, trained)
    )
    found = gate.compare(first, second, names=("before training", "after training"))
    return Gain(found.suites[None]["tau"], found.prompts[None])


def gain_of_run(recipe: Recipe, run: RunDirectory) -> Gain:
    """The gain of a run or stage that has its heads, from its files."""
    trained = run.acceptance_trained if run.acceptance_trained.is_file() else run.acceptance
    return gain_of(Acceptance.load(run.acceptance_before), Acceptance.load(trained), other_families(recipe))


def wants_heads(run: RunDirectory) -> bool:
    """Whether a run has neither its heads nor trained ones that could become them. All ranks call it."""
    folders = (run.heads, run.heads_trained)
    return bool(ranks.from_main(lambda: not any((folder / WEIGHTS).is_file() for folder in folders)))


def keep_heads(session: Session, samples: Sequence[Sample]) -> None:
    """Gives a run its `heads/` and `acceptance.json` out of `heads-trained/`, unless it has them. All ranks call it.

    Killed at any moment, it begins again from `heads-trained/`, and ends the same.
    """
    run = session.run
    if not ranks.from_main((run.heads / WEIGHTS).is_file):
        heads = load_heads(run.heads_trained, session.trunk, fingerprint=session.fingerprint)
        measure(session, heads, samples, run.heads_trained, run.acceptance)
        ranks.from_main(lambda: _choose(session))


def _choose(session: Session) -> None:
    """Makes the trained heads, or those before them, the heads of the run."""
    run = session.run
    before, trained = Acceptance.load(run.acceptance_before), Acceptance.load(run.acceptance)
    # What a save that was killed left there.
    shutil.rmtree(run.heads, ignore_errors=True)
    if gain_of(before, trained, other_families(session.recipe)).kept == "start":
        os.replace(run.acceptance, run.acceptance_trained)
        before.save(run.acceptance)
        with replacing(run.heads) as folder:
            shutil.copytree(run.heads_before, folder, dirs_exist_ok=True)
    else:
        run.acceptance_trained.unlink(missing_ok=True)
        run.heads_trained.rename(run.heads)
        sync(run.path)


def verdict(session: Session, rows: PackedRows) -> list[str]:
    """The last lines of a run: what training gained, or that it gained nothing and what the model wants.

    All ranks call it, and the main one has the lines.
    """
    gain = gain_of_run(session.recipe, session.run)
    lines = [verdict_line(gain, session.run)]
    random = ranks.from_main(lambda: Acceptance.load(session.run.acceptance).random_trunk)
    if gain.told and gain.outcome != "better" and not random and (ranks.is_main() or session.trunk.partitioned):
        lines.append(_wanted(session, rows, gain))
    return lines


def verdict_line(gain: Gain, run: RunDirectory) -> str:
    """Says in one line what training gained."""
    if gain.outcome == "better":
        return f"training gained: {gain.shown()} held out"
    if gain.outcome == "worse":
        return (
            f"TRAINING MADE THE HEADS WORSE: {gain.shown()} held out; {run.heads} holds the heads as they started, "
            f"{run.heads_trained} the trained ones"
        )
    if not gain.told:
        return (
            f"{gain.prompts} held-out prompts do not tell whether training gained anything, it takes {FEWEST}: tau "
            f"{gain.tau.before:.3f} → {gain.tau.after:.3f}; the trained heads are kept"
        )
    return f"training gained nothing that can be told from chance: {gain.shown()} held out; the trained heads are kept"


def _wanted(session: Session, rows: PackedRows, gain: Gain) -> str:
    """Says what the heads accept on text that they were trained on, and what follows from it."""
    run, train = session.run, session.recipe.train
    texts = trained_texts(rows, TRAINED_TEXTS)
    trained = run.heads_trained if gain.kept == "start" else run.heads
    length = f"{rows.response_tokens:,} response tokens"
    more = f"this model wants more text (data.prompts, data.limit, data.max_new_tokens), several times as much; {DEMO}"
    if len(texts) < FEWEST:
        # Few texts, or such as have several responses or none before which there is a prompt.
        said = f"the heads were trained on {length} in {rows.documents} texts"
        return f"{said}; {more}" if rows.documents < FEWEST else said
    learned = gain_of(_on_texts(session, run.heads_before, texts), _on_texts(session, trained, texts))
    change = f"tau went from {learned.tau.before:.3f} to {learned.tau.after:.3f} ({learned.tau.shown()})"
    said = f"on {learned.prompts} texts that were trained on, {change}"
    if learned.outcome == "better":
        return f"{said}: the heads have learned those {length}, and held-out text does not show it; {more}"
    return (
        f"{said}: the heads have not even learned the {length} that they were trained on. More text alone does not "
        f"help; train them otherwise (train.learning_rate is {train.learning_rate:g}, train.epochs {train.epochs:g}, "
        f"train.max_steps {train.max_steps})"
    )


def _on_texts(session: Session, folder: Path, texts: Sequence[Sample]) -> Acceptance:
    heads = load_heads(folder, session.trunk, fingerprint=session.fingerprint)
    suites = measured_offline(session, heads, texts)
    return Acceptance(mode="offline", trunk=session.fingerprint, heads=folder.name, suites=suites)


def trained_texts(rows: PackedRows, count: int) -> list[Sample]:
    """At most `count` prompts with one response each out of packed rows, from as many rows as there are."""
    found: list[Sample] = []
    chosen = range(0, len(rows), max(1, len(rows) // count))
    for number, index in enumerate(chosen, start=1):
        row, wanted = rows[index], -(-count * number // len(chosen))
        starts = [*(row["position_ids"] == 0).nonzero().squeeze(1).tolist(), rows.row_length]
        for first, end in itertools.pairwise(starts):
            ids, mask = row["input_ids"][first:end].tolist(), (row["labels"][first:end] != IGNORED).tolist()
            # A response that others follow, or without a prompt, is not a text that decoding writes.
            if len(found) < wanted and True in mask[1:] and not mask[0] and all(mask[mask.index(True) :]):
                found.append(Sample(f"{index}:{first}", ids, mask, "trained"))
    return found
