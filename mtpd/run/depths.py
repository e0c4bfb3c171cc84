"""Tokens/s by number of drafts, measured by `mtpd bench` and kept in the run for its report."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from mtpd.decode.model import Model
from mtpd.evaluate.acceptance import Acceptance
from mtpd.evaluate.depths import Depths, measure_depths
from mtpd.files import fingerprint_file
from mtpd.heads import WEIGHTS
from mtpd.run.directory import RunDirectory, measured

DECODED_PROMPTS, DECODED_TOKENS = 2, 64
"""Prompts that every number of drafts decodes, and tokens of each, at most."""


def depths_of_run(
    path: Path, model: Model, prompts: Sequence[Sequence[int]], *, end_tokens: Collection[int]
) -> Depths | None:
    """Measures every number of drafts, and writes `depths.json`; None without heads of a run."""
    run = RunDirectory(path)
    if model.heads is None or not (run.heads / WEIGHTS).is_file():
        return None
    # CAR of each depth is that of the same heads, measured offline on all held-out prompts.
    offline = measured(run.acceptance, run.heads)
    found = measure_depths(
        model.trunk,
        model.heads,
        prompts[:DECODED_PROMPTS],
        max_new_tokens=DECODED_TOKENS,
        end_tokens=end_tokens,
        acceptance=Acceptance.load(run.acceptance).total() if offline else None,
        heads_fingerprint=fingerprint_file(run.heads / WEIGHTS),
    )
    found.save(run.depths)
    return found
