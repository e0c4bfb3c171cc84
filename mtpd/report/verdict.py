"""Sums up a run's measurements in sentences: the first thing that a reader of the report sees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mtpd.decode.drafting import CORPUS
from mtpd.evaluate.acceptance import RANDOM, Acceptance, SuiteCounts
from mtpd.evaluate.depths import Depths
from mtpd.evaluate.gate import Comparison
from mtpd.evaluate.intervals import Estimate
from mtpd.evaluate.other_model import Cost
from mtpd.report.drafting import added_by_heads, as_used

COLLAPSED = 0.5
"""A control above this share of CAR_1 has not collapsed."""

Tone = Literal["up", "down", "flat"]


@dataclass(frozen=True)
class Verdict:
    """A headline and further sentences, each good, bad or neither."""

    tone: Tone
    headline: str
    lines: list[tuple[Tone, str]]


@dataclass(frozen=True)
class Measured:
    """One measurement, as far as a verdict reads it; seconds of `counts` and `ratios` are those of what a user gets."""

    title: str
    acceptance: Acceptance
    counts: SuiteCounts
    """Of the suites that are summed."""
    ratios: Mapping[str, Estimate]
    comparison: Comparison | None
    baseline: str
    """What it is compared with; empty for nothing."""
    kept: bool = True
    """These are the run's heads, and not trained ones that were worse than the start."""
    apart: tuple[str, ...] = ()
    """Suites that are not summed."""


def verdict(
    offline: list[Measured], decoded: list[Measured], depths: Depths | None, models: Sequence[Cost] = ()
) -> Verdict:
    """Sentences about all measurements of a run, and what other models cost its heads.

    What training did is the headline, also where its heads were not kept; else the first measurement is.
    """
    first = next((each for each in offline if not each.kept), [*offline, *decoded][0])
    tone, headline = _headline(first)
    lines: list[tuple[Tone, str]] = []
    if first.acceptance.random_trunk:
        lines.append(("down", RANDOM))
    lines += [_headline(each) for each in offline if each is not first]
    for each in offline:
        lines += _together(each)
    for each in decoded:
        lines += _speed(each)
    if depths is not None and depths.fastest:
        most = depths.depths[depths.fastest]
        lines.append(
            (
                "flat",
                f"Fastest with {drafts(depths.fastest)} a round, of 0 to {len(depths.depths) - 1}: "
                f"{most.tokens_per_second:.1f} tokens/s, against {depths.depths[0].tokens_per_second:.1f} without "
                f"drafts and {depths.plain_tokens_per_second:.1f} with transformers' generate "
                f"({prompts_of(depths.prompts)}).",
            )
        )
    elif depths is not None:
        lines.append(("down", f"No number of drafts is faster than none ({prompts_of(depths.prompts)})."))
    lines += [(model.tau.direction, f"{model.line}.") for model in models]
    for each in offline:
        lines += _doubts(each)
    return Verdict(tone, headline, lines)


def _headline(measured: Measured) -> tuple[Tone, str]:
    tau, prompts = measured.ratios["tau"], measured.counts.prompts
    if measured.comparison is None:
        return "flat", f"{measured.title}: tau {tau.text()} on {prompts_of(prompts)}."
    change = measured.comparison.suites[None]["tau"]
    numbers = f"tau {change.before:.3f} → {change.after:.3f} on {measured.comparison.prompts[None]} prompts"
    if change.change.low is None:
        return "flat", f"{numbers}: too few for an interval, so whether this is a change is not known."
    numbers = f"{numbers}, {change.shown()}"
    if measured.baseline == "before training":
        said = {
            "up": "Training made the drafts better",
            "down": "Training made the drafts worse",
            "flat": "Training gained nothing that so many prompts can show",
        }
    else:
        said = {
            "up": f"Better than {measured.baseline}",
            "down": f"Worse than {measured.baseline}",
            "flat": f"No different from {measured.baseline}, as far as so many prompts can show",
        }
    start = "" if measured.kept else " The run keeps the heads as they started."
    return change.direction, f"{said[change.direction]}: {numbers}.{start}"


def _together(measured: Measured) -> Iterator[tuple[Tone, str]]:
    """Says what heads and look-up accept in one tree, what look-up alone does, and what the heads add to it."""
    drafters = measured.counts.drafters
    if not drafters or not {"together", "lookup"} <= drafters.keys():
        return
    together, lookup = measured.ratios["tau_together"], measured.ratios["tau_lookup"]
    tone, added = _added(measured)
    yield (
        tone,
        f"{measured.title}, heads and look-up together, up to {drafts(drafters['together'].nodes or 0)} a round: tau "
        f"{together.text()} on {prompts_of(measured.counts.prompts)}. Look-up alone, which costs no training, gives "
        f"{lookup.text()}; {added}.",
    )


def _added(measured: Measured) -> tuple[Tone, str]:
    """Says what the heads add to look-up, and whether so many prompts can show it."""
    added = added_by_heads(measured.acceptance, apart=measured.apart)
    if added is None:
        return "flat", "what the heads add to it was not measured prompt by prompt"
    together = (measured.counts.drafters or {})["together"]
    # Both together may have a third source.
    who = "the heads and the trained responses" if CORPUS in together.sources else "the heads"
    what = "tau" if measured.acceptance.mode == "offline" else "tokens/s"
    shown = f"{what} {100 * added.value:+.1f}%"
    if added.low is None or added.high is None:
        said = "add to it" if added.value > 0 else "add nothing to it"
        return "flat", f"{who} {said} ({shown}; too few prompts for an interval)"
    shown += f" [{100 * added.low:+.1f}, {100 * added.high:+.1f}]"
    if added.low > 0:
        return "up", f"{who} add to it: {shown}"
    if added.high < 0:
        return "down", f"{who} add nothing to it, they cost: {shown}"
    return "down", f"{who} add nothing to it that so many prompts can show ({shown})"


def _speed(measured: Measured) -> Iterator[tuple[Tone, str]]:
    """Both ratios, what the larger one is made of, and whether the texts are the same."""
    counts = measured.counts
    if counts.speed_up is None:
        return
    over_engine = counts.speed_up_over_engine
    alone = (
        "the engine without drafts was not timed, so that what the drafts gain is not known"
        if over_engine is None
        else f"{over_engine:.2f}× the tokens/s of the same engine without drafts"
    )
    lookup = as_used(measured.acceptance, apart=measured.apart, drafter="lookup")
    drafted, tau = f"{drafts(counts.depth)} a round", counts.tau
    if lookup is not None:
        drafted, tau = "heads and look-up together", measured.ratios["tau_together"].value
    text = (
        f"{measured.title}, {drafted}, {prompts_of(counts.prompts)}: {counts.speed_up:.2f}× the "
        f"tokens/s of transformers' generate; {alone}; tau {tau:.2f}."
    )
    if counts.speed_up > tau:
        text += " More than tau is not the drafts: generate's own loop is slower than this engine."
    tone: Tone = "flat" if over_engine is None else "up" if over_engine > 1 else "down"
    yield tone, text
    if lookup is not None:
        total = lookup.total(name for name in lookup.suites if name not in measured.apart)
        tone, added = _added(measured)
        over = (
            f"{ratio:.2f}× {name}"
            for ratio, name in ((total.speed_up, "generate"), (total.speed_up_over_engine, "the engine without drafts"))
            if ratio is not None
        )
        yield tone, f"{measured.title}: look-up alone gives {' and '.join(over)}; {added}."
    if counts.identical is not None and counts.identical < counts.prompts:
        others, ties = counts.prompts - counts.identical, counts.ties or 0
        if ties < others:
            yield (
                "down",
                f"{others - ties} of {counts.prompts} texts{' of a chain of all heads' * (lookup is not None)} are not "
                "those of generate, and no tie explains it.",
            )


def _doubts(measured: Measured) -> Iterator[tuple[Tone, str]]:
    counts = measured.counts
    if counts.control is not None and counts.car[0] > 0.05 and counts.control.car[0] > COLLAPSED * counts.car[0]:
        yield (
            "down",
            f"{measured.title}: the control has not collapsed (CAR_1 {counts.car[0]:.3f}, and "
            f"{counts.control.car[0]:.3f} against targets moved by one position). Either the text repeats single "
            "tokens, or the numbers are wrong.",
        )
    if counts.trained:
        yield (
            "down",
            f"{measured.title}: the run was trained on {counts.trained} of {counts.prompts} prompts, on which "
            "acceptance is too high.",
        )


def drafts(count: int) -> str:
    """A number of drafts, in words."""
    return f"{count} draft" + ("s" if count != 1 else "")


def prompts_of(count: int) -> str:
    """A number of prompts, in words."""
    return f"{count} prompt" + ("s" if count != 1 else "")


def measured_on(acceptance: Acceptance, suites: list[str], drafting: str = "") -> str:
    """Suites, prompts, drafts and mode of a measurement, for each card that shows a number of it.

    Args:
        drafting: what drafted; by default a chain of all heads.
    """
    prompts = sum(acceptance.suites[name].prompts for name in suites)
    where = suites[0] if len(suites) == 1 else f"{len(suites)} suites"
    drafting = drafting or f"{drafts(acceptance.total().depth)} a round"
    return f"{acceptance.mode}, {where}, {prompts_of(prompts)}, {drafting}"
