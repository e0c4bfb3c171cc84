"""Slices: where rounds were and what prompts are, intervals of small slices, and the gate on the worst one."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtpd.cli import main
from mtpd.decode.counts import Counts
from mtpd.errors import UserError
from mtpd.evaluate.acceptance import Acceptance, PromptCounts, SuiteCounts
from mtpd.evaluate.compare import Asked, judged
from mtpd.evaluate.history import Past, read_history, sparkline, sparklines
from mtpd.evaluate.slices import FEW, Slice, along, check_axes, jackknife, slices, tau, template_mode
from mtpd.evaluate.worst import ERRORS, holm, judge_floor, judge_worst, slice_changes
from mtpd.report.history import render_history
from mtpd.report.slices import places_charts


def counted(prompt: int, accepted: list[int], *, depth: int = 2) -> Counts:
    """A text whose rounds accept so many drafts, with room for all."""
    counts = Counts(depth)
    counts.start(prompt)
    for number in accepted:
        counts.round(number, room=depth + 1)
    return counts


def rows(
    prompts: int, rate: float, seed: int, *, start: int = 0, late: float = 0.0, **fields: Any
) -> list[PromptCounts]:
    """Prompts of 60 to 90 rounds; behind 64 tokens of the response so much less is accepted."""
    easy = np.random.default_rng(start).normal(0.0, 0.08, prompts)
    generator = np.random.default_rng([seed, prompts, start])
    found = []
    for number in range(prompts):
        counts = Counts(2)
        counts.start(40 + 7 * (number % 9))
        for _ in range(60 + number % 31):
            share = np.clip(rate + easy[number] - (late if counts.tokens >= 64 else 0.0), 0.0, 1.0)
            first = generator.random() < share
            counts.round(int(first) + int(first and generator.random() < share), room=3)
        name = str(start + number)
        found.append(PromptCounts.of(counts, id=name, prompt=name, text="same", **fields))
    return found


def acceptance(suites: dict[str, list[PromptCounts]]) -> Acceptance:
    return Acceptance(
        mode="offline",
        trunk="t" * 64,
        heads="h" * 64,
        settings={"drafts": 2},
        suites={name: SuiteCounts.of(members, 2, settings={"limit": 80}) for name, members in suites.items()},
    )


def test_where_rounds_are() -> None:
    """Fault: a round is counted where it ends, at the wrong end of a bucket, or the prompt is left out."""
    counts = counted(120, [2, 0, 2, 2, 2, 1])
    # Tokens of the response before each round: 1, 4, 5, 8, 11, 14.
    assert counts.places == {"text": {0: [6, 5, 4]}, "context": {0: [3, 2, 2], 128: [3, 3, 2]}}
    long = counted(2000, [2] * 30)
    assert list(long.places["text"]) == [0, 16, 32, 64]
    assert [counts[0] for counts in long.places["text"].values()] == [5, 6, 10, 9]
    assert list(long.places["context"]) == [1024, 2048]


def test_rounds_that_do_not_count_have_no_place() -> None:
    """Fault: places add up to other counts than those that ratios are of."""
    counts = counted(10, [2, 1])
    counts.round(0, room=1)
    row = PromptCounts.of(counts, id="a", prompt="a")
    assert row.drafted == [2, 2]
    assert row.places is not None
    assert sum(each[0] for each in row.places["text"].values()) == 2
    with pytest.raises(ValueError, match="places: text does not add up"):
        PromptCounts.model_validate(row.model_dump() | {"places": {"text": {0: [3, 2, 1]}}})
    with pytest.raises(ValueError, match="places: "):
        PromptCounts.model_validate(row.model_dump() | {"places": {"where": {0: [2, 2, 1]}}})


def test_slices_of_positions_add_up_to_the_whole(tmp_path: Path) -> None:
    """Fault: rounds are lost or counted twice where small buckets are joined, or a file forgets its places."""
    found = acceptance({"one": rows(40, 0.5, 0), "two": rows(5, 0.5, 1, start=100)})
    found.save(tmp_path / "a.json")
    found = Acceptance.load(tmp_path / "a.json")
    for axis in ("suite", "family", "position", "context"):
        parts = slices(found, [axis])
        total = np.sum([part.counts.sum(axis=0) for part in parts], axis=0)
        assert total.tolist() == [found.total().drafted[0], *found.total().accepted]
        assert axis in ("suite", "family") or all(part.prompts >= FEW for part in parts)
    assert [part.name for part in slices(found, ["position"])][:3] == ["0-15", "16-31", "32-63"]
    assert slices(found, ["position"])[-1].name.endswith("+")
    assert slices(found, ["language", "mode"]) == []


def test_slices_of_what_prompts_are() -> None:
    """Fault: prompts of one family or language are mixed with others, or a mode is lost."""
    thinking = template_mode({"enable_thinking": True, "tools": [{}]})
    assert thinking == "enable_thinking=true, tools"
    assert template_mode({}) is None
    mixed = [
        *rows(12, 0.8, 0, family="code", mode=thinking),
        *rows(12, 0.3, 1, start=50, family="chat", language="de"),
    ]
    found = acceptance({"mine": mixed, "other": rows(12, 0.5, 2, start=90)})
    names = {axis: [(part.name, part.prompts) for part in slices(found, [axis])] for axis in ("family", "language")}
    assert names == {"family": [("code", 12), ("chat", 12), ("other", 12)], "language": [("de", 12)]}
    by_mode = {part.name: part.ratios()["tau"].value for part in slices(found, ["mode"])}
    assert list(by_mode) == [thinking, "plain"]
    assert by_mode[thinking] > 2 > by_mode["plain"]


def test_the_error_of_a_ratio_is_that_of_leaving_prompts_out() -> None:
    """Fault: an interval over rounds rather than prompts, or one that is narrower than repeating the measurement."""
    counts = np.array([[*row.drafted[:1], *row.accepted] for row in rows(30, 0.5, 0)], dtype=float)
    values = np.array([float(tau(np.delete(counts, index, axis=0).sum(axis=0))) for index in range(30)])
    found = jackknife(tau, counts)
    assert found.error == pytest.approx(np.sqrt(29 / 30 * ((values - values.mean()) ** 2).sum()))
    generator = np.random.default_rng(0)
    drawn = [float(tau(counts[generator.integers(30, size=30)].sum(axis=0))) for _ in range(2000)]
    assert found.error == pytest.approx(np.std(drawn), rel=0.1)
    interval = Slice("family", "a", counts).ratios()["tau"]
    assert interval.high is not None
    # Student's t, 29 degrees of freedom at most.
    assert 2.04 * found.error <= interval.high - interval.value < 2.2 * found.error
    assert Slice("family", "a", counts[:4]).ratios()["tau"].low is None


def test_intervals_of_small_slices_hold_the_truth() -> None:
    """Fault: intervals of a dozen prompts that miss the truth more often than 1 in 20, as percentiles do."""
    generator = np.random.default_rng(1)
    missed = 0
    for _ in range(400):
        shares = np.clip(generator.normal(0.5, 0.15, 10), 0.05, 0.95)
        rounds = generator.integers(20, 60, 10)
        counts = np.stack([rounds, generator.binomial(rounds, shares)], axis=1).astype(float)
        found = jackknife(tau, counts).estimate()
        assert found.low is not None
        assert found.high is not None
        missed += not found.low <= 1.5 <= found.high
    assert missed <= 34  # 20 are expected, and the chance of 35 is one in a thousand


def test_holms_rule() -> None:
    """Fault: each slice is tested by itself, or a step goes on behind the first that is not refused."""
    assert holm([0.001, 0.02, 0.02, 0.9], 0.05) == [0]
    assert holm([0.02, 0.001, 0.012, 0.9], 0.05) == [0, 1, 2]
    assert holm([], 0.05) == []
    assert holm([0.5], 0.05) == []


def test_a_slice_that_collapses_fails_though_the_whole_passes() -> None:
    """Fault: a loss in one family, or behind a position, is hidden by all the others."""
    good = {"big": rows(300, 0.5, 0, family="chat"), "small": rows(20, 0.6, 1, start=500, family="tools")}
    bad = {**good, "small": rows(20, 0.35, 2, start=500, family="tools")}
    asked = Asked(max_drop=0.03, max_drop_worst=0.05, by=("family",))
    found = judged(acceptance(good), acceptance(bad), asked)
    assert [verdict.outcome for verdict in found.verdicts] == ["passed", "failed"]
    assert re.search(r"gate on 2 slices failed: family tools tau 1\.\d+ → 1\.\d+, -\d", found.verdicts[1].line)
    assert [each.label for each in found.moved] == ["family tools"]
    late = {name: rows(len(each), 0.5, 3, start=int(each[0].id), late=0.3) for name, each in good.items()}
    worst = judge_worst(slice_changes(acceptance(good), acceptance(late), ("position",))[0], max_drop=0.05)
    assert worst.outcome == "failed"
    assert "position 64" in worst.line
    assert "position 0-15" not in worst.line


def test_slices_too_small_to_tell_are_named_and_do_not_pass() -> None:
    """Fault: a slice of a few prompts passes because nothing can be seen in it."""
    suites = {"big": rows(200, 0.5, 0), "tiny": rows(6, 0.5, 1, start=500), "few": rows(3, 0.5, 1, start=600)}
    same = acceptance(suites)
    verdict = judge_worst(slice_changes(same, same, ("suite",))[0], max_drop=0.05)
    assert (verdict.outcome, verdict.exit_code) == ("undecided", 4)
    assert "gate on 3 slices undecided: too small to tell; suite tiny" in verdict.line
    assert "on 6 prompts, 10 wanted" in verdict.line
    assert "suite few" in verdict.line
    assert "suite big" not in verdict.line
    large = {name: each for name, each in suites.items() if name == "big"}
    verdict = judge_worst(slice_changes(acceptance(large), acceptance(large), ("suite",))[0], max_drop=0.05)
    assert (verdict.outcome, verdict.exit_code) == ("passed", 0)
    # What cannot pass can still fail, if nothing is left of it.
    gone = acceptance({**suites, "tiny": rows(6, 0.0, 1, start=500)})
    verdict = judge_worst(slice_changes(same, gone, ("suite",))[0], max_drop=0.05)
    assert verdict.outcome == "failed"
    assert "suite tiny" in verdict.line
    assert "too small to tell: suite few" in verdict.line


def test_many_equal_slices_hardly_ever_fail() -> None:
    """Fault: among forty slices one is called worse by chance, or a slice that lost a tenth is not found."""
    generator = np.random.default_rng(0)
    false = right = 0
    for number in range(60):
        easy = generator.normal(0.5, 0.1, (40, 15, 1))
        rounds = np.full((40, 15, 1), 60)
        sides = [
            np.concatenate([rounds, generator.binomial(60, np.clip(easy - loss, 0, 1))], axis=2).astype(float)
            for loss in (0.0, 0.0)
        ]
        worse = sides[1].copy()
        worse[number % 40] = sides[1][number % 40] * [1, 0.6]
        for new in (sides[1], worse):
            changes = [
                jackknife(lambda a, b: tau(b) / tau(a) - 1.0, sides[0][index], new[index]) for index in range(40)
            ]
            from mtpd.evaluate.worst import p_value

            refused = holm([p_value(change, 0.0) for change in changes], ERRORS)
            if new is worse:
                right += number % 40 in refused
            else:
                false += bool(refused)
    assert false <= 2
    assert right >= 54


def test_prompts_that_were_trained_on_are_in_no_slice() -> None:
    """Fault: a candidate that learned a family by heart passes in it."""
    before, after = ({"one": rows(60, 0.5, seed)} for seed in (0, 1))
    for row in after["one"][:20]:
        row.trained = "exact"
    [change] = slice_changes(acceptance(before), acceptance(after), ("suite",))[0]
    assert change.prompts == 40


def without_places(content: Acceptance, schema: int = 3) -> Acceptance:
    """The file as an earlier release wrote it."""
    values = content.model_dump(mode="json", by_alias=True) | {"schema": schema}
    for suite in values["suites"].values():
        for row in suite["rows"]:
            for name in ("places", "family", "mode", "language"):
                del row[name]
    return Acceptance.model_validate(values)


def test_baselines_without_places_are_compared_as_a_whole_and_say_so() -> None:
    """Fault: an old baseline is refused, or its missing slices are silently left out."""
    new = acceptance({"one": rows(80, 0.5, 0, family="code"), "two": rows(80, 0.5, 0, start=200, family="chat")})
    old = without_places(new)
    assert old.schema_version == 3
    asked = Asked(max_drop=0.01, max_drop_worst=0.05)
    found = judged(old, new, asked, names=("old.json", "new.json"))
    assert [verdict.outcome for verdict in found.verdicts] == ["passed", "passed"]
    assert found.comparison is not None
    assert any(
        note.startswith("old.json: no counts by position") and "position and context cannot be compared" in note
        for note in found.comparison.notes
    )
    # What a prompt is is known from the new file, and the same prompts are not tested twice.
    assert [each.label for each in found.changes] == ["suite one", "suite two"]
    with pytest.raises(UserError, match="no counts by position"):
        slices(old, ["position"])
    with pytest.raises(UserError, match="--by: neither file has such slices"):
        judged(old, new, Asked(max_drop_worst=0.05, by=("position",)))


def test_a_floor_without_a_baseline() -> None:
    """Fault: a first release passes however low its tau is, or a slice below the floor is hidden."""
    found = acceptance({"good": rows(80, 0.6, 0), "bad": rows(20, 0.2, 1, start=200)})
    for floor, axes, outcome, code in (
        (1.3, (), "passed", 0),
        (2.2, (), "failed", 3),
        (1.5, ("suite",), "failed", 3),
        (1.01, ("suite",), "passed", 0),
    ):
        verdict = judge_floor(found, floor, axes)
        assert (verdict.outcome, verdict.exit_code) == (outcome, code), verdict.line
    assert "suite bad tau" in judge_floor(found, 1.5, ("suite",)).line
    few = acceptance({"good": rows(30, 0.6, 0)})
    assert judge_floor(few, 1.3).outcome == "undecided"
    assert "the floor decides on 50 prompts or more" in judge_floor(few, 1.3).line
    for floor in (1.0, float("nan"), -2.0):
        with pytest.raises(UserError, match="--min-tau: "):
            judge_floor(found, floor)


def test_axes() -> None:
    """Fault: a mistyped axis shows nothing."""
    assert check_axes(None) == ()
    assert check_axes("mode, position,mode") == ("mode", "position")
    for text in ("depth", "", ","):
        with pytest.raises(UserError, match="--by: .* is not accepted; accepted: suite, family"):
            check_axes(text)
    pair = [("one", row) for row in rows(12, 0.5, 0)]
    assert list(along("suite", [pair, pair])) == ["one"]


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: an exit code that CI does not see, or outputs that do not name the slice."""
    good = {"big": rows(300, 0.5, 0), "small": rows(20, 0.6, 1, start=500)}
    bad = {**good, "small": rows(20, 0.35, 2, start=500)}
    files = []
    for name, suites in (("good", good), ("bad", bad)):
        acceptance(suites).save(tmp_path / f"{name}.json")
        files.append(str(tmp_path / f"{name}.json"))
    out = ["--markdown", str(tmp_path / "out.md"), "--junit", str(tmp_path / "out.xml")]
    words = ["compare", *files, "--max-drop", "0.03", "--max-drop-worst", "0.05", "--by", "suite,position", *out]
    assert main(words) == 3
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.startswith("gate on"))
    assert "suite small" in line
    page = (tmp_path / "out.md").read_text()
    assert f"❌ **{line}**" in page
    assert re.search(r"Slices that moved:\n\n.*\n.*\n\| suite small \| 20 \| 1\.\d+ → 1\.\d+, -", page)
    root = ET.parse(tmp_path / "out.xml").getroot()
    cases = {case.get("name"): case for case in root}
    assert {"max-drop 0.03", "max-drop-worst 0.05"} <= cases.keys()
    assert cases["max-drop 0.03"].find("failure") is None
    assert cases["max-drop-worst 0.05"].find("failure") is not None
    assert main(["compare", files[0], files[0], "--max-drop-worst", "0.05", "--by", "suite"]) == 0
    assert main(["compare", *files, "--by", "suite"]) == 0
    for words, message in (
        (["--max-drop-worst", "2"], "--max-drop-worst: 2.0 is not accepted"),
        (["--by", "depth"], "--by: depth is not accepted; accepted: suite"),
    ):
        capsys.readouterr()
        assert main(["compare", *files, *words]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert message in said


def test_results_over_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: results in the wrong order, one of another mode among them, or a chart without its points."""
    assert sparkline([1.0, 2.0, 1.5]) == "▁█▅ 1.00 → 1.50"
    assert sparkline([1.0, 1.0]) == "▄▄ 1.00 → 1.00"
    folder = tmp_path / "past"
    folder.mkdir()
    for month, rate in ((1, 0.3), (3, 0.5), (2, 0.4)):
        acceptance({"one": rows(12, rate, 0), "two": rows(12, rate, 0, start=50)}).save(
            folder / f"2026-0{month}-01.json"
        )
    past = read_history(folder)
    assert [each.name[:7] for each in past] == ["2026-01", "2026-02", "2026-03"]
    now = acceptance({"one": rows(12, 0.6, 0), "three": rows(12, 0.6, 0, start=90)})
    other = Past("x", past[0].acceptance.model_copy(update={"mode": "decoded"}))
    drawn = sparklines([*past, other], now)
    assert list(drawn) == ["one"]
    assert re.fullmatch(r"▁\S\S█ \d\.\d\d → \d\.\d\d", drawn["one"])
    assert set(sparklines(past, past[0].acceptance)) == {None, "one", "two"}
    assert main(["history", str(folder)]) == 0
    page = (folder / "history.html").read_text()
    assert "<script" not in page
    charts = [ET.fromstring(chart) for chart in re.findall(r"<svg viewBox=\"0 0 420.*?</svg>", page, re.DOTALL)]
    assert len(charts) == 4  # tau, CAR, and tau of both suites
    line = charts[0].find(".//polyline")
    assert line is not None
    heights = [float(point.split(",")[1]) for point in str(line.get("points")).split()]
    assert heights == sorted(heights, reverse=True)
    assert charts[0].find(".//polygon[@class='dot band']") is not None
    assert len(charts[1].findall(".//polyline")) == 2
    assert f"{past[0].acceptance.total().tau:.3f}" in page
    # The page that is there now is no acceptance file, and is not read as one.
    assert main(["history", str(folder), "-o", str(tmp_path / "again.html")]) == 0
    capsys.readouterr()
    for where, message in ((tmp_path / "none", "no such folder"), (tmp_path, "holds no acceptance file")):
        assert main(["history", str(where)]) == 2
        assert message in capsys.readouterr().err
    (folder / "notes.json").write_text(json.dumps({"a": 1}))
    assert main(["history", str(folder)]) == 2
    assert "notes.json: not an acceptance file" in capsys.readouterr().err


def test_history_of_files_with_other_suites_and_modes() -> None:
    """Fault: a total over other suites than before looks like a change."""
    first = acceptance({"one": rows(12, 0.3, 0), "two": rows(12, 0.9, 0, start=50)})
    second = acceptance({"one": rows(12, 0.3, 0)})
    third = second.model_copy(update={"mode": "decoded"})
    page = render_history("mine", [Past("a", first), Past("b", second), Past("c", third)])
    assert "Not in every file, and so not in these numbers: two." in page
    assert page.count(f"<b>{second.total().tau:.3f}</b>") == 3
    assert page.count("<h2>") == 2


def test_charts_of_positions() -> None:
    """Fault: a chart of positions without bands or with the labels of others, or one for files that have none."""
    found = acceptance({"one": rows(40, 0.5, 0)})
    charts = places_charts(found)
    assert [title for title, _, _ in charts] == ["CAR by position in the response", "CAR by position in the context"]
    drawing = ET.fromstring(charts[0][2])
    assert len(drawing.findall(".//polygon[@class='dot band']")) == 2
    labels = [text.text for text in drawing.findall(".//text")]
    names = [part.name for part in slices(found, ["position"])]
    assert set(names) <= set(labels)
    assert places_charts(without_places(found)) == []
