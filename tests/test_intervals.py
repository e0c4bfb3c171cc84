"""Intervals: against another implementation, their coverage, and what they do not depend on."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mtpd.evaluate.acceptance import Acceptance, PromptCounts, SuiteCounts
from mtpd.evaluate.intervals import intervals, paired_differences
from mtpd.formats.verify import interval

ROUNDS = 60


def rows(prompts: int, seed: int, rate: float = 0.5, name: str = "p") -> list[PromptCounts]:
    """Prompts of unequal length and ease."""
    generator = np.random.default_rng(seed)
    found = []
    for number in range(prompts):
        drafted = int(generator.integers(10, ROUNDS))
        share = generator.beta(8 * rate, 8 * (1 - rate))
        first = int(generator.binomial(drafted, share))
        second = int(generator.binomial(first, share))
        found.append(
            PromptCounts(
                id=f"{name}{number}",
                prompt="f",
                tokens=drafted + first + second,
                forwards=drafted,
                drafted=[drafted, drafted],
                accepted=[first, second],
                expected=[0.4 * drafted, 0.3 * drafted],
                expected_rows=[drafted, drafted],
                seconds=float(generator.uniform(1.0, 2.0)),
                plain_seconds=float(generator.uniform(2.0, 3.0)),
                engine_seconds=float(generator.uniform(1.5, 2.5)),
            )
        )
    return found


def acceptance(**suites: list[PromptCounts]) -> Acceptance:
    counts = {name: SuiteCounts.of(members, 2) for name, members in suites.items()}
    return Acceptance(mode="decoded", trunk="t", heads="h", suites=counts)


def test_intervals_are_those_of_scipy() -> None:
    """Fault: drafts are resampled instead of prompts, or a mean of ratios is taken for a ratio of sums."""
    members = rows(120, 0)
    found = intervals(acceptance(one=members))["one"]
    accepted, drafted = (np.array([getattr(row, name) for row in members]) for name in ("accepted", "drafted"))
    statistics = {
        "car_1": lambda index: accepted[index, 0].sum(-1) / drafted[index, 0].sum(-1),
        "ar_2": lambda index: accepted[index, 1].sum(-1) / accepted[index, 0].sum(-1),
        "tau": lambda index: 1 + (accepted[index].sum(-2) / drafted[index].sum(-2)).sum(-1),
    }
    for name, statistic in statistics.items():
        theirs = stats.bootstrap(
            (np.arange(len(members)),),
            lambda index, axis=-1, of=statistic: of(index),
            vectorized=True,
            n_resamples=9999,
            method="percentile",
            rng=np.random.default_rng(1),
        ).confidence_interval
        width = theirs.high - theirs.low
        assert found[name].low == pytest.approx(theirs.low, abs=0.05 * width)
        assert found[name].high == pytest.approx(theirs.high, abs=0.05 * width)
        assert found[name].value == pytest.approx(float(statistic(np.arange(len(members)))))


def test_intervals_hold_the_true_ratio() -> None:
    """Fault: intervals that are too narrow, as over drafts they would be."""
    truth = float(
        np.mean(
            [
                intervals(
                    acceptance(
                        one=rows(4000, 1),
                    ),
                    resamples=10,
                )["one"]["car_1"].value
            ]
        )
    )
    inside = 0
    for seed in range(200):
        found = intervals(acceptance(one=rows(80, 100 + seed)), resamples=400, seed=seed)["one"]["car_1"]
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= truth <= found.high
    assert 178 <= inside <= 199, f"{inside} of 200 intervals of 95% hold the true CAR_1"


def test_every_ratio_has_one() -> None:
    """Fault: a ratio that is printed without saying how sure it is."""
    found = intervals(acceptance(one=rows(60, 0), two=rows(60, 1, 0.8, "q")))
    names = {"car_1", "car_2", "ar_1", "ar_2", "tau", "expected_1", "expected_2"} | {"speed_up", "speed_up_over_engine"}
    for suite in ("one", "two", None):
        assert found[suite].keys() == names
        for name, estimate in found[suite].items():
            assert estimate.low is not None
            assert estimate.high is not None
            assert estimate.low <= estimate.value <= estimate.high, (suite, name)


def test_intervals_repeat_and_do_not_depend_on_other_suites() -> None:
    """Fault: the same file gives other intervals on the next call, or when a suite is added."""
    one, two = rows(60, 0), rows(60, 1, 0.8, "q")
    first = intervals(acceptance(one=one, two=two))
    assert intervals(acceptance(two=two, one=one))["one"] == first["one"]
    assert intervals(acceptance(one=one))["one"] == first["one"]
    assert intervals(acceptance(one=one), seed=1)["one"] != first["one"]
    assert intervals(acceptance(one=one, two=two), apart=["two"])[None]["tau"] == first["one"]["tau"]


def test_what_was_not_measured_has_no_estimate() -> None:
    """Fault: an offline file shows a speed-up, or a file of sums an interval."""
    offline = [
        row.model_copy(update={"seconds": 0.0, "plain_seconds": None, "engine_seconds": None}) for row in rows(60, 0)
    ]
    assert not {"speed_up", "speed_up_over_engine"} & intervals(acceptance(one=offline))["one"].keys()
    old = [row.model_copy(update={"engine_seconds": None}) for row in rows(60, 0)]
    found_old = intervals(acceptance(one=old))["one"]
    assert "speed_up" in found_old
    assert "speed_up_over_engine" not in found_old
    decoded = [row.model_copy(update={"expected": None, "expected_rows": None}) for row in rows(60, 0)]
    assert "expected_1" not in intervals(acceptance(one=decoded))["one"]
    sums = acceptance(one=rows(60, 0))
    sums.suites["one"].rows = None
    found = intervals(sums)[None]["tau"]
    assert (found.low, found.high) == (None, None)
    assert found.text() == f"{found.value:.3f}"


def test_suites_of_one_prompt() -> None:
    """Fault: an interval of width zero, because one prompt can only be drawn as itself."""
    suites = {f"suite{number}": rows(1, number) for number in range(12)}
    found = intervals(acceptance(**suites))
    assert found["suite3"]["tau"].low is None
    together = intervals(acceptance(one=[row.model_copy(update={"id": n}) for n, [row] in suites.items()]))["one"][
        "tau"
    ]
    total = found[None]["tau"]
    assert total.low is not None
    assert total.high is not None
    assert together.low is not None
    assert together.high is not None
    assert total.high - total.low == pytest.approx(together.high - together.low, rel=0.1)
    before, after = paired_differences(suites, suites)[None]
    assert len(before["tau"]) > 1
    assert np.array_equal(before["tau"], after["tau"])


def test_a_share_of_none_is_inside_of_its_own_interval() -> None:
    """Fault: an engine that accepts nothing, as mtpd does, is said to differ from it by rounding."""
    for count in range(1, 200):
        assert interval(0, count)[0] == 0.0
        assert interval(count, count)[1] == 1.0
        assert all(interval(k, count)[0] <= k / count <= interval(k, count)[1] for k in range(count + 1))
