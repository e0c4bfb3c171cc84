"""Parts of the report without a run: the verdict, and the picture of CAR by depth."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from mtpd.evaluate.acceptance import RANDOM, Acceptance, DrafterCounts, PromptCounts, SuiteCounts
from mtpd.evaluate.depths import Depth, Depths
from mtpd.evaluate.gate import compare
from mtpd.evaluate.intervals import intervals
from mtpd.evaluate.run_tables import decoded_table
from mtpd.report import svg
from mtpd.report.car import write_car
from mtpd.report.drafting import accepted_from, as_used, ordinal, way_lines
from mtpd.report.verdict import Measured, verdict


def acceptance(accepted: float, *, prompts: int = 20, names: tuple[str, ...] = ("chat", "code"), **fields: object):
    """Two suites whose prompts have 100 drafts each, of which so large a share is accepted at depth 1."""
    suites = {}
    for name in names:
        rows = [
            PromptCounts(
                id=str(n),
                prompt=str(n),
                drafted=[100, 100],
                accepted=[int(100 * accepted) + n % 3, int(30 * accepted)],
                tokens=200,
                forwards=100,
                **fields,
            )
            for n in range(prompts)
        ]
        suites[name] = SuiteCounts.of(rows, 2)
    mode = "decoded" if fields else "offline"
    return Acceptance(mode=mode, trunk="t", heads=str(accepted), settings={}, suites=suites)


def measured(after: Acceptance, before: Acceptance | None = None, *, title: str = "Held-out prompts") -> Measured:
    comparison = None if before is None else compare(before, after)
    return Measured(
        title, after, after.total(), intervals(after)[None], comparison, "before training" if before else ""
    )


@pytest.mark.parametrize(
    ("before", "after", "tone", "said"),
    [
        (0.2, 0.4, "up", "Training made the drafts better: tau 1.269 → 1.530 on 40 prompts, +20"),
        (0.4, 0.2, "down", "Training made the drafts worse: tau 1.530 → 1.269 on 40 prompts, -1"),
        (0.3, 0.3, "flat", "Training gained nothing that so many prompts can show"),
    ],
)
def test_the_headline(before: float, after: float, tone: str, said: str) -> None:
    """Fault: training that made the drafts worse, or changed nothing, is called a gain."""
    found = verdict([measured(acceptance(after), acceptance(before))], [], None)
    assert found.tone == tone
    assert found.headline.startswith(said)


def test_the_headline_without_intervals() -> None:
    """Fault: a change on two prompts is called a gain, or a random model's numbers pass for a result."""
    few = measured(acceptance(0.5, prompts=1), acceptance(0.1, prompts=1))
    assert "too few for an interval" in verdict([few], [], None).headline
    random = acceptance(0.5).model_copy(update={"random_trunk": True})
    assert ("down", RANDOM) in verdict([measured(random)], [], None).lines


@pytest.mark.parametrize(
    ("engine", "tone", "said"),
    [
        (1.5, "up", "1.50× the tokens/s of the same engine without drafts"),
        (0.8, "down", "0.80× the tokens/s of the same engine without drafts"),
        (None, "flat", "the engine without drafts was not timed"),
    ],
)
def test_what_is_said_of_speed(engine: float | None, tone: str, said: str) -> None:
    """Fault: the loop of generate is counted as a gain of the drafts, or drafts that cost time are praised."""
    decoded = acceptance(0.4, seconds=1.0, plain_seconds=2.5, engine_seconds=engine, identical=True, tie=False)
    [(found, line)] = verdict([measured(acceptance(0.4))], [measured(decoded)], None).lines
    assert found == tone
    assert said in line
    assert "2.50× the tokens/s of transformers' generate" in line
    assert "More than tau is not the drafts" in line
    slow = acceptance(0.4, seconds=1.0, plain_seconds=1.2, engine_seconds=1.1, identical=False, tie=False)
    lines = verdict([], [measured(slow)], None).lines
    assert "More than tau" not in lines[0][1]
    assert lines[1] == ("down", "40 of 40 texts are not those of generate, and no tie explains it.")


def with_drafters(found: Acceptance, *, lookup: int, together: int, longer: int = 0) -> Acceptance:
    """Drafters that take so many forward passes, and decoded as many seconds, for the 200 tokens of a prompt.

    Args:
        longer: tokens by which the text of both together is longer, as after a tie.
    """
    suites = {}
    for name, suite in found.suites.items():
        rows = []
        for number, row in enumerate(suite.rows or []):
            drafters = {}
            for drafter, forwards in (("lookup", lookup), ("heads", 150), ("together", together)):
                passes = forwards + 2 * (number % 3)
                drafters[drafter] = DrafterCounts(
                    nodes=16 if found.mode == "offline" else None,
                    tokens=200 + (longer if drafter == "together" else 0),
                    forwards=passes,
                    seconds=None if found.mode == "offline" else passes / 100,
                    sources={"heads": [60, 20], "lookup": [10, 5, 5]} if drafter == "together" else {},
                )
            rows.append(row.model_copy(update={"drafters": drafters}))
        suites[name] = SuiteCounts.of(rows, suite.depth)
    return found.model_copy(update={"suites": suites})


@pytest.mark.parametrize(
    ("together", "prompts", "tone", "said"),
    [
        (80, 20, "up", "the heads add to it: tau +24.4% [+24."),
        (100, 20, "down", "the heads add nothing to it that so many prompts can show (tau +0.0% ["),
        (120, 20, "down", "the heads add nothing to it, they cost: tau -16."),
        (80, 1, "flat", "the heads add to it (tau +25.0%; too few prompts for an interval)"),
        (100, 1, "flat", "the heads add nothing to it (tau +0.0%; too few prompts for an interval)"),
    ],
)
def test_what_the_heads_add_to_look_up(together: int, prompts: int, tone: str, said: str) -> None:
    """Fault: heads that add nothing to what costs nothing are praised for what look-up gives."""
    found = with_drafters(acceptance(0.4, prompts=prompts), lookup=100, together=together)
    [(given, line)] = verdict([measured(found)], [], None).lines
    assert given == tone
    assert said in line
    assert f"up to 16 drafts a round: tau {intervals(found)[None]['tau_together'].text()} on " in line
    assert f"Look-up alone, which costs no training, gives {intervals(found)[None]['tau_lookup'].text()};" in line


def test_a_third_source_is_named() -> None:
    """Fault: what the responses that were trained on give is praised as the heads' own."""
    found = with_drafters(acceptance(0.4), lookup=100, together=80)
    for suite in found.suites.values():
        for part in (suite, *(suite.rows or [])):
            assert part.drafters is not None
            part.drafters["together"].sources["corpus"] = [3]
    [(_, line)] = verdict([measured(found)], [], None).lines
    assert "the heads and the trained responses add to it: tau +" in line


@pytest.mark.parametrize("longer", [0, 20])
def test_speed_is_that_of_heads_and_look_up_together(longer: int) -> None:
    """Fault: the speed of a chain that nobody uses, or cards and tables that differ where texts part at a tie."""
    timed = {"seconds": 9.0, "plain_seconds": 2.0, "engine_seconds": 1.5, "identical": True, "tie": False}
    found = with_drafters(acceptance(0.4, **timed), lookup=100, together=80, longer=longer)
    used = as_used(found)
    assert used is not None
    ratios = intervals(used)[None]
    lines = way_lines(found.total())
    assert [line.used for line in lines] == [False] * 4 + [True]
    assert lines[-1].over_generate == pytest.approx(ratios["speed_up"].value)
    assert lines[-1].over_engine == pytest.approx(ratios["speed_up_over_engine"].value)
    assert ratios["speed_up"].low is not None
    # As on the terminal.
    table = decoded_table(found)
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == [line.name for line in lines]
    assert cells[2] == [f"{line.over_generate:.2f}x" for line in lines]
    assert cells[4] == ["", *(f"{line.over_before:.2f}x" for line in lines[1:])]
    decoded = Measured("Decoded", found, used.total(), ratios, None, "")
    [(_, first), (tone, second)] = verdict([], [decoded], None).lines
    assert f"{lines[-1].over_generate:.2f}× the tokens/s of transformers' generate" in first
    assert f"tau {ratios['tau_together'].value:.2f}." in first
    assert f"look-up alone gives {lines[2].over_generate:.2f}× generate and {lines[2].over_engine:.2f}×" in second
    added = lines[-1].tokens_per_second / lines[2].tokens_per_second - 1
    assert (tone, f"the heads add to it: tokens/s {100 * added:+.1f}% [" in second) == ("up", True)
    assert as_used(acceptance(0.4, **timed)) is None
    assert as_used(with_drafters(acceptance(0.4), lookup=100, together=80)) is None


def test_shares_of_accepted_drafts() -> None:
    """Fault: shares that do not add up, by source or by depth."""
    counts = DrafterCounts(tokens=1, forwards=1, sources={"heads": [60, 20], "lookup": [15, 5]})
    assert accepted_from(counts, "heads") == (0.8, [0.6, 0.2])
    assert accepted_from(counts, "lookup") == (0.2, [0.15, 0.05])
    assert accepted_from(DrafterCounts(tokens=1, forwards=1), "heads") is None
    assert [ordinal(n) for n in (1, 2, 3, 4, 11, 22, 113)] == ["1st", "2nd", "3rd", "4th", "11th", "22nd", "113th"]


def test_what_is_said_of_depths() -> None:
    """Fault: drafts are recommended on a machine where none are faster."""
    rates = [Depth(depth=k, tokens_per_second=rate, round_ms=1, draft_ms=0) for k, rate in enumerate((50.0, 40.0))]
    found = Depths(prompts=2, max_new_tokens=8, dtype="float32", plain_tokens_per_second=45.0, depths=rates)
    assert verdict([measured(acceptance(0.4))], [], found).lines == [
        ("down", "No number of drafts is faster than none (2 prompts).")
    ]


def test_the_picture_of_car(tmp_path: Path) -> None:
    """Fault: a picture without the run's name, with lines that only colour tells apart, or half of it empty."""
    run = 'a "run" <script>&'
    sides = {"before training": acceptance(0.1), "after training": acceptance(0.2)}
    write_car(tmp_path / "car.svg", run, sides)
    space = "{http://www.w3.org/2000/svg}"
    root = ET.parse(tmp_path / "car.svg").getroot()
    texts = [text.text or "" for text in root.iter(f"{space}text")]
    assert f"{run}: CAR by depth" in texts
    assert not list(root.iter(f"{space}script"))
    assert {"all: tau 1.14 → 1.27", "chat: tau 1.14 → 1.27"} <= set(texts)
    lines = [line.get("stroke-dasharray") for line in root.iter(f"{space}polyline")]
    assert lines == ["5 4", None] * 3
    # The highest tick is the first round number above the highest value.
    assert "0.25" in texts
    assert not {"0.5", "1"} & {text for text in texts if text != "1"}
    assert list(root.iter(f"{space}polygon"))
    assert list(root.iter(f"{space}circle"))


def test_styles_differ_without_colour() -> None:
    """Fault: two of sixteen depths that look the same, also in colour."""
    looks = [svg.swatch(style) for style in range(16)]
    assert len(set(looks)) == 16
    grey = [look.partition('class="s')[2][1:] for look in looks[:5]]
    assert len(set(grey)) == 5
