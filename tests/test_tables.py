"""What tables say beside their numbers: which baseline, which intervals, and whether the model is random."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import tiny_trunk
from conftest import learn
from rich.console import Console
from test_intervals import acceptance, rows

from mtpd.data.models import load_model
from mtpd.evaluate.acceptance import RANDOM, Acceptance, DrafterCounts
from mtpd.evaluate.depths import Depth, Depths, depths_pay_table
from mtpd.evaluate.gate import compare
from mtpd.evaluate.intervals import intervals
from mtpd.evaluate.outputs import junit, markdown
from mtpd.evaluate.run_tables import decoded_table, offline_table
from mtpd.evaluate.run_tables import drafters_table as run_drafters_table
from mtpd.evaluate.tables import comparison_table, depths_table, drafters_table, suites_table
from mtpd.evaluate.trunk_quality import at_chance
from mtpd.trunk import Trunk


def printed(table: Any) -> str:
    """A table on a terminal wide enough for each row to take one line."""
    console = Console(width=400)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def measured(prompts: int = 60, **changes: Any) -> Acceptance:
    return acceptance(one=[row.model_copy(update=changes) for row in rows(prompts, 0)])


def test_a_speed_up_stands_beside_both_baselines() -> None:
    """Fault: a speed-up over generate, which can lie above tau, is the only one that is printed."""
    found = measured()
    total = found.total()
    estimates = intervals(found)[None]
    table = printed(suites_table(found, intervals(found)))
    for column, ratio in (("over generate", "speed_up"), ("over engine", "speed_up_over_engine")):
        assert f"speed-up {column}" in table
        assert estimates[ratio].text(2) in table
    table = printed(decoded_table(found))
    for speed_up in (total.speed_up, total.speed_up_over_engine):
        assert f"{speed_up:.2f}x" in table
    assert total.engine_seconds is not None
    assert f"{total.tokens / total.engine_seconds:.1f}" in table
    for text in (markdown(found, intervals(found)), junit(found, intervals(found), seconds=1.0)):
        assert "speed-up over generate" in text
        assert "speed-up over engine without drafts" in text
    changes = printed(comparison_table(compare(found, found)))
    assert "speed-up over generate" in changes
    assert "speed-up over engine without drafts" in changes


def test_an_older_file_says_that_the_engine_was_not_timed() -> None:
    """Fault: a file without the engine's seconds shows a speed-up of 0, or one of the other baseline in its place."""
    old = measured(engine_seconds=None)
    for table, row in ((suites_table(old, intervals(old)), "│ one"), (decoded_table(old), "│ a chain")):
        line = next(line for line in printed(table).splitlines() if row in line)
        assert "–" in line
        assert "0.00" not in line
    assert "engine" not in printed(comparison_table(compare(old, old)))


def test_depths_have_both_baselines() -> None:
    """Fault: the table of depths shows a speed-up of drafting where the engine alone is faster than generate."""
    timed = [Depth(depth=k, tokens_per_second=rate, round_ms=1, draft_ms=k) for k, rate in enumerate((30.0, 36.0))]
    found = Depths(prompts=2, max_new_tokens=8, dtype="float32", plain_tokens_per_second=20.0, depths=timed)
    table = printed(depths_pay_table(found))
    assert "speed-up over generate" in table
    assert "speed-up over no drafts" in table
    assert [cell in table for cell in ("1.80x", "1.20x", "1.50x", "1.00x")] == [True] * 4


@pytest.mark.parametrize(("prompts", "said"), [((60, 60), "(95%"), ((60, 2), "where there are 5"), ((2, 2), None)])
def test_titles_promise_the_intervals_that_are_there(prompts: tuple[int, int], said: str | None) -> None:
    """Fault: a title that says 95% intervals over a table that has none."""
    found = acceptance(one=rows(prompts[0], 0), two=rows(prompts[1], 1, name="q"))
    if said is None:
        found = acceptance(one=rows(2, 0), two=rows(2, 1, name="q"))
    estimates = intervals(found)
    titles = [printed(suites_table(found, estimates)).splitlines()[0], markdown(found, estimates)]
    change = printed(comparison_table(compare(found, found))).splitlines()[0]
    if said is None:
        assert "interval" not in "".join(titles)
        assert "interval" not in change
    else:
        assert all(said in title for title in titles)
        assert ("where" in titles[0]) == (min(prompts) < 5)
        assert "95% intervals, paired" in change


def test_tables_of_a_random_model_say_so() -> None:
    """Fault: tables of the smoke run, whose numbers mean nothing, look like those of a model."""
    found = measured()
    assert not found.random_trunk
    for random in (False, True):
        found.random_trunk = random
        tables = [
            suites_table(found, intervals(found)),
            depths_table(found, intervals(found)),
            offline_table(found, found),
            decoded_table(found),
        ]
        assert all((RANDOM in " ".join(printed(table).split())) == random for table in tables)
        assert (RANDOM in markdown(found, intervals(found))) == random
        assert (RANDOM in compare(found, found).notes) == random


def test_which_models_are_random() -> None:
    """Fault: the sign of a random model is its name, or a model that has learned something is called random."""
    model, tokenizer = load_model("tiny")
    texts = ("Name three rivers.", "What is 2 + 2?")
    assert at_chance(Trunk(model), [tokenizer(text)["input_ids"] for text in texts])
    learned = learn("llama")
    assert at_chance(tiny_trunk("llama"), [learned.sample.prompt_ids * 4])
    # Its own greedy text stands for text that a model has learned.
    assert not at_chance(learned.trunk, [learned.sample.response_ids])
    assert not at_chance(learned.trunk, [])
    assert not at_chance(learned.trunk, [[1]])
    assert torch.is_grad_enabled()


def test_the_decoded_table_fits_into_a_log() -> None:
    """Fault: cells of a table with both baselines are broken over two lines where the output is a file."""
    found = acceptance(**{"builtin-other": rows(12, 0)})
    for suite in found.suites.values():
        suite.identical, suite.ties = 9, 3
        suite.drafters = {
            name: DrafterCounts(tokens=100, forwards=40, seconds=seconds)
            for name, seconds in (("together", 1.0), ("heads", 2.0), ("lookup", 4.0))
        }
    console = Console(width=132)
    with console.capture() as captured:
        console.print(decoded_table(found))
    lines = [line for line in captured.get().splitlines() if line.startswith("│")]
    assert [line.split("│")[1].strip() for line in lines] == [
        "transformers' generate",
        "this engine, no drafts",
        "look-up alone",
        "heads alone",
        "heads and look-up together",
    ]
    assert [line.split("│")[5].strip() for line in lines[-2:]] == ["2.00x", "2.00x"]
    assert "9/12, 3 ties" in captured.get()


def test_what_the_drafters_have() -> None:
    """Fault: tau of a drafter that is not its tokens by its passes, or shares that are not of accepted drafts."""
    found = acceptance(one=rows(12, 0))
    for name, suite in found.suites.items():
        together = DrafterCounts(nodes=16, tokens=100, forwards=40, sources={"heads": [30, 15], "lookup": [10, 5]})
        each = {"together": together, "heads": together, "lookup": DrafterCounts(nodes=16, tokens=100, forwards=80)}
        found.suites[name] = suite.model_copy(update={"drafters": each})
    line = next(line for line in printed(run_drafters_table(found)).splitlines() if "│ all" in line)
    assert [cell.strip() for cell in line.split("│")[4:8]] == ["1.25", "2.50", "2.50", "heads 75%, lookup 25%"]
    table = printed(drafters_table(found, intervals(found)))
    assert "2.500" in table
    assert "heads 75%, lookup 25%" in table
