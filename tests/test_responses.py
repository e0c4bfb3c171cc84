"""Responses by the trunk: equal to plain generation, resumable, reproducible."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mtpd.data import responses
from mtpd.data.models import load_model
from mtpd.data.packing import Sample
from mtpd.data.rendering import render
from mtpd.data.responses import end_tokens, generate_responses
from mtpd.data.rows.prompt import Prompt
from mtpd.errors import MtpdError, UserError

PROMPTS = [Prompt(f"p{n}", "abcdefghijklmnop"[: 3 + 2 * (n % 5)] + str(n)) for n in range(7)]


@pytest.fixture(scope="module")
def loaded() -> Any:
    return load_model("tiny", dtype="float32", device="cpu")


def generate(loaded: Any, path: Path, **changes: Any) -> list[Sample]:
    settings: dict[str, Any] = {
        "trunk": "t", "max_new_tokens": 12, "batch": 3, "max_length": 1024, "progress": False, **changes
    }  # fmt: skip
    model, tokenizer = loaded
    return generate_responses(model, tokenizer, settings.pop("prompts", PROMPTS), path, **settings)


def test_greedy_responses_equal_plain_generation(loaded: Any, tmp_path: Path) -> None:
    """Padding that is attended to, or a cache of fixed size that changes what the model says."""
    model, tokenizer = loaded
    samples = generate(loaded, tmp_path / "r.jsonl")
    assert [sample.id for sample in samples] == [prompt.id for prompt in PROMPTS]
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        ids = tokenizer(prompt.prompt)["input_ids"]
        plain = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0].tolist()
        assert sample.ids == plain
        assert sample.prompt_ids == ids


class Killed(Exception):
    pass


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_interrupted_run_continues(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """Fault: resuming that repeats finished prompts, keeps a torn line, or draws other samples than one run would."""
    whole = generate(loaded, tmp_path / "whole.jsonl", temperature=temperature)
    append, calls = responses._append, []

    def killed(path: Path, lines: str) -> None:
        calls.append(lines.count("\n"))
        if len(calls) == 4:
            raise Killed
        append(path, lines)

    path = tmp_path / "killed.jsonl"
    monkeypatch.setattr(responses, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(responses, "_append", killed)
    with pytest.raises(Killed):
        generate(loaded, path, temperature=temperature)
    assert len(path.read_text().splitlines()) == 1 + 3
    # Lose the end of the last line as well: its prompt is then answered again.
    path.write_bytes(path.read_bytes()[:-5])
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert generate(loaded, path, temperature=temperature, batch=2) == whole
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers changed"
    assert calls == [1] * 4 + [1] * 5
    lines = [json.loads(line)["id"] for line in path.read_text().splitlines()[1:]]
    assert len(lines) == len(set(lines)) == len(PROMPTS)
    assert generate(loaded, path, temperature=temperature) == whole
    assert len(calls) == 9


def test_cores_share_the_prompts(loaded: Any, tmp_path: Path) -> None:
    """Fault: texts that depend on how many decode at a time, or a number of threads that is not given back."""
    alone = generate(loaded, tmp_path / "one.jsonl", temperature=1.0)
    torch.set_num_threads(2)
    try:
        assert generate(loaded, tmp_path / "two.jsonl", temperature=1.0, batch=5) == alone
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_other_settings_are_refused(loaded: Any, tmp_path: Path) -> None:
    """Fault: responses of another temperature or model are taken for this run's."""
    path = tmp_path / "r.jsonl"
    generate(loaded, path)
    for change in ({"temperature": 0.5}, {"trunk": "u"}):
        with pytest.raises(UserError, match=f"another {next(iter(change))}"):
            generate(loaded, path, **change)
    # The seed and top-p of greedy decoding change nothing.
    generate(loaded, path, seed=5, top_p=0.5)
    assert len(generate(loaded, path, max_new_tokens=5, fresh=True)[0].response_ids) == 5
    (tmp_path / "other.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(UserError, match="not a file of responses"):
        generate(loaded, tmp_path / "other.jsonl")


def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the prompts that the model is asked from now on."""
    ids: list[str] = []
    decode = responses.answers

    def answers(trunk: Any, tasks: Any, *args: Any, **options: Any) -> Any:
        ids.extend(task.prompt.id for task in tasks)
        return decode(trunk, tasks, *args, **options)

    monkeypatch.setattr(responses, "answers", answers)
    return ids


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_belong_to_their_prompts(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, temperature: float
) -> None:
    """Fault: one row on top, another limit or order asks the model again, or gives a prompt the answer of another."""
    path = tmp_path / "r.jsonl"
    first = generate(loaded, path, temperature=temperature)
    ids = asked(monkeypatch)
    # Ids that count rows move by one with a row on top.
    moved = [Prompt("p0", "new")] + [Prompt(f"p{n + 1}", prompt.prompt) for n, prompt in enumerate(PROMPTS)]
    changed = generate(loaded, path, temperature=temperature, prompts=moved, progress=True)
    assert ids == ["p0"]
    assert "7 of 8 prompts were answered before" in capsys.readouterr().err
    assert [sample.ids for sample in changed[1:]] == [sample.ids for sample in first]
    del ids[:]
    fewer = generate(loaded, path, temperature=temperature, prompts=PROMPTS[4:1:-1])
    assert [sample.ids for sample in fewer] == [sample.ids for sample in first[4:1:-1]]
    # The beginning of an answer is the shorter answer; a cut one says nothing about a longer one.
    short = generate(loaded, path, temperature=temperature, max_new_tokens=5)
    assert [sample.response_ids for sample in short] == [sample.response_ids[:5] for sample in first]
    assert not ids
    long = generate(loaded, path, temperature=temperature, max_new_tokens=14)
    assert ids == [prompt.id for prompt, sample in zip(PROMPTS, first, strict=True) if 257 not in sample.response_ids]
    assert [sample.response_ids[:12] for sample in long] == [sample.response_ids for sample in first]
    del ids[:]
    assert generate(loaded, path, temperature=temperature) == first
    assert not ids


def test_files_of_earlier_versions_are_read(loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: answers that took hours are asked for again after an update."""
    path = tmp_path / "r.jsonl"
    first = generate(loaded, path)
    lines = path.read_text().splitlines()
    settings = {**json.loads(lines[0])["settings"], "prompts": "0f3a", "max_new_tokens": 12}
    path.write_text("\n".join([json.dumps({"settings": settings}), *lines[1:]]) + "\n")
    ids = asked(monkeypatch)
    assert generate(loaded, path) == first
    assert not ids


def test_prompts_with_equal_tokens_are_asked_once(loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: the same question twice is answered twice, or one of the two is lost."""
    ids = asked(monkeypatch)
    samples = generate(loaded, tmp_path / "r.jsonl", prompts=[Prompt("a", "same"), Prompt("b", "same")])
    assert len(ids) == 1
    assert [sample.id for sample in samples] == ["a", "b"]
    assert samples[0].ids == samples[1].ids


def test_cut_responses_are_counted(loaded: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fault: training on responses without an end, and nobody says so; or a warning about text that has none."""
    generate(loaded, tmp_path / "text.jsonl")
    assert "without an end" not in caplog.text
    chat = [Prompt(f"c{n}", [{"role": "user", "content": str(n)}]) for n in range(4)]
    samples = generate(loaded, tmp_path / "chat.jsonl", prompts=chat, max_new_tokens=3)
    cut, total = responses.cut_responses(samples, [257, 258])
    assert (cut, total) == (sum(not {257, 258} & set(sample.response_ids) for sample in samples), 4)
    assert cut >= 2
    assert f"{cut} of 4 responses ({25 * cut}%) reached 3 tokens without an end" in caplog.text


def test_prompts_without_room_in_a_row_are_not_answered(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Fault: prompts that fill a row are answered, and packing throws the answers away."""
    ids = asked(monkeypatch)
    lengths = [len(loaded[1](prompt.prompt)["input_ids"]) for prompt in PROMPTS]
    samples = generate(loaded, tmp_path / "r.jsonl", row_length=max(lengths))
    fitting = [prompt.id for prompt, length in zip(PROMPTS, lengths, strict=True) if length < max(lengths)]
    assert [sample.id for sample in samples] == fitting
    assert sorted(ids) == fitting
    assert f"{7 - len(fitting)} of 7 prompts leave no room for a response in a row" in caplog.text
    with pytest.raises(UserError, match="7 of 7 prompts leave no room"):
        generate(loaded, tmp_path / "none.jsonl", row_length=2)


def conversation(*turns: str) -> Prompt:
    later = tuple([{"role": "user", "content": turn}] for turn in turns[1:])
    return Prompt("-".join(turns), [{"role": "user", "content": turns[0]}], later=later)


def test_each_turn_is_answered_after_the_answers_before(loaded: Any, tmp_path: Path) -> None:
    """Fault: only the first turn is answered, a turn does not see the trunk's answers, or turns are lone documents."""
    model, tokenizer = loaded
    prompts = [conversation("hi", "and?", "why?"), conversation("one")]
    talk, one = generate(loaded, tmp_path / "r.jsonl", prompts=prompts)
    ids: list[int] = list(render(tokenizer, prompts[0]))
    mask = [False] * len(ids)
    for said in ("and?", "why?", None):
        whole = model.generate(
            torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=end_tokens(model, tokenizer)
        )
        answer = whole[0, len(ids) :].tolist()
        mask += [True] * len(answer)
        ids += answer
        if said is not None:
            ended = "" if answer[-1] == 257 else "<|im_end|>"
            text = f"{ended}\n<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n"
            further = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += further
            mask += [False] * len(further)
    assert talk.ids == ids
    assert talk.response_mask == mask
    assert one.prompt_ids == list(render(tokenizer, prompts[1]))


def test_a_killed_conversation_goes_on_with_its_next_turn(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: a kill in the second turn loses the first, or turns of before are answered again."""
    prompts = [conversation("hi", "and?"), conversation("ho", "so?")]
    whole = generate(loaded, tmp_path / "whole.jsonl", prompts=prompts)
    append, calls = responses._append, []

    def killed(path: Path, lines: str) -> None:
        calls.append(lines)
        if len(calls) == 4:
            raise Killed
        append(path, lines)

    monkeypatch.setattr(responses, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(responses, "_append", killed)
    with pytest.raises(Killed):
        generate(loaded, tmp_path / "r.jsonl", prompts=prompts)
    assert generate(loaded, tmp_path / "r.jsonl", prompts=prompts) == whole
    assert len(calls) == 4 + 1


def test_seeds_and_temperature_are_heard(loaded: Any, tmp_path: Path) -> None:
    """Sampling that ignores its seed, or that top-k of the library's defaults cuts."""
    first, same, other = (
        generate(loaded, tmp_path / f"{n}.jsonl", temperature=1.0, seed=seed) for n, seed in enumerate((1, 1, 2))
    )
    assert first == same != other
    cold = generate(loaded, tmp_path / "cold.jsonl", temperature=1.0, top_p=1e-6)
    assert cold == generate(loaded, tmp_path / "greedy.jsonl")


def test_settings_of_the_checkpoint_are_left_out(loaded: Any, tmp_path: Path) -> None:
    """A repetition penalty from generation_config.json makes the responses another model's."""
    model, _ = loaded
    plain = generate(loaded, tmp_path / "plain.jsonl")
    before = model.generation_config
    try:
        model.generation_config = type(before)(repetition_penalty=5.0, top_k=1, eos_token_id=257, pad_token_id=258)
        assert generate(loaded, tmp_path / "penalty.jsonl") == plain
        assert model.generation_config.repetition_penalty == 5.0
    finally:
        model.generation_config = before


def test_responses_end_at_the_first_end_token(tmp_path: Path) -> None:
    """Padding equals the end token for many models; cutting at padding then loses the end token or keeps padding."""
    loaded = model, tokenizer = load_model("tiny", dtype="float32", device="cpu")
    plain = generate(loaded, tmp_path / "plain.jsonl")
    end = plain[0].response_ids[4]
    model.generation_config.eos_token_id = [end, 257]
    tokenizer.pad_token_id = end
    assert end_tokens(model, tokenizer) == [end, 257]
    for short, long in zip(generate(loaded, tmp_path / "short.jsonl"), plain, strict=True):
        answer = long.response_ids
        assert short.response_ids == answer[: answer.index(end) + 1 if end in answer else None]


def test_long_prompts_are_left_out(loaded: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A prompt past the context crashes, or is answered at positions that the model never saw."""
    samples = generate(loaded, tmp_path / "r.jsonl", max_length=20)
    assert [sample.id for sample in samples] == ["p0", "p1", "p2", "p5", "p6"]
    assert "2 of 7 prompts" in caplog.text
    with pytest.raises(UserError, match="7 of 7 prompts are longer than the context"):
        generate(loaded, tmp_path / "none.jsonl", max_length=13)
    with pytest.raises(UserError, match="no prompts"):
        generate(loaded, tmp_path / "none.jsonl", prompts=[])
    with pytest.raises(UserError, match="the id p0"):
        generate(loaded, tmp_path / "twice.jsonl", prompts=[PROMPTS[0], PROMPTS[0]])


def test_empty_responses_are_an_error(tmp_path: Path) -> None:
    """Fault: a model that ends at once leaves nothing to train on, and nobody says so."""
    loaded = model, _ = load_model("tiny", dtype="float32", device="cpu")
    model.generation_config.eos_token_id = list(range(model.config.vocab_size))
    with pytest.raises(MtpdError, match="every response is empty"):
        generate(loaded, tmp_path / "r.jsonl")
