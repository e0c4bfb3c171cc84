"""The gate: what it says of equal, better and worse heads, and what it refuses to compare."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtpd.cli import main
from mtpd.errors import UserError
from mtpd.evaluate.acceptance import Acceptance, DrafterCounts, PromptCounts, SuiteCounts
from mtpd.evaluate.gate import MINIMUM_PROMPTS, compare, judge
from mtpd.evaluate.intervals import intervals

ROUNDS = 150


def rows(prompts: int, rate: float, seed: int, *, spread: float = 0.1, start: int = 0) -> list[PromptCounts]:
    """Prompts that differ in how easy they are; the same ones for every rate and seed."""
    easy = np.random.default_rng(start).normal(0.0, spread, prompts)
    generator = np.random.default_rng([seed, prompts])
    found = []
    for number in range(prompts):
        share = float(np.clip(rate + easy[number], 0.02, 0.98))
        first = int(generator.binomial(ROUNDS, share))
        second = int(generator.binomial(first, share))
        found.append(
            PromptCounts(
                id=f"p{start + number}",
                prompt=f"f{start + number}",
                text="same",
                tokens=ROUNDS + first + second,
                forwards=ROUNDS + 1,
                drafted=[ROUNDS, ROUNDS],
                accepted=[first, second],
            )
        )
    return found


def acceptance(suites: dict[str, list[PromptCounts]], **changes: Any) -> Acceptance:
    values = {
        "mode": "offline",
        "trunk": "t" * 64,
        "heads": "h" * 64,
        "settings": {"dtype": "float32", "drafts": 2},
        "suites": {
            name: SuiteCounts.of(members, 2, settings={"source": "a.jsonl", "limit": 80, "max_new_tokens": 64})
            for name, members in suites.items()
        },
    }
    return Acceptance(**(values | changes))


def single(prompts: int, rate: float, seed: int = 0, **changes: Any) -> Acceptance:
    return acceptance({"one": rows(prompts, rate, seed)}, **changes)


def verdict(before: Acceptance, after: Acceptance, max_drop: float = 0.01) -> Any:
    return judge(compare(before, after, resamples=2000), max_drop=max_drop)


def test_what_the_gate_says() -> None:
    """Fault: worse heads pass, better ones fail, or noise is taken for a difference."""
    before = single(300, 0.5)
    for after, expected, code in (
        (single(300, 0.5), "passed", 0),
        (single(300, 0.6, 1), "passed", 0),
        (single(300, 0.45, 1), "failed", 3),
        (single(300, 0.488, 1), "undecided", 4),
    ):
        found = verdict(before, after)
        assert (found.outcome, found.exit_code) == (expected, code), found.line


def test_a_loss_at_later_depths_alone_fails() -> None:
    """Fault: only CAR_1 is looked at, while drafts of later depths are lost."""
    before, after = single(300, 0.5), single(300, 0.5)
    members = after.suites["one"].rows
    assert members is not None
    worse = [row.model_copy(update={"accepted": [row.accepted[0], row.accepted[1] // 2]}) for row in members]
    found = verdict(before, acceptance({"one": worse}))
    assert found.outcome == "failed"
    assert "CAR_1" in found.reasons[0]
    assert "+0.00 points" in found.reasons[0]


def test_undecided_says_how_many_prompts_it_takes() -> None:
    """Fault: an undecided gate that passes, or a number of prompts that would not decide."""
    for prompts in (60, 100):
        found = verdict(single(prompts, 0.5), single(prompts, 0.5, 1), max_drop=0.005)
        assert found.outcome == "undecided"
        assert found.more_prompts is not None
        assert f"gate undecided, {found.more_prompts} more prompts needed" in found.line
    # With that many more prompts on which the change is the same, it is decided.
    before, after = single(100, 0.5), single(100, 0.5, 1)
    copies = -(-(100 + found.more_prompts) // 100)
    many = [
        acceptance(
            {
                "one": [
                    row.model_copy(update={"id": f"{row.id}-{copy}"})
                    for copy in range(copies)
                    for row in each.suites["one"].rows or []
                ]
            }
        )
        for each in (before, after)
    ]
    assert verdict(*many, max_drop=0.005).outcome == "passed"


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8])
def test_few_prompts_never_decide(rate: float) -> None:
    """Fault: a green gate on a handful of prompts."""
    found = verdict(single(MINIMUM_PROMPTS - 1, 0.5), single(MINIMUM_PROMPTS - 1, rate, 1))
    assert (found.outcome, found.more_prompts) == ("undecided", 1)
    assert f"the gate decides on {MINIMUM_PROMPTS} prompts or more" in found.line
    assert verdict(single(MINIMUM_PROMPTS, 0.5), single(MINIMUM_PROMPTS, 0.5)).outcome == "passed"


def test_pairing_narrows_the_interval() -> None:
    """Fault: the two files are resampled apart, so that hard prompts in one and easy ones in the other look alike."""
    before = acceptance({"one": rows(200, 0.5, 0, spread=0.25)})
    after = acceptance({"one": rows(200, 0.5, 1, spread=0.25)})
    paired = compare(before, after).suites[None]["car_1"].change
    alone = [intervals(each)[None]["car_1"] for each in (before, after)]
    widths = [each.high - each.low for each in (paired, *alone)]  # type: ignore[operator]
    assert widths[0] < 0.5 * min(widths[1:])


def test_false_alarms_and_power() -> None:
    """Fault: equal heads fail by chance, or a true loss of two points is not found at 300 prompts."""
    generator = np.random.default_rng(0)
    outcomes: dict[float, list[str]] = {0.5: [], 0.48: []}
    for number in range(40):
        for rate, found in outcomes.items():
            before = acceptance({"one": rows(300, 0.5, int(generator.integers(2**31)), spread=0.12)})
            after = acceptance({"one": rows(300, rate, int(generator.integers(2**31)), spread=0.12)})
            found.append(judge(compare(before, after, resamples=500, seed=number), max_drop=0.0).outcome)
    assert outcomes[0.5].count("failed") <= 2
    assert outcomes[0.48].count("failed") >= 32


def changed(change: Callable[[Acceptance], Any]) -> Acceptance:
    other = single(80, 0.5)
    return change(other) or other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.model_copy(update={"trunk": "u" * 64}), "different trunks (tttttttttttt, uuuuuuuuuuuu)"),
        (lambda a: a.model_copy(update={"mode": "decoded"}), "different modes (offline, decoded)"),
        (lambda a: a.model_copy(update={"sampling": {"temperature": 1.0}}), "different sampling"),
        (lambda a: a.settings.update(drafts=1), "decoding settings differ: drafts is 2 and 1"),
        (lambda a: a.settings.update(dtype="bfloat16"), "dtype is float32 and bfloat16"),
        (lambda a: a.suites.update(two=a.suites["one"]), "different suites (one; one, two)"),
        (lambda a: a.suites["one"].settings.update(max_new_tokens=32), "max_new_tokens is 64 and 32"),
        (lambda a: a.suites["one"].rows.pop() and None, "suite one has other prompts (80 and 79, 79 in both)"),
        (lambda a: setattr(a.suites["one"].rows[0], "prompt", "other"), "other prompts (80 and 80, 79 in both)"),
        (lambda a: setattr(a.suites["one"], "rows", None), "has no counts by prompt"),
    ],
)
def test_what_must_not_be_compared(change: Callable[[Acceptance], Any], message: str) -> None:
    """Fault: a difference in the model, the prompts or the settings is taken for one in the heads."""
    with pytest.raises(UserError, match=re.escape(message)):
        compare(single(80, 0.5), changed(change), names=("a.json", "b.json"))


def test_prompts_that_were_trained_on_are_left_out() -> None:
    """Fault: a candidate that learned the suite by heart passes."""
    before, after = single(120, 0.5), single(120, 0.5, 1)
    for row in (after.suites["one"].rows or [])[:30]:
        row.trained = "near"
        row.accepted = [ROUNDS, ROUNDS]
    found = compare(before, after)
    assert (found.prompts[None], found.left_out) == (90, 30)
    assert abs(found.suites[None]["car_1"].change.value) < 0.02
    assert "30 prompts are left out" in found.notes[0]


def saved(folder: Path, name: str, content: Acceptance) -> str:
    content.save(folder / name)
    return str(folder / name)


def test_compare_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: an exit code that CI does not see, or outputs that contradict each other."""
    suites = {"chat": rows(150, 0.5, 0), "code": rows(150, 0.7, 0, start=1000)}
    worse = {"chat": rows(150, 0.4, 1), "code": rows(150, 0.6, 1, start=1000)}
    a, b = saved(tmp_path, "a.json", acceptance(suites)), saved(tmp_path, "b.json", acceptance(worse))
    assert main(["compare", a, b]) == 0
    assert "gate" not in capsys.readouterr().out
    files = ["--markdown", str(tmp_path / "out.md"), "--junit", str(tmp_path / "out.xml")]
    assert main(["compare", a, b, "--max-drop", "0.01", *files]) == 3
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.startswith("gate failed"))
    page = (tmp_path / "out.md").read_text()
    assert line in page
    assert "| chat | 150 |" in page
    root = ET.parse(tmp_path / "out.xml").getroot()
    assert {case.get("name") for case in root} == {"chat", "code", "all", "max-drop 0.01"}
    failure = root.find("testcase/failure")
    assert failure is not None
    assert failure.get("message") == line
    assert (root.get("tests"), root.get("failures"), root.get("errors")) == ("4", "1", "0")
    assert main(["compare", a, a, "--max-drop", "0.01", *files]) == 0
    assert ET.parse(tmp_path / "out.xml").getroot().get("failures") == "0"
    few = saved(tmp_path, "few.json", acceptance({"chat": rows(20, 0.5, 0)}))
    assert main(["compare", few, few, "--max-drop", "0.01", *files]) == 4
    assert ET.parse(tmp_path / "out.xml").getroot().get("errors") == "1"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"schema": 2, "mode": "offl', "not an acceptance file"),
        (b"", "not an acceptance file"),
        (None, "no such file"),
        ("nan", "not an acceptance file: suites.one.rows.0.expected.0: Input should be a finite number"),
        ("sum", "rows: accepted is not their sum"),
        ("empty", "holds no suite with a prompt in it"),
    ],
)
def test_bad_files(
    content: bytes | str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: a traceback, or a gate that passes on a file that holds nothing."""
    good = saved(tmp_path, "good.json", single(60, 0.5))
    bad = tmp_path / "bad.json"
    if isinstance(content, bytes):
        bad.write_bytes(content)
    elif content is not None:
        values = json.loads(Path(good).read_text())
        del values["sha256"]
        suite = values["suites"]["one"]
        if content == "nan":
            suite["rows"][0] |= {"expected": [float("nan"), 1.0], "expected_rows": [9, 9]}
        if content == "sum":
            suite["accepted"][0] -= 1
        if content == "empty":
            values["suites"] = {}
        bad.write_text(json.dumps(values))
    assert main(["compare", good, str(bad), "--max-drop", "0.01"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message in said


@pytest.mark.parametrize("drop", ["-0.1", "1", "nan"])
def test_a_max_drop_that_is_no_share(drop: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: `--max-drop 1`, meant as one percent, lets everything pass."""
    good = saved(tmp_path, "good.json", single(60, 0.5))
    assert main(["compare", good, good, f"--max-drop={drop}"]) == 2
    assert "--max-drop" in capsys.readouterr().err


def together(acceptance: Acceptance, factor: float, nodes: int = 16) -> Acceptance:
    """The same measurement, with a drafter that writes so many times the tokens of the chain in each pass."""
    suites = {}
    for name, suite in acceptance.suites.items():
        members = []
        for row in suite.rows or []:
            forwards = max(1, round(row.forwards / factor))
            each = DrafterCounts(nodes=nodes, tokens=row.tokens, forwards=forwards)
            members.append(row.model_copy(update={"drafters": {"lookup": each, "heads": each, "together": each}}))
        suites[name] = SuiteCounts.of(members, suite.depth, settings=suite.settings)
    return acceptance.model_copy(update={"suites": suites})


def test_heads_and_the_drafter_are_guarded_apart() -> None:
    """Fault: a drafter that got worse passes because the heads did not, or heads because the drafter did not."""
    before = single(300, 0.5)
    worse_heads = single(300, 0.45, 1)
    cases = (
        (together(before, 1.2), "passed", "failed", "failed"),
        (together(worse_heads, 2.0), "failed", "passed", "failed"),
        (together(before, 1.5), "passed", "passed", "passed"),
    )
    for after, heads, drafter, both in cases:
        comparison = compare(together(before, 1.5), after, resamples=2000)
        found = [judge(comparison, max_drop=0.01, guard=guard).outcome for guard in ("heads", "together", "both")]
        assert found == [heads, drafter, both]
        assert "tau with look-up" in judge(comparison, max_drop=0.01).line


def test_drafters_are_compared_with_as_many_drafts_only() -> None:
    """Fault: a tau of 16 drafts a round is compared with one of 8, or with none, and found better."""
    before = single(300, 0.5)
    for other in (before, together(before, 1.5, nodes=8)):
        comparison = compare(other, together(before, 1.5), resamples=200)
        assert "tau_together" not in comparison.suites[None]
        assert judge(comparison, max_drop=0.01).outcome == "passed"
        with pytest.raises(UserError, match="--guard: together is not accepted"):
            judge(comparison, max_drop=0.01, guard="together")
