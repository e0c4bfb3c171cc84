"""`Model.generate` is `generate` of transformers: same texts, types, processors, criteria and streamers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import greedy_text, random_heads, random_tokens
from conftest import Learned
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from mtpd.data.models import load_model
from mtpd.decode.chances import Chances
from mtpd.decode.drafting import HEADS, SOURCES, Drafting
from mtpd.decode.engine import Engine
from mtpd.decode.model import Model
from mtpd.decode.planner import Costs, Planner
from mtpd.decode.text import Request
from mtpd.errors import UserError
from mtpd.trunk import Trunk

pytestmark = pytest.mark.usefixtures("free_drafts")


def batch() -> tuple[Tensor, Tensor]:
    """Three prompts of several lengths, padded on the left."""
    ids = random_tokens(3, 9)
    mask = torch.ones_like(ids)
    for row, start in enumerate((4, 0, 1)):
        ids[row, :start], mask[row, :start] = 0, 0
    return ids, mask


def both(trunk: Trunk, **settings: Any) -> tuple[Any, Any]:
    """What this package and what transformers returns; each gets processors and criteria of its own."""
    ids, mask = batch()
    results = []
    depth = settings.pop("depth", None)
    for model in (Model(trunk, random_heads(trunk), drafting=Drafting(depth=depth)), trunk.model):
        given = {key: value() if callable(value) else value for key, value in settings.items()}
        arguments: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, **given}
        generate: Any = model.generate
        results.append(generate(ids, attention_mask=mask, **arguments))
    return results[0], results[1]


def test_left_padding(name: str, trunk: Trunk) -> None:
    """Fault: padding that is attended to, counted as a position, or lost from what is returned."""
    ours, theirs = both(trunk)
    assert torch.equal(ours, theirs)


class Momentum(LogitsProcessor):
    """Keeps a state: favours tokens the more often it has been called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        return scores + (torch.arange(scores.shape[1]) % 7) * (input_ids.shape[1] % 3)


class SumIsRound(StoppingCriteria):
    """Ends a text when the sum of its tokens is divisible by 6."""

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return input_ids.sum(1) % 6 == 0


def only_odd(batch_id: int, ids: Tensor) -> list[int]:
    return list(range(3 + batch_id, 119, 2 + int(ids[-1]) % 3))


NEVER = 126
"""A padding row of the vocabulary. Without any end token transformers pads no row, whatever the criteria say: rows that
have ended go on until the last one ends."""

PROCESSED: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.6},
    "n-grams": {"no_repeat_ngram_size": 2},
    "not yet the end": {"min_new_tokens": 7, "eos_token_id": list(range(3, 60))},
    "forced end": {"forced_eos_token_id": 5},
    "banned": {"bad_words_ids": [[8], [9, 10], [40]], "suppress_tokens": [50, 51]},
    "allowed by row": {"prefix_allowed_tokens_fn": lambda: only_odd},
    "state": {"logits_processor": lambda: LogitsProcessorList([Momentum()])},
    "criterion": {"stopping_criteria": lambda: StoppingCriteriaList([SumIsRound()]), "eos_token_id": NEVER},
    "shorter": {"stopping_criteria": lambda: StoppingCriteriaList([MaxLengthCriteria(16)])},
    "both": {
        "repetition_penalty": 1.3,
        "stopping_criteria": lambda: StoppingCriteriaList([SumIsRound()]),
        "eos_token_id": NEVER,
    },
    "max length": {"max_length": 15, "max_new_tokens": None},
    "several": {"num_return_sequences": 1, "exponential_decay_length_penalty": (5, 1.2), "eos_token_id": 7},
}


@pytest.mark.parametrize("kind", PROCESSED)
def test_processors_and_criteria(llama: Trunk, kind: str) -> None:
    """Fault: one that sees rejected drafts, other rows or other lengths than in plain decoding, or is not asked."""
    ours, theirs = both(llama, **PROCESSED[kind])
    assert torch.equal(ours, theirs)
    assert torch.equal(both(llama, depth=3, **PROCESSED[kind])[0], theirs)
    if kind not in ("shorter", "max length", "several", "forced end"):
        assert not torch.equal(ours, both(llama)[0]), "it made no difference"


def test_criteria_inside_of_accepted_drafts(learned: Learned) -> None:
    """Fault: text behind the place where a criterion holds, because the drafts that follow were accepted."""
    prompt, text = torch.tensor([learned.sample.prompt_ids]), learned.sample.response_ids
    calls: list[int] = []

    class Watch(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            calls.append(input_ids.shape[1] - prompt.shape[1])
            return torch.tensor([calls[-1] == wanted])

    for drafting in (Drafting(depth=3), Drafting(sources=("heads",)), Drafting()):
        model = Model(learned.trunk, learned.perfect, drafting=drafting)
        for wanted in range(1, 12):
            calls.clear()
            output: Any = model.generate(
                prompt, max_new_tokens=40, pad_token_id=0, stopping_criteria=StoppingCriteriaList([Watch()])
            )
            assert output[0, prompt.shape[1] :].tolist() == text[:wanted]
            assert calls == list(range(1, wanted + 1)), "asked once for each token, in order"
        assert model.acceptance.sources["heads"][2] > 0


def test_stop_strings() -> None:
    """Fault: a stop string inside of a draft is passed over, or needs another call than in transformers."""
    model, tokenizer = load_model("tiny", dtype="float32", device="cpu")
    trunk = Trunk(model)
    ours = Model(trunk, random_heads(trunk), tokenizer)
    inputs = tokenizer("abc", return_tensors="pt")
    plain: Any = model.generate(**inputs, max_new_tokens=30, do_sample=False)
    written = tokenizer.decode(plain[0, inputs["input_ids"].shape[1] :])
    for stop in (written[3:5], written[7:8]):
        expected = model.generate(
            **inputs, max_new_tokens=30, do_sample=False, stop_strings=[stop], tokenizer=tokenizer
        )
        for settings in ({"stop_strings": [stop]}, {"generation_config": GenerationConfig(stop_strings=[stop])}):
            assert torch.equal(ours.generate(**inputs, max_new_tokens=30, do_sample=False, **settings), expected)


def test_scores_and_logits(llama: Trunk) -> None:
    """Fault: scores of drafts that were not written, of other steps, or of another shape."""
    ours, theirs = both(
        llama, repetition_penalty=1.2, return_dict_in_generate=True, output_scores=True, output_logits=True
    )
    assert isinstance(ours, GenerateDecoderOnlyOutput)
    assert torch.equal(ours.sequences, theirs.sequences)
    for name in ("scores", "logits"):
        found, expected = getattr(ours, name), getattr(theirs, name)
        assert len(found) == len(expected) == 20
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    bare, _ = both(llama, return_dict_in_generate=True)
    assert bare.scores is None
    assert bare.logits is None


def test_several_of_one_prompt(llama: Trunk) -> None:
    """Fault: samples of one prompt that are all the same, or fewer than were asked for."""
    model = Model(llama, random_heads(llama))
    torch.manual_seed(0)
    output: Any = model.generate(
        random_tokens(2, 5), do_sample=True, num_return_sequences=4, max_new_tokens=12, pad_token_id=0
    )
    assert output.shape == (8, 17)
    assert len({tuple(row) for row in output.tolist()}) == 8


class Heard(BaseStreamer):
    def __init__(self) -> None:
        self.pieces: list[list[int]] = []
        self.over = False

    def put(self, value: Any) -> None:
        self.pieces.append(value.flatten().tolist())

    def end(self) -> None:
        self.over = True


def test_streamer(learned: Learned) -> None:
    """Fault: tokens that are shown late, twice, or though they lie behind the end."""
    streamer = Heard()
    prompt, text = learned.sample.prompt_ids, learned.sample.response_ids
    Model(learned.trunk, learned.perfect).generate(
        torch.tensor([prompt]), streamer=streamer, max_new_tokens=10, eos_token_id=text[6], pad_token_id=0
    )
    assert streamer.pieces[0] == prompt
    assert [token for piece in streamer.pieces[1:] for token in piece] == text[: text.index(text[6]) + 1]
    assert max(map(len, streamer.pieces[1:])) > 1
    assert streamer.over


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 3}, "beam search is not accepted; accepted: greedy search and sampling"),
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search is not accepted"),
    "lookup": ({"prompt_lookup_num_tokens": 3}, "assisted generation is not accepted"),
    "mtp": ({"use_mtp": True}, "assisted generation is not accepted"),
    "cache": ({"past_key_values": object()}, "past_key_values is not accepted"),
    "assistant": ({"assistant_model": object()}, "assistant_model is not accepted"),
    "attentions": ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions is not accepted"),
    "strings": ({"stop_strings": ["a"]}, "stop_strings need a tokenizer"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_drafts_cannot_serve(llama: Trunk, kind: str) -> None:
    """Fault: another text than was asked for, or an error from deep inside."""
    settings, words = REFUSED[kind]
    with pytest.raises(UserError, match=words):
        Model(llama, random_heads(llama)).generate(random_tokens(1, 5), max_new_tokens=4, **settings)


def test_prompts_that_do_not_fit(llama: Trunk) -> None:
    """Fault: positions past the context, holes taken for padding, a streamer that mixes rows."""
    model = Model(llama, random_heads(llama))
    with pytest.raises(UserError, match="prompt of 256 tokens: accepted are 1 to 255, for a context of 256"):
        model.generate(random_tokens(1, 256), max_new_tokens=1)
    output: Any = model.generate(random_tokens(1, 250), max_new_tokens=50)
    assert output.shape[1] == 256
    mask = torch.tensor([[0, 1, 1, 0, 1]])
    with pytest.raises(UserError, match="accepted: padding on the left"):
        model.generate(random_tokens(1, 5), attention_mask=mask, max_new_tokens=3)
    with pytest.raises(UserError, match="a streamer shows one row, and there are 2"):
        model.generate(random_tokens(2, 5), streamer=Heard(), max_new_tokens=3)


@pytest.mark.parametrize("head", [0.05, 0.2])
def test_heads_that_are_left_out_of_rounds(llama: Trunk, learned: Learned, head: float) -> None:
    """Fault: heads that were left out of a round draft from stale states, so that the text is another one."""
    costs = Costs({1: 1.0, 33: 3.0}, head)
    for heads in (learned.half, random_heads(llama)):
        for sources in SOURCES, (HEADS,):
            prompts = [greedy_text("llama", length) for length in (5, 40, 20)]
            planner = Planner(Chances(), costs, sources)
            engine = Engine(llama, heads, slots=2, capacity=80, planner=planner)
            written = sorted(engine.run([Request(prompt, 30) for prompt, _ in prompts]), key=lambda text: text.number)
            assert [text.tokens for text in written] == [text for _, text in prompts]
            depths = {depth for text in written for _, depth, _ in text.rounds}
            assert len(depths) > 1, "every round was as deep"
