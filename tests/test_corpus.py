"""The index of responses: what it finds, what it does where it is damaged or of another tokenizer, and its size."""

from __future__ import annotations

import logging
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Learned
from safetensors.numpy import load_file, save_file

from mtpd.data.packing import Sample, pack, response_texts
from mtpd.decode.chances import REACH, Chances
from mtpd.decode.choice import Greedy
from mtpd.decode.corpus import BETWEEN, CORPUS_FILE, SIZES, build_corpus, read_corpus, write_corpus
from mtpd.decode.engine import Engine
from mtpd.decode.planner import Costs, Planner
from mtpd.decode.text import Request
from mtpd.evaluate.chances import count_chances
from mtpd.evaluate.drafters import measure_drafters


def tokenizer(*words: str) -> Any:
    return SimpleNamespace(get_vocab=lambda: {word: place for place, word in enumerate(words)})


def test_the_most_frequent_continuation_is_found() -> None:
    """Fault: a continuation of another run, of another text, or one that was seen less often."""
    draw = random.Random(1)
    texts = [[draw.randrange(5) for _ in range(draw.randrange(1, 30))] for _ in range(40)]
    corpus = build_corpus(texts, megabytes=1)
    for _ in range(300):
        end = [draw.randrange(5) for _ in range(4)]
        following: Counter[int] = Counter()
        for size in SIZES:
            for text in texts:
                for start in range(len(text) - size):
                    if text[start : start + size] == end[-size:]:
                        following[text[start + size]] += 1
            if following:
                break
        found = corpus.matches(end, 6)
        assert bool(found) == bool(following)
        if found:
            [match] = found
            assert match.length == size
            assert following[match.tokens[0]] == max(following.values()) == match.agree
            assert BETWEEN not in match.tokens
            whole = [*end[-size:], *match.tokens]
            assert any(text[s : s + len(whole)] == whole for text in texts for s in range(len(text)))


def test_a_size_is_kept_to(tmp_path: Path) -> None:
    """Fault: an index that grows past the disk that it was given."""
    draw = random.Random(2)
    texts = [[draw.randrange(40_000) for _ in range(100)] for _ in range(600)]
    write_corpus(tmp_path, build_corpus(texts, megabytes=1), tokenizer("a"))
    assert 0.8e6 < (tmp_path / CORPUS_FILE).stat().st_size <= 1.01e6
    assert not build_corpus([], megabytes=1).matches([1, 2, 3, 4], 2)


@pytest.mark.parametrize("fault", ["cut", "changed", "another tokenizer"])
def test_decoding_goes_on_without_it(tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str) -> None:
    """Fault: a damaged file that ends decoding, or is read as if it were whole."""
    write_corpus(tmp_path, build_corpus([[1, 2, 3, 4]], megabytes=1), tokenizer("a", "b"))
    file = tmp_path / CORPUS_FILE
    assert read_corpus(tmp_path, tokenizer("a", "b")) is not None
    if fault == "cut":
        file.write_bytes(file.read_bytes()[:-3])
    if fault == "changed":
        arrays = load_file(file)
        arrays["tokens"][0] += 1
        save_file(arrays, file, {"sha256": "0", "tokenizer": "0"})
    with caplog.at_level(logging.WARNING):
        assert read_corpus(tmp_path, tokenizer("a", "c" if fault == "another tokenizer" else "b")) is None
    [record] = caplog.records
    assert str(file) in record.getMessage()
    assert "\n" not in record.getMessage()


def test_drafts_of_the_corpus_are_counted_as_such(learned: Learned) -> None:
    """Fault: a source that changes the text, or whose drafts are counted for another."""
    prompt, response = learned.sample.prompt_ids, learned.sample.response_ids
    corpus = build_corpus([learned.sample.ids], megabytes=1)
    table = count_chances(learned.trunk, learned.half, [learned.sample], corpus=corpus, progress=False)
    assert all(right == drafted for right, drafted in table.corpus.values())
    written = []
    for plan in (None, Planner(table, Costs({1: 1.0, 64: 1.0}, 0.0), ("corpus",), corpus=corpus)):
        engine = Engine(
            learned.trunk, None, slots=1, capacity=len(prompt) + len(response), choice=Greedy(), planner=plan
        )
        written += list(engine.run([Request(prompt, len(response))]))
    plain, drafted = written
    assert drafted.tokens == plain.tokens
    assert len(drafted.rounds) <= 1 + len(response) // REACH + 1
    assert set(drafted.sources) == {"corpus"}
    counts = drafted.counts(0)
    assert sum(counts.sources["corpus"]) == sum(source is not None for source, _ in drafted.drafted_by())


def test_drafters_along_known_text_are_those_of_decoding(learned: Learned) -> None:
    """Fault: a walk whose rounds are not those of the engine, with the same drafts and the same counts."""
    prompt, response = learned.sample.prompt_ids, learned.sample.response_ids
    found = measure_drafters(learned.trunk, learned.half, [learned.sample], Chances(), progress=False)
    [taus] = found.values()
    for name, sources in {"lookup": ("lookup",), "heads": ("heads",), "together": ("heads", "lookup")}.items():
        engine = Engine(
            learned.trunk,
            learned.half,
            slots=1,
            capacity=len(prompt) + len(response),
            planner=Planner(Chances(), None, sources, 16),  # type: ignore[arg-type]
        )
        [text] = engine.run([Request(prompt, len(response))])
        assert text.tokens == response
        counts = text.counts(0)
        assert (taus[name].tokens, taus[name].forwards) == (counts.tokens, counts.forwards)
        assert taus[name].sources == counts.sources
    assert taus["together"].forwards <= min(taus["lookup"].forwards, taus["heads"].forwards)


def test_a_walk_does_not_depend_on_the_other_texts(learned: Learned) -> None:
    """Fault: a count of a prompt that changes with what is measured beside it."""
    sample = learned.sample
    short = Sample.of("short", sample.prompt_ids, sample.response_ids[:9])
    alone = measure_drafters(learned.trunk, learned.half, [sample], Chances(), progress=False)
    both = measure_drafters(learned.trunk, learned.half, [short, sample], Chances(), progress=False)
    assert both[sample.id] == alone[sample.id]
    assert both["short"]["together"].tokens == 9
    ended = measure_drafters(
        learned.trunk, learned.half, [sample], Chances(), end_tokens=[sample.response_ids[4]], progress=False
    )
    first = sample.response_ids.index(sample.response_ids[4])
    assert ended[sample.id]["together"].tokens == first + 1


def test_responses_of_packed_rows() -> None:
    """Fault: prompts in the index, or two responses that are one text."""
    samples = [Sample.of(str(n), [1, 2], [10 * n, 10 * n + 1, 10 * n + 2]) for n in range(1, 5)]
    assert sorted(response_texts(pack(samples, row_length=16))) == sorted(sample.response_ids for sample in samples)
