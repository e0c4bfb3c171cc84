"""Responses by a server: what fails for a while is asked again, what came is kept, and answers are the trunk's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_ranks
from stand_in import StandIn

from mtpd.data import responses
from mtpd.data.answers import server as module
from mtpd.data.answers.server import Server
from mtpd.data.answers.task import Task
from mtpd.data.models import load_model
from mtpd.data.packing import Sample
from mtpd.data.responses import Others, end_tokens, generate_responses
from mtpd.data.rows.prompt import Prompt
from mtpd.errors import MtpdError, UserError
from mtpd.parallel import ranks

PROMPTS = [Prompt(f"p{n}", "abcdefghijklmnop"[: 3 + 2 * (n % 5)] + str(n)) for n in range(24)]
SETTINGS: dict[str, Any] = {"trunk": "t", "max_new_tokens": 12, "max_length": 1024, "progress": False}


@pytest.fixture(scope="module")
def loaded() -> Any:
    return load_model("tiny", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def own(loaded: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """What the model answers itself."""
    return generate_responses(*loaded, PROMPTS, tmp_path_factory.mktemp("own") / "r.jsonl", **SETTINGS)


@pytest.fixture
def stand_in(own: list[Sample], monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    for name, value in {"PAUSE": 0.01, "READ": 0.4, "TRIES": 4}.items():
        monkeypatch.setattr(module, name, value)
    for name in module.KEYS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(responses, "FLUSH_SECONDS", 0.0)
    server = StandIn({tuple(sample.prompt_ids): sample.response_ids for sample in own})
    yield server
    server.close()


def server_of(loaded: Any, url: str, temperature: float = 0.0) -> Server:
    model, tokenizer = loaded
    return Server(
        url,
        tokenizer,
        model="mine",
        ends=end_tokens(model, tokenizer),
        tokens=int(model.config.vocab_size),
        temperature=temperature,
        top_p=1.0,
        max_new_tokens=12,
        at_a_time=4,
    )


def ask(loaded: Any, url: str, path: Path) -> list[Sample]:
    with closing(server_of(loaded, url)) as server:
        return generate_responses(*loaded, PROMPTS, path, others=Others(server, url), **SETTINGS)


@pytest.mark.parametrize("fault", ["429", "500", "503", "half", "no json", "no choice", "timeout"])
def test_what_fails_for_a_while_is_asked_again(
    loaded: Any, own: list[Sample], stand_in: StandIn, tmp_path: Path, fault: str
) -> None:
    """Fault: a server that is busy, or an answer that breaks off, ends hours of work or leaves a prompt out."""
    stand_in.faults = [fault, fault]
    assert ask(loaded, stand_in.url + "/v1", tmp_path / "r.jsonl") == own
    assert len(stand_in.asked) == len(PROMPTS) + 2
    body = stand_in.bodies[-1]
    assert (body["model"], body["temperature"], body["repetition_penalty"], body["top_k"]) == ("mine", 0.0, 1.0, -1)
    assert body["stop_token_ids"] == end_tokens(*loaded)


def test_a_server_that_dies_is_gone_on_with(loaded: Any, own: list[Sample], stand_in: StandIn, tmp_path: Path) -> None:
    """Fault: what a server had answered before it died is lost, or asked for again from the next."""
    stand_in.dies_after = 19
    path = tmp_path / "r.jsonl"
    with pytest.raises(MtpdError, match="4 times; what was answered is kept"):
        ask(loaded, stand_in.url, path)
    kept = [json.loads(line)["id"] for line in path.read_text().splitlines()[1:]]
    assert len(kept) == len(stand_in.served) >= 19
    again = StandIn(stand_in.answers)
    try:
        assert ask(loaded, again.url, path) == own
    finally:
        again.close()
    assert not set(stand_in.served) & set(again.asked)
    assert len(again.asked) == len(PROMPTS) - len(kept)


def test_prompts_that_a_server_refuses_are_left_out(
    loaded: Any, own: list[Sample], stand_in: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Fault: one prompt that is too long for the server ends the run, or a server that refuses all is asked on."""
    stand_in.faults = ["400", "400"]
    found = ask(loaded, stand_in.url, tmp_path / "r.jsonl")
    assert len(found) == len(PROMPTS) - 2
    assert all(sample in own for sample in found)
    assert "status 400" in caplog.text
    assert "maximum context length" in caplog.text
    assert "2 of 24 prompts have no response in it; they are left out" in caplog.text
    stand_in.faults = ["400"] * 99
    with pytest.raises(UserError, match="status 400"):
        ask(loaded, stand_in.url, tmp_path / "all.jsonl")
    assert len(stand_in.faults) > 99 - len(PROMPTS)


def test_ranks_share_a_server(loaded: Any, own: list[Sample], stand_in: StandIn, tmp_path: Path) -> None:
    """Fault: each rank asks for all prompts, or an answer that one rank got is lost to the others."""
    ended = in_ranks(ask_as_rank, loaded, stand_in.url, tmp_path / "r.jsonl")
    assert ended.codes == [0, 0], ended.errors
    assert ended.values == [[[sample.id, sample.ids] for sample in own]] * 2
    assert sorted(stand_in.asked) == sorted(tuple(sample.prompt_ids) for sample in own)


def ask_as_rank(loaded: Any, url: str, path: Path) -> list[Any]:
    with ranks.joined(torch.device("cpu")), closing(server_of(loaded, url)) as server:
        found = generate_responses(*loaded, PROMPTS, path, together=True, others=Others(server, url), **SETTINGS)
        return [[sample.id, sample.ids] for sample in found]


def test_no_server(loaded: Any, stand_in: StandIn, tmp_path: Path) -> None:
    """Fault: a wrong address is asked for minutes, or ends in a traceback."""
    stand_in.close()
    with pytest.raises(MtpdError, match=r"data.responses: http://127.0.0.1:\d+: .*, 3 times"):
        ask(loaded, stand_in.url, tmp_path / "r.jsonl")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("wrong prompt", "the server read other tokens than it was asked with"),
        ("wrong ids", "it has tokens that the model has not; accepted: 0 to"),
    ],
)
def test_wrong_answers_are_refused(loaded: Any, stand_in: StandIn, tmp_path: Path, fault: str, message: str) -> None:
    """Fault: a server with another tokenizer is believed."""
    stand_in.faults = [fault] * 50
    with pytest.raises(UserError, match=message):
        ask(loaded, stand_in.url, tmp_path / "r.jsonl")
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 1


def test_another_model_is_found_out(loaded: Any, stand_in: StandIn, tmp_path: Path) -> None:
    """Fault: heads are trained on the text of another model, or such text stays in the file of responses."""
    stand_in.answers = {prompt: [(token + 1) % 250 for token in ids] for prompt, ids in stand_in.answers.items()}
    with pytest.raises(UserError, match=r"not the responses of this model at data.temperature 0: \d+\.\d% of"):
        ask(loaded, stand_in.url, tmp_path / "r.jsonl")
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 1
    assert len(stand_in.asked) < len(PROMPTS) + 8


def test_a_key_is_sent_and_never_written(
    loaded: Any, stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: a key that is not sent, or that a file of the run shows."""
    stand_in.key = "sk-very-secret"
    with pytest.raises(UserError, match="it wants a key; accepted: one in the environment variable MTPD_API_KEY"):
        ask(loaded, stand_in.url, tmp_path / "r.jsonl")
    monkeypatch.setenv("MTPD_API_KEY", "sk-very-secret")
    ask(loaded, stand_in.url, tmp_path / "r.jsonl")
    assert not any("secret" in path.read_text() for path in tmp_path.iterdir())


def test_a_server_that_returns_text_alone(loaded: Any, stand_in: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    """Fault: text is taken for exact tokens without a word, or its end is lost; a server that knows less is refused."""
    _, tokenizer = loaded
    tasks = [Task(prompt, [1, 2, 3 + number]) for number, prompt in enumerate(PROMPTS[:3])]
    words = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("one answer", "a two", "cut off here")]
    expected = [[*words[0], 257], [*words[1], 257], words[2][:12]]
    stand_in.answers = {tuple(task.ids): ids for task, ids in zip(tasks, expected, strict=True)}
    stand_in.refuses = {"return_token_ids"}
    stand_in.texts = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
    with closing(server_of(loaded, stand_in.url)) as server:
        found = {task.prompt.id: ids for task, ids in server(tasks)}
    assert [found[task.prompt.id] for task in tasks] == expected
    assert caplog.text.count("returns no token ids: its text is tokenised here") == 1
    assert "return_token_ids" not in stand_in.bodies[-1]


def test_a_server_that_takes_text_alone(loaded: Any, stand_in: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    """Fault: a server without token ids in its interface is asked with what it does not understand."""
    _, tokenizer = loaded
    stand_in.refuses_ids = True
    stand_in.texts = lambda ids: "fine"
    stand_in.answers = {"<|im_start|>hi": [1]}
    task = Task(PROMPTS[0], tokenizer("<|im_start|>hi", add_special_tokens=False)["input_ids"])
    with closing(server_of(loaded, stand_in.url)) as server:
        ((_, ids),) = server([task])
    assert tokenizer.decode(ids) == "fine<|im_end|>"
    assert "takes no token ids: it tokenises the text of the prompts itself" in caplog.text
