"""The main head's own quality, and texts marked with what drafted each token."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from architectures import TOKENS, greedy_text, random_heads, tiny_trunk
from conftest import Learned

from mtpd.data.builtin_models import tiny_tokenizer
from mtpd.data.packing import Sample
from mtpd.data.prompts import Prompt
from mtpd.decode.chances import Chances
from mtpd.errors import UserError
from mtpd.evaluate.measure import Model
from mtpd.evaluate.offline import walk_offline
from mtpd.evaluate.suites import Question
from mtpd.evaluate.trunk_quality import last_number, negative_log_likelihood, right_answers, trunk_quality
from mtpd.report.samples import belong_to, read_samples, sample_texts, token_depths


def test_perplexity_is_that_of_the_whole_model(name: str) -> None:
    """Fault: prompt tokens or padding are counted, rows are one off, or padding rows of the vocabulary take part."""
    trunk = tiny_trunk(name)
    samples = [Sample.of(str(length), *greedy_text(name, length, 20)) for length in (1, 5, 9)]
    samples.append(Sample.of("none", [4, 5], []))
    loss, tokens = negative_log_likelihood(trunk, samples)
    expected = 0.0
    for sample in samples[:3]:
        ids = torch.tensor([sample.ids])
        with torch.no_grad():
            log_probabilities = trunk.model(ids).logits[0, :, :TOKENS].float().log_softmax(-1)
        for place in range(len(sample.prompt_ids), len(sample.ids)):
            expected -= log_probabilities[place - 1, sample.ids[place]].item()
    assert tokens == 60
    assert loss == pytest.approx(expected, rel=1e-4)
    quality = trunk_quality(trunk, tiny_tokenizer(), [], samples, samples, match=None)
    assert quality.perplexity == pytest.approx(math.exp(expected / 60), rel=1e-4)
    assert quality.score is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 7 and 9\n#### 1,200.50", 1200.5),
        ("It is 12.", 12.0),
        ("The answer is -3 degrees", -3.0),
        ("7.0 apples", 7.0),
        ("none", None),
    ],
)
def test_the_last_number_of_an_answer(text: str, number: float | None) -> None:
    """Fault: a comma, a full stop or a sign makes a right answer wrong."""
    assert last_number(text) == number


def test_right_answers_are_counted() -> None:
    """Fault: prompts without a reference count as wrong, or the number of the question is taken for the answer."""
    tokenizer = tiny_tokenizer()
    asked = [Question(Prompt(str(n), "What is 3 + 4?"), answer) for n, answer in enumerate(["#### 7", "#### 8", None])]
    samples = [Sample.of(q.prompt.id, [1], tokenizer.encode("It is 7", add_special_tokens=False)) for q in asked]
    assert right_answers(tokenizer, asked, samples) == (1, 2)
    quality = trunk_quality(tiny_trunk("llama"), tokenizer, asked, [], samples, match="number")
    assert quality.score == 0.5


@pytest.mark.parametrize("stage", ["untrained", "half", "perfect"])
def test_each_token_has_the_depth_that_drafted_it(learned: Learned, stage: str) -> None:
    """Fault: tokens coloured by another depth, or more of them than decoding accepts."""
    (measured,) = walk_offline(learned.trunk, getattr(learned, stage), [learned.sample], progress=False)
    depths = token_depths(measured)
    assert len(depths) == len(learned.sample.response_ids) == measured.counts.tokens
    # Each pass writes one token of the main head; that of the last one may lie past the end of the text.
    assert depths.count(0) in (measured.counts.forwards, measured.counts.forwards - 1)
    assert depths[0] == 0
    for before, after in pairwise(depths):
        assert after in (0, before + 1)
    if stage == "perfect":
        assert depths[1:9] == [1, 2, 3, 0, 1, 2, 3, 0]


def test_samples_hold_the_text(tmp_path: Path) -> None:
    """Fault: pieces that do not join to the text, as where a character is made of several tokens."""
    trunk, tokenizer = tiny_trunk("llama"), tiny_tokenizer()
    ids = [token for token in tokenizer.encode("é, 你好 🎉!", add_special_tokens=False) if token < TOKENS]
    plain = tokenizer.encode("A", add_special_tokens=False)
    samples = {
        "one": [Sample.of("a", plain, ids or plain), Sample.of("b", plain, plain * 3), Sample.of("c", plain, [])]
    }
    model = Model(trunk, tokenizer, "t", [])
    sample_texts(model, random_heads(trunk), samples, chances=Chances(), heads_fingerprint="h").save(
        tmp_path / "samples.json"
    )
    assert belong_to(tmp_path / "samples.json", "h")
    assert not belong_to(tmp_path / "samples.json", "others")
    texts = read_samples(tmp_path / "samples.json")
    assert [text.id for text in texts] == ["a", "b"]
    for text, sample in zip(texts, samples["one"], strict=False):
        assert "".join(text.pieces) == tokenizer.decode(sample.response_ids)
        assert text.sources is not None
        assert len(text.pieces) == len(text.depths) == len(text.sources) == len(sample.response_ids)
    assert read_samples(tmp_path / "missing.json") == []
    (tmp_path / "samples.json").write_text("{")
    with pytest.raises(UserError, match="not a file of sample texts"):
        read_samples(tmp_path / "samples.json")


def test_texts_are_drafted_by_heads_and_look_up(learned: Learned) -> None:
    """Fault: tokens of look-up that count as the heads', two texts with one id mixed up, or no end of text."""
    trunk, prompt, text = learned.trunk, learned.sample.prompt_ids, learned.sample.response_ids
    # What stands in the prompt can be looked up from its second token on, and only heads know the other text.
    samples = {"repeated": [Sample.of("0", prompt + text, text)], "new": [Sample.of("0", prompt, text[:12])]}
    model = Model(trunk, tiny_tokenizer(), "t", [])
    repeated, new = sample_texts(model, learned.perfect, samples, chances=Chances(), heads_fingerprint="h").texts
    assert (len(repeated.pieces), len(new.pieces)) == (len(text), 12)
    for found in (repeated, new):
        assert found.sources is not None
        for source, (before, depth) in zip(found.sources, pairwise([0, *found.depths]), strict=True):
            assert depth in (0, before + 1)
            assert (source is None) == (depth == 0)
    assert "lookup" in (repeated.sources or [])
    # Look-up goes deeper than three heads can.
    assert max(repeated.depths) > learned.perfect.depth
    assert set(new.sources or []) == {None, "heads"}
    ended = Model(trunk, tiny_tokenizer(), "t", [text[8]])
    cut = sample_texts(ended, learned.perfect, {"new": samples["new"]}, chances=Chances(), heads_fingerprint="h").texts
    assert len(cut[0].pieces) == text.index(text[8]) + 1


def test_pieces_of_characters_with_several_tokens() -> None:
    """Fault: half characters are shown, or a token of one is lost."""
    from mtpd.report.samples import _pieces

    tokenizer = tiny_tokenizer()
    words = "é, 你好 🎉!"
    pieces = _pieces(tokenizer, tokenizer.encode(words, add_special_tokens=False))
    assert "".join(pieces) == words
    assert len(pieces) == len(words.encode())
    assert "\ufffd" not in "".join(pieces)
