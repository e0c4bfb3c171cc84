"""Whole runs of a tiny model with heads of every kind, in float32 and 16 bits, beside those on the processor."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.outcome import Options, Outcome
from mtpd.cli import main
from mtpd.evaluate.acceptance import Acceptance

RECIPE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"
KINDS = {
    "chain": [],
    "parallel": ["heads.kind=parallel"],
    "medusa": ["heads.kind=medusa"],
    "circuit": ["heads.kind=circuit"],
    "parallel behind a shared layer": ["heads.kind=parallel", "heads.shared_layers=1"],
}
FEW = ["data.limit=8", "data.max_new_tokens=16", "evaluation.prompts_limit=4", "evaluation.decode_prompts=2"]
SAME = {"float32": 0.02, "bfloat16": 0.15, "float16": 0.15}
"""By number format, the share of drafts that may be accepted otherwise than on the processor: ties, and rounding."""


class Counts(NamedTuple):
    """What a run measured."""

    drafted: int
    accepted: int
    """Of first drafts."""
    prompts: int
    identical: int
    """Of decoded texts: those of plain decoding, or apart from it at a tie."""


def work(options: Options) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    half = str(options.dtype).removeprefix("torch.")
    on_processor: dict[str, Counts] = {}
    for kind in ["chain"] if options.tiny else KINDS:
        for dtype in ("float32", half):
            name = f"smoke run, {kind}, {dtype}"
            yield name, lambda name=name, kind=kind, dtype=dtype: compared(name, kind, dtype, on_processor, options)


def compared(name: str, kind: str, dtype: str, on_processor: dict[str, Counts], options: Options) -> Outcome:
    there = run(kind, options.device, dtype, options)
    if kind not in on_processor:
        on_processor[kind] = run(kind, "cpu", "float32", options)
    here = on_processor[kind]
    apart = abs(here.accepted / max(1, here.drafted) - there.accepted / max(1, there.drafted))
    figures = {"there": there._asdict(), "on the processor": here._asdict()}
    return Outcome(
        name,
        apart <= SAME[dtype] and there.identical == there.prompts,
        f"{there.accepted} of {there.drafted} first drafts accepted ({here.accepted} of {here.drafted} on the "
        f"processor), {there.identical} of {there.prompts} texts are those of plain decoding",
        figures,
    )


def run(kind: str, device: str, dtype: str, options: Options) -> Counts:
    """Runs the recipe from the beginning.

    Raises:
        RuntimeError: it did not end well.
    """
    folder = options.out / "runs" / f"{kind.replace(' ', '-')}-{device.replace(':', '')}-{dtype}"
    shutil.rmtree(folder, ignore_errors=True)
    words = ["distill", str(RECIPE), f"output={folder}", f"device={device}", f"dtype={dtype}", *KINDS[kind], *FEW]
    if code := main([*words, "--debug"]):
        raise RuntimeError(f"mtpd {' '.join(words)} ended with {code}")
    suites = Acceptance.load(folder / "acceptance.json").suites.values()
    decoded = Acceptance.load(folder / "acceptance-decoded.json").suites.values()
    return Counts(
        sum(suite.drafted[0] for suite in suites),
        sum(suite.accepted[0] for suite in suites),
        sum(suite.prompts for suite in decoded),
        sum((suite.identical or 0) + (suite.ties or 0) for suite in decoded),
    )
