"""Measures a run and shows the result: acceptance before and after training, offline and decoded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from mtpd.data.models import resolve_dtype
from mtpd.data.packing import PackedRows, Sample, response_texts
from mtpd.decode.chances import CHANCES, Chances, read_chances, write_chances
from mtpd.decode.corpus import CORPUS_FILE, Corpus, build_corpus, read_corpus, write_corpus
from mtpd.evaluate.acceptance import Acceptance, SuiteCounts
from mtpd.evaluate.chances import count_chances
from mtpd.evaluate.decoded import measure_decoded
from mtpd.evaluate.drafters import drafts_together, measure_drafters, with_drafters
from mtpd.evaluate.measure import Model
from mtpd.evaluate.offline import measure_offline
from mtpd.evaluate.run_tables import decoded_table, drafters_table, offline_table
from mtpd.evaluate.trunk_quality import at_chance
from mtpd.files import fingerprint_file
from mtpd.heads import WEIGHTS, Heads, build_heads, load_heads
from mtpd.parallel import ranks
from mtpd.report.car import write_car
from mtpd.report.samples import belong_to, sample_texts
from mtpd.run.directory import RunDirectory, measured
from mtpd.run.material import spread
from mtpd.run.session import Session, load_trunk
from mtpd.trunk import Trunk


def measure(session: Session, heads: Heads, samples: Sequence[Sample], folder: Path, path: Path) -> None:
    """Offline acceptance of the heads of a folder, written to `path` unless it is there. All ranks call it."""
    trunk, prompts = session.trunk, [sample.prompt_ids for sample in samples]
    ranks.once(
        path,
        lambda: (measured_offline(session, heads, samples), at_chance(trunk, prompts)),
        lambda found: acceptance_of(session, trunk, heads, folder, "offline", found[0], chance=found[1]).save(path),
        whole=lambda: measured(path, folder),
        together=trunk.partitioned,
    )


def measured_offline(session: Session, heads: Heads, samples: Sequence[Sample]) -> dict[str, SuiteCounts]:
    """Counts of a copy in the trunk's number format."""
    copy = _in_format_of_trunk(session, heads)
    return measure_offline(session.trunk, copy, samples, end_tokens=session.ends, progress=session.progress)


def keep_texts(session: Session, heads: Heads, samples: Sequence[Sample]) -> None:
    """Writes what drafts which token of a few held-out texts, heads or look-up, for the report. All ranks call it.

    Texts that are there already are kept where they belong to the same heads, also those of `mtpd eval`.
    """
    file, fingerprint = session.run.samples, fingerprint_file(session.run.heads / WEIGHTS)
    families: dict[str, list[Sample]] = {}
    for sample in samples:
        families.setdefault(sample.family or "prompts", []).append(sample)
    model = Model(session.trunk, session.tokenizer, session.fingerprint, session.ends)
    ranks.once(
        file,
        lambda: sample_texts(
            model,
            _in_format_of_trunk(session, heads),
            families,
            chances=read_chances(session.run.heads),
            corpus=read_corpus(session.run.heads, session.tokenizer),
            heads_fingerprint=fingerprint,
        ),
        lambda found: found.save(file),
        whole=lambda: belong_to(file, fingerprint),
        together=session.trunk.partitioned,
    )


def keep_corpus(session: Session, rows: PackedRows) -> Corpus | None:
    """Indexes the responses that were trained on, if the recipe wants it, and gives the index."""
    folder, megabytes = session.run.heads, session.recipe.data.corpus_mb
    if megabytes and ranks.is_main() and not (folder / CORPUS_FILE).is_file():
        write_corpus(folder, build_corpus(response_texts(rows), megabytes=megabytes), session.tokenizer)
    ranks.barrier()
    return read_corpus(folder, session.tokenizer)


def keep_chances(session: Session, heads: Heads, samples: Sequence[Sample], corpus: Corpus | None) -> Chances:
    """Counts on held-out texts how often drafts are right, for decoding with heads and look-up together.

    The main rank alone: nothing is counted where the trunk is partitioned.
    """
    folder = session.run.heads
    if ranks.is_main() and not (folder / CHANCES).is_file() and not session.trunk.partitioned and samples:
        copy = _in_format_of_trunk(session, heads)
        write_chances(folder, count_chances(session.trunk, copy, samples, corpus=corpus, progress=session.progress))
    ranks.barrier()
    return read_chances(folder)


def measure_together(
    session: Session, heads: Heads, samples: Sequence[Sample], chances: Chances, corpus: Corpus | None
) -> None:
    """Adds what heads and look-up accept together to the run's offline acceptance, unless it is there."""
    path = session.run.acceptance
    if not ranks.is_main() or not drafts_together(session.trunk):
        return
    acceptance = Acceptance.load(path)
    if acceptance.total().drafters:
        return
    copy = _in_format_of_trunk(session, heads)
    found = measure_drafters(
        session.trunk,
        copy,
        samples,
        chances,
        corpus=corpus,
        end_tokens=session.ends,
        progress=session.progress,
    )
    suites = {name: with_drafters(suite, found) for name, suite in acceptance.suites.items()}
    acceptance.model_copy(update={"suites": suites}).save(path)


def _in_format_of_trunk(session: Session, heads: Heads) -> Heads:
    """A copy of the heads for measuring."""
    with torch.no_grad():
        trained = heads.training
        heads.eval()
        copy = build_heads(session.trunk, heads.config)
        copy.load_state_dict(heads.state_dict())
        copy.to(session.trunk.dtype).eval()
        heads.train(trained)
    return copy


def acceptance_of(
    session: Session,
    trunk: Trunk,
    heads: Heads,
    folder: Path,
    mode: Literal["offline", "decoded"],
    suites: dict[str, SuiteCounts],
    *,
    chance: bool,
) -> Acceptance:
    """The acceptance file of a measurement on held-out prompts, with the settings that it was made with.

    Args:
        chance: the trunk predicts their text no better than chance.
    """
    evaluation, arguments = session.recipe.evaluation, session.recipe.data.chat_template_kwargs
    limit = evaluation.prompts_limit if mode == "offline" else evaluation.decode_prompts
    for suite in suites.values():
        suite.settings = {"limit": limit, "max_new_tokens": evaluation.max_new_tokens, "seed": session.recipe.seed}
    return Acceptance(
        mode=mode,
        settings={
            "dtype": str(trunk.dtype).removeprefix("torch."),
            "drafts": heads.depth,
            **({"chat_template_kwargs": json.dumps(arguments, sort_keys=True)} if arguments else {}),
        },
        trunk=session.fingerprint,
        heads=fingerprint_file(folder / WEIGHTS),
        random_trunk=chance,
        suites=suites,
    )


def decode(session: Session, samples: Sequence[Sample]) -> None:
    """Decodes with heads, look-up and both, beside plain `generate`; writes the acceptance file."""
    run, evaluation = session.run, session.recipe.evaluation
    if measured(run.decoded, run.heads):
        return
    trunk = session.trunk
    wanted = trunk.dtype if evaluation.dtype == "trunk" else resolve_dtype(evaluation.dtype, trunk.device)
    if wanted != trunk.dtype:
        trunk, _ = load_trunk(session.recipe, dtype=evaluation.dtype)
    heads = load_heads(run.heads, trunk, dtype=wanted)
    chosen = spread(list(samples), evaluation.decode_prompts)
    suites = measure_decoded(
        trunk,
        heads,
        chosen,
        chances=read_chances(run.heads) if drafts_together(trunk) else None,
        corpus=read_corpus(run.heads, session.tokenizer),
        max_new_tokens=evaluation.max_new_tokens,
        end_tokens=session.ends,
        progress=session.progress,
    )
    chance = at_chance(trunk, [sample.prompt_ids for sample in chosen])
    acceptance_of(session, trunk, heads, run.heads, "decoded", suites, chance=chance).save(run.decoded)


def show(run: RunDirectory, console: Console, apart: frozenset[str]) -> None:
    """Tables on the terminal and the picture of CAR by depth."""
    # What training did is shown, also where its heads were not kept.
    trained = run.acceptance_trained if run.acceptance_trained.is_file() else run.acceptance
    before, after = Acceptance.load(run.acceptance_before), Acceptance.load(trained)
    sides = {"before training": before, "after training": after}
    write_car(run.plot, run.path.resolve().name, sides, apart=sorted(apart))
    console.print(offline_table(before, after, apart=apart))
    if after.total().drafters:
        console.print(drafters_table(after, apart=apart))
    if run.decoded.is_file():
        console.print(decoded_table(Acceptance.load(run.decoded), apart=apart))
    console.print(f"CAR by depth: {run.plot}")
