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
from mtpd.data.prompts import Prompt
from mtpd.data.responses import end_tokens, generate_responses
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
    """Responses of another temperature, model or prompt list that are taken for this run's."""
    path = tmp_path / "r.jsonl"
    generate(loaded, path)
    for change in ({"temperature": 0.5}, {"trunk": "u"}, {"max_new_tokens": 5}, {"prompts": PROMPTS[:3]}):
        with pytest.raises(UserError, match=f"another {next(iter(change))}"):
            generate(loaded, path, **change)
    # The seed and top-p of greedy decoding change nothing.
    generate(loaded, path, seed=5, top_p=0.5)
    assert len(generate(loaded, path, max_new_tokens=5, fresh=True)[0].response_ids) == 5
    (tmp_path / "other.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(UserError, match="not a file of responses"):
        generate(loaded, tmp_path / "other.jsonl")


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
