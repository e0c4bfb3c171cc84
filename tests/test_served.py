"""Acceptance as a server has it: counts by prompt or by counters, and everything that makes them worth nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from stand_in import StandIn

from mtpd.data.answers import server as module
from mtpd.data.answers.task import Task
from mtpd.data.builtin_models import tiny_tokenizer
from mtpd.data.rows.prompt import Prompt
from mtpd.errors import MtpdError, UserError
from mtpd.evaluate import served
from mtpd.evaluate.acceptance import Acceptance, PromptCounts, SuiteCounts
from mtpd.evaluate.beside_offline import beside_offline
from mtpd.evaluate.engine_counters import EngineCounters
from mtpd.evaluate.load import Load
from mtpd.evaluate.served import Asked, DraftingServer, ask, load_of, suite_counts
from mtpd.evaluate.suites import Suite

TASKS = [Task(Prompt("a", "x"), [5, 6]), Task(Prompt("b", "y"), [7])]
ANSWERS: dict[Any, list[int]] = {(5, 6): [10, 11, 12, 13, 14, 15], (7,): [20, 21, 22]}
# The first text: 1 token, then rounds that write 2, 3 and 1 (of 2: the last draft lies behind the end).
ROUNDS: dict[Any, list[tuple[int, int]]] = {(5, 6): [(2, 1), (2, 2), (2, 1)], (7,): [(2, 0), (2, 0)]}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    for name, value in {"PAUSE": 0.01, "READ": 0.4, "TRIES": 2, "TRIES_AT_FIRST": 2}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(served, "SETTLED", 0.0)
    server = StandIn(ANSWERS)
    server.rounds = ROUNDS
    yield server
    server.close()


def opened(url: str, key: str = "--server") -> DraftingServer:
    return DraftingServer(
        url, tiny_tokenizer(), key=key, model="mine", ends=[2], tokens=99, max_new_tokens=6, at_a_time=4
    )


def suites() -> Asked:
    return {"mine": (Suite(title="mine", source="x.jsonl", max_new_tokens=6), TASKS)}


def measured(stand_in: StandIn, plain: StandIn | None = None, *, at_a_time: int = 2) -> Any:
    server = opened(stand_in.url)
    if stand_in.rounds is not None:
        server.server.further = server.counters().engine.request
    found = ask(server, suites(), concurrency=at_a_time, words="served", progress=False)
    other = None
    if plain is not None:
        other = ask(opened(plain.url, "--plain-server"), suites(), concurrency=2, words="plain", progress=False)
    return suite_counts(server, found, suites(), other)["mine"], load_of(found, other)


def test_rounds_are_counted_as_mtpd_counts(stand_in: StandIn) -> None:
    """Fault: rounds counted whose drafts lie behind the end of a text, so that a server differs from mtpd's count."""
    found, load = measured(stand_in)
    first, second = found.rows
    # Rounds begin with 1, 3 and 6 known tokens of 6: two have room for two drafts.
    assert (first.drafted, first.accepted) == ([2, 2], [2, 1])
    assert (first.tokens, first.forwards) == (6, 3)
    # 1 and 2 known tokens of 3: the second round has no room for two.
    assert (second.drafted, second.accepted) == ([1, 1], [0, 0])
    assert found.tau == pytest.approx(1 + 2 / 3 + 1 / 3)
    # The server's own count has all five rounds.
    assert (load.drafts, load.accepted, load.tokens) == (5, [3, 1], 9)
    assert load.tau == pytest.approx(1.8)


def test_counters_alone(stand_in: StandIn) -> None:
    """Fault: a server that does not tell of each answer is taken to accept nothing, or its users' requests counted."""
    stand_in.counted = False
    found, _ = measured(stand_in)
    assert found.rows is None
    assert (found.prompts, found.tokens, found.forwards) == (2, 9, 7)
    assert (found.drafted, found.accepted) == ([5, 5], [3, 1])
    stand_in.answers = {**ANSWERS, (7,): [20, 21, 22, 23]}
    server = opened(stand_in.url)
    asked = ask(server, suites(), concurrency=2, words="served", progress=False)
    asked.texts["mine"][TASKS[1].key].pop()
    with pytest.raises(MtpdError, match="wrote 10 tokens, and 9 of them for this measurement: it has other users"):
        suite_counts(server, asked, suites(), None)


def test_llama_cpp_with_one_draft(stand_in: StandIn) -> None:
    """Fault: llama.cpp's texts have other tokens than it wrote, or its timings are read as another prompt's."""
    stand_in.engine = "llamacpp"
    stand_in.rounds = {(5, 6): [(1, 1), (1, 0), (1, 1)], (7,): [(1, 0), (1, 0)]}
    for at_a_time in (1, 2):
        found, load = measured(stand_in, at_a_time=at_a_time)
        first, second = found.rows
        assert (first.tokens, first.forwards, first.drafted, first.accepted) == (6, 4, [3], [2])
        assert (second.tokens, second.forwards, second.drafted, second.accepted) == (3, 3, [2], [0])
        assert first.places is None
        assert (load.drafts, load.accepted) == (5, [2])
    [body] = [each for each in stand_in.bodies if each["prompt"] == [7]][:1]
    assert (body["return_tokens"], body["samplers"], body["n_predict"]) == (True, ["temperature", "top_p"], 6)


def test_llama_cpp_with_several_drafts(stand_in: StandIn) -> None:
    """Fault: sums over all depths are taken for the first, or drafts of a prompt given to the next one."""
    stand_in.engine = "llamacpp"
    found, _ = measured(stand_in, at_a_time=1)
    first, second = found.rows
    assert (first.drafted, first.accepted) == ([3, 3], [3, 1])
    assert (second.drafted, second.accepted) == ([2, 2], [0, 0])
    assert measured(stand_in)[0].rows is None
    stand_in.others = 1
    for at_a_time, words in ((1, "wrote 7 tokens, and 6 of them"), (2, "wrote 11 tokens, and 9 of them")):
        with pytest.raises(MtpdError, match=words):
            measured(stand_in, at_a_time=at_a_time)


def test_sglang_tells_of_each_answer(stand_in: StandIn) -> None:
    """Fault: SGLang's sum of verified drafts gets a number without the depths that it does not have."""
    stand_in.engine = "sglang"
    found, load = measured(stand_in)
    first, second = found.rows
    assert (first.drafted, first.accepted) == ([3, 3], [3, 1])
    assert (second.drafted, second.accepted) == ([2, 2], [0, 0])
    assert (load.drafts, load.accepted) == (5, [3, 1])
    stand_in.counted = False
    with pytest.raises(UserError, match="says how many drafts it verified, and not at which depth"):
        measured(stand_in)


def test_texts_are_compared_with_those_of_plain_decoding(stand_in: StandIn) -> None:
    """Fault: drafts that change the text are not seen."""
    plain = StandIn({**ANSWERS, (7,): [20, 21, 23]})
    plain.pages = {"/metrics": "vllm:generation_tokens_total 7.0\n"}
    try:
        found, load = measured(stand_in, plain)
    finally:
        plain.close()
    assert [row.identical for row in found.rows] == [True, False]
    assert load.plain_tokens == 9


@pytest.mark.parametrize(
    ("pages", "line"),
    [
        (
            {"/metrics": "vllm:generation_tokens_total 7.0\n"},
            "drafts nothing; accepted: a server that was started with",
        ),
        ({"/metrics": "llamacpp:tokens_predicted_total 7.0\n"}, "drafts nothing; accepted: .* --spec-type"),
        ({"/metrics": "process_start_time_seconds 7.0\n"}, "has no counters of drafts"),
        ({"/metrics": "<html>\n"}, "cannot be read"),
        ({}, "has no counters of drafts"),
    ],
)
def test_servers_that_say_nothing(stand_in: StandIn, pages: dict[str, str], line: str) -> None:
    """Fault: a server without drafts, or without counters, gets a number."""
    if not pages:
        stand_in.rounds = None
    stand_in.pages = pages
    with pytest.raises(UserError, match=line) as caught:
        measured(stand_in)
    assert str(caught.value).startswith(f"--server: {stand_in.url}")


def test_counters_of_several_engines_and_of_one_that_starts_again() -> None:
    """Fault: one engine of a server counts for all, or counters that fell give a number."""
    page = """# TYPE vllm:spec_decode_num_drafts counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 7.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 3.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 4.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="m",position="0"} 2.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 1.0
vllm:generation_tokens_total{engine="0",model_name="m"} 20.0
process_start_time_seconds 1.5e+09
"""
    later = EngineCounters.read(page, place="here")
    assert later == EngineCounters(10, [6, 1], 20, 1.5e9)
    assert later.engine.name == "vLLM"
    earlier = EngineCounters(4, [3, 1], 9, 1.5e9)
    assert later.since(earlier, place="here") == EngineCounters(6, [3, 0], 11, 1.5e9)
    for other in (EngineCounters(11, [6, 1], 20, 1.5e9), EngineCounters(4, [3, 1], 9, 1.4e9)):
        with pytest.raises(MtpdError, match="it started again while it was measured; nothing is written"):
            later.since(other, place="here")


def test_the_number_of_drafts_that_is_fastest() -> None:
    """Fault: the number of drafts that a server is told to make is not the fastest of what was measured."""
    load = Load(
        concurrency=8, tokens=220, seconds=2.0, drafts=100, accepted=[60, 40, 10], plain_tokens=200, plain_seconds=2.0
    )
    # A pass without drafts takes 0.01, one with three 2.1 / 110.
    assert load.speed_with(0) == pytest.approx(100.0)
    assert load.speed_with(3) == pytest.approx(110.0)
    by_hand = 1.6 / (0.01 + (2.1 / 110 - 0.01) / 3)
    assert load.speed_with(1) == pytest.approx(by_hand)
    speeds = [load.speed_with(k) or 0.0 for k in range(4)]
    assert max(range(4), key=lambda k: speeds[k]) == 2


def acceptance(mode: Any, hits: int, *, text: str = "t", depth: int = 2, prompts: int = 8) -> Acceptance:
    """Of ten rounds a prompt, so many whose first draft was accepted, and half of them with the second."""
    rows = [
        PromptCounts(
            id=f"p{n}",
            prompt=f"f{n}",
            text=f"{text}{n}",
            tokens=20,
            forwards=11,
            drafted=[10] * depth,
            accepted=[hits, hits // 2, 0][:depth],
        )
        for n in range(prompts)
    ]
    return Acceptance(mode=mode, trunk="t", heads="h", suites={"mine": SuiteCounts.of(rows, depth)})


def test_a_server_beside_what_was_measured_offline() -> None:
    """Fault: a server with another model, or that drafts further, is compared with these heads."""
    offline = acceptance("offline", 4)
    found = beside_offline(acceptance("served", 8), offline, place="here")
    assert found is not None
    assert (found.prompts, found.same) == (8, 8)
    assert [found.offline, found.served] == pytest.approx([1.6, 2.2])
    assert found.change.value == found.change.low == pytest.approx(0.6 / 1.6)
    assert "tau 1.600, served 2.200, +37.5% [+37.5, +37.5]; 8 of 8 texts are the same" in found.words
    with pytest.raises(UserError, match="none of its 8 texts is the model's: it serves another model"):
        beside_offline(acceptance("served", 6, text="u"), offline, place="here")
    few = beside_offline(acceptance("served", 6, text="u", prompts=7), offline, place="here")
    assert few is not None
    assert few.same == 0
    assert beside_offline(acceptance("served", 6, depth=3), offline, place="here") is None
    sums = acceptance("served", 6)
    sums.suites["mine"].rows = None
    assert beside_offline(sums, offline, place="here") is None
