"""A loaded model in the place of a model of transformers: in pipelines, `repr`, `to`, what the last call accepted."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import transformers
from architectures import random_heads, tiny_trunk
from conftest import Learned

from mtpd.data.models import load_model
from mtpd.decode.counts import Counts
from mtpd.decode.drafting import Drafting
from mtpd.decode.model import Model
from mtpd.errors import UserError
from mtpd.evaluate.acceptance import PromptCounts, SuiteCounts
from mtpd.heads.chain.heads import ChainHeads
from mtpd.trunk import Trunk

pytestmark = pytest.mark.usefixtures("free_drafts")

CHAT = [{"role": "user", "content": "hello"}]
CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "one": ("abc", {}),
    "chat": (CHAT, {}),
    "batch": (["abc", "a longer prompt"], {"batch_size": 2}),
    "new text": ("abc", {"return_full_text": False}),
    "processor": ("abc", {"repetition_penalty": 1.5}),
    "tokens": ("abc", {"return_tensors": True}),
}


@pytest.fixture(scope="module")
def tiny() -> Model:
    model, tokenizer = load_model("tiny", dtype="float32", device="cpu")
    trunk = Trunk(model)
    return Model(trunk, random_heads(trunk), tokenizer)


def pipeline(model: Any, tokenizer: Any) -> Any:
    return transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")


@pytest.mark.parametrize("call", CALLS)
def test_a_pipeline_writes_the_text_of_the_model_alone(tiny: Model, call: str) -> None:
    """Fault: a pipeline that refuses the model, or whose text is another one than without heads."""
    given, settings = CALLS[call]
    chain = tiny.drafting_with(depth=3)
    ours, of_chain, theirs = (
        pipeline(model, copy.deepcopy(tiny.tokenizer))(given, max_new_tokens=16, do_sample=False, **settings)
        for model in (tiny, chain, tiny.trunk.model)
    )
    assert ours == of_chain == theirs
    assert sum(chain.acceptance.drafted) > 0, "the heads drafted nothing"


def test_a_pipeline_stops_at_a_string(tiny: Model) -> None:
    """Fault: a pipeline's `stop_sequence` is passed over, or text behind it is kept."""
    writes = pipeline(tiny, tiny.tokenizer)
    [whole] = writes("abc", max_new_tokens=16, do_sample=False, return_full_text=False)
    stop = re.search(r"[a-z]{2}", whole["generated_text"])
    assert stop is not None
    [short] = writes("abc", max_new_tokens=16, do_sample=False, return_full_text=False, stop_sequence=stop[0])
    assert short["generated_text"] == whole["generated_text"][: stop.end()] != whole["generated_text"]


def test_a_pipeline_complains_of_nothing(tiny: Model, capfd: pytest.CaptureFixture[str]) -> None:
    """Fault: every pipeline prints the names of three hundred classes that it would rather have."""
    assert "'model': 'Model'" in repr(pipeline(tiny, tiny.tokenizer))
    assert "not supported" not in capfd.readouterr().err


def test_acceptance_of_the_last_call(learned: Learned) -> None:
    """Fault: sums over another call or one row, or ratios that an acceptance file of the same counts does not have."""
    model = Model(learned.trunk, learned.half, drafting=Drafting(depth=3))
    with pytest.raises(UserError, match="nothing was generated yet"):
        _ = model.acceptance
    prompt = torch.tensor([learned.sample.prompt_ids])
    model.generate(prompt, max_new_tokens=40, do_sample=False)
    one = model.acceptance
    assert 0 < one.accepted[0] < one.drafted[0]
    model.generate(prompt.expand(3, -1), max_new_tokens=40, do_sample=False)
    three = model.acceptance
    assert (three.accepted, three.forwards) == ([3 * share for share in one.accepted], 3 * one.forwards)
    file = SuiteCounts.of([PromptCounts.of(row, id=str(n), prompt="") for n, row in enumerate(model.counts)], 3)
    assert (three.car, three.ar, three.tau) == (file.car, file.ar, file.tau)
    model = Model(learned.trunk, learned.half)
    model.generate(prompt, max_new_tokens=40, do_sample=False)
    one = model.acceptance
    assert set(one.sources) == {"heads", "lookup"}
    assert (one.tokens, one.tau) == (40, 40 / one.forwards)
    # Of the last round, the token behind the accepted drafts may have no room.
    assert 0 <= sum(map(sum, one.sources.values())) - (40 - one.forwards) <= 1
    model.generate(prompt.expand(3, -1), max_new_tokens=40, do_sample=False)
    assert model.acceptance.sources == {name: [3 * share for share in of] for name, of in one.sources.items()}
    assert str(Counts(2, 9, 6, [5, 5], [3, 1])) == (
        "9 tokens in 6 forward passes; CAR_1 0.60 CAR_2 0.20 tau 1.80 over 5 rounds"
    )
    assert str(Counts(0, 9, 6, sources={"heads": [1, 1], "lookup": [0, 0, 1]})) == (
        "9 tokens in 6 forward passes; tau 1.50; accepted drafts: 2 from heads, 1 from lookup"
    )


def test_repr() -> None:
    """Fault: a model whose heads, draft depth, dtype or device cannot be seen."""
    trunk = tiny_trunk("llama")
    heads = random_heads(trunk)
    known = "Model(LlamaForCausalLM of 3 layers"
    assert repr(Model(trunk, None)) == f"{known}, no heads, drafts of lookup, float32 on cpu)"
    assert repr(Model(trunk, heads)) == f"{known}, 3 chain heads, drafts of heads and lookup, float32 on cpu)"
    assert repr(Model(trunk, heads, drafting=Drafting(depth=2))) == (
        f"{known}, 3 chain heads, a chain of 2, float32 on cpu)"
    )
    none = Model(trunk, None, drafting=Drafting(sources=("heads",)))
    assert repr(none) == f"{known}, no heads, drafts of none, float32 on cpu)"


def test_to_moves_model_and_heads() -> None:
    """Fault: heads that stay on the old device; a dtype that is taken, and rounds rotary tables."""
    trunk = copy.deepcopy(tiny_trunk("llama"))
    model = Model(trunk, random_heads(trunk))
    with pytest.raises(UserError, match=r"to: torch.bfloat16 is not accepted; .* mtpd.load\(run, dtype="):
        model.to(torch.bfloat16)
    moved = model.to("meta")
    assert moved is model.eval()
    assert isinstance(moved.heads, ChainHeads)
    parts = [*trunk.parameters(), *moved.heads.parameters(), *moved.heads.buffers()]
    assert {part.device.type for part in parts} == {moved.device.type} == {"meta"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("hello", "'hello' is no tensor of token ids; accepted: model.generate(**model.tokenizer("),
        ([[1, 2]], "list is no tensor of token ids"),
        ({"input_ids": torch.tensor([[1]])}, "passed by its names: model.generate(**inputs)"),
    ],
)
def test_generate_says_how_to_tokenize(tiny: Model, given: Any, said: str) -> None:
    """Fault: a traceback out of transformers for text in the place of token ids."""
    with pytest.raises(UserError) as caught:
        tiny.generate(given)
    assert said in str(caught.value)
