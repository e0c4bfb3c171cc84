"""Tokens/s by number of drafts, measured by `mtpd bench` and kept in the run for its report."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from mtpd.decode.model import Model
from mtpd.evaluate.acceptance import Acceptance, SuiteCounts
from mtpd.evaluate.depths import Depths, measure_depths
from mtpd.files import fingerprint_file
from mtpd.heads import WEIGHTS
from mtpd.recipe import load_recipe
from mtpd.run.directory import RunDirectory, measured
from mtpd.run.kept_heads import other_families

MOST_PROMPTS, MOST_TOKENS, MOST_RUNS = 2, 64, 2
"""Prompts that every number of drafts decodes, tokens of each, and how often: there are many numbers of drafts."""


def depths_of_run(
    path: Path,
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    end_tokens: Collection[int],
    max_new_tokens: int,
    runs: int,
) -> Depths | None:
    """Measures every number of drafts on a few prompts, and writes `depths.json`; None without heads of a run."""
    run = RunDirectory(path)
    if model.heads is None or not (run.heads / WEIGHTS).is_file():
        return None
    found = measure_depths(
        model.trunk,
        model.heads,
        prompts[:MOST_PROMPTS],
        max_new_tokens=min(MOST_TOKENS, max_new_tokens),
        runs=min(MOST_RUNS, runs),
        end_tokens=end_tokens,
        acceptance=held_out_counts(run) if measured(run.acceptance, run.heads) else None,
        heads_fingerprint=fingerprint_file(run.heads / WEIGHTS),
    )
    found.save(run.depths)
    return found


def held_out_counts(run: RunDirectory) -> SuiteCounts:
    """Offline counts over all held-out prompts, for the CAR of each depth; suites of other families are not in them."""
    found = Acceptance.load(run.acceptance)
    apart = other_families(load_recipe(run.recipe))
    return found.total([name for name in found.suites if name not in apart] or None)
