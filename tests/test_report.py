"""Parts of the report without a run: the verdict, and the picture of CAR by depth."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from mtpd.evaluate.acceptance import RANDOM, Acceptance, PromptCounts, SuiteCounts
from mtpd.evaluate.depths import Depth, Depths
from mtpd.evaluate.gate import compare
from mtpd.evaluate.intervals import intervals
from mtpd.report import svg
from mtpd.report.car import write_car
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
