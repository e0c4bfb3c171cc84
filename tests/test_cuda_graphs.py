"""Rounds of decoding as CUDA graphs, on a pretended GPU: its graphs launch what was captured, and run no Python."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import pretend_cuda
import pytest
import torch
from architectures import TOKENS, random_heads, random_tokens, tiny_model
from conftest import Learned, learn
from kinds import random_kind, settings
from pretend_cuda import CUDA, Counts, PretendedGraph, pretended_cuda
from transformers import AutoModelForCausalLM, LlamaConfig

from mtpd.decode.chances import Chances
from mtpd.decode.choice import Choice
from mtpd.decode.engine import Engine
from mtpd.decode.graphs import FIRST, Graphs
from mtpd.decode.planner import MOST, Planner
from mtpd.decode.sampling import SampledDrafts, Sampling
from mtpd.decode.text import Request, Text
from mtpd.heads import Heads, build_heads, configure_heads
from mtpd.slots import Tensors
from mtpd.trunk import Trunk


@pytest.fixture
def gpu(learned: Learned) -> Iterator[Counts]:
    # What is learned was learned on the processor.
    with pretended_cuda() as counts:
        yield counts


class Decoded(NamedTuple):
    texts: list[list[int]]
    rounds: list[list[tuple[int, int, int]]]
    sources: list[list[str]]
    costs: list[tuple[int, int, int]]
    """Launches, synchronisations and graphs of each round."""
    graphs: Graphs | None


def requests(*lengths: int, tokens: int = 10) -> list[Request]:
    """Prompts of these lengths; the later, the longer what is written."""
    return [
        Request(random_tokens(length, seed=length).tolist(), tokens + 3 * place, seed=place)
        for place, length in enumerate(lengths)
    ]


def decoded(
    trunk: Trunk,
    heads: Heads | None,
    gpu: Counts,
    asked: list[Request],
    *,
    graphs: bool | type[Graphs],
    slots: int = 2,
    nodes: int = 0,
    choice: Choice | None = None,
) -> Decoded:
    planner = Planner(Chances(), None, nodes=nodes) if nodes else None
    capacity = max(len(each.prompt) + each.max_new_tokens for each in asked)
    engine = Engine(trunk, heads, slots=slots, capacity=capacity, planner=planner, choice=choice)
    assert engine.graphs is not None
    if graphs is not True:
        engine.graphs = graphs(CUDA) if graphs else None
    costs: list[tuple[int, int, int]] = []
    inside = engine._round

    def counted() -> None:
        gpu.reset()
        inside()
        costs.append((gpu.launches.total(), gpu.syncs.total(), gpu.launches["graph"]))

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        # Texts are short: of several sizes all the same, and replayed soon.
        patch.setattr("mtpd.decode.graphs.FIRST", 1)
        patch.setattr("mtpd.decode.engine.LIMITS", (16, 32))
        patch.setattr("mtpd.slots.ROUND", 8)
        patch.setattr(engine, "_round", counted)
        # Tensors that are wrapped cannot be those of inference mode.
        run: Any = vars(Engine)["run"].__wrapped__
        texts: list[Text] = sorted(run(engine, asked), key=lambda text: text.number)
    return Decoded(
        [text.tokens for text in texts],
        [text.rounds for text in texts],
        [list(text.sources) for text in texts],
        costs,
        engine.graphs,
    )


def on_gpu(form: str, *, depth: int = 3) -> tuple[Trunk, Heads | None]:
    """A trunk and heads of a kind; those that have learned a text have drafts accepted."""
    if form == "learned":
        learned = learn("llama")
        heads: Heads | None = copy.deepcopy(learned.half)
        trunk = Trunk(copy.deepcopy(learned.trunk.model), tokens=TOKENS)
    else:
        name, _, form = form.rpartition(" ")
        trunk = Trunk(tiny_model(name or "llama"), tokens=TOKENS)
        if form == "plain":
            heads = None
        elif form == "chain":
            heads = random_heads(trunk, depth=depth)
        elif form == "shared-layers":
            chosen = settings("cp", depth=2) | {"shared_layers": 1}
            heads = build_heads(trunk, configure_heads(chosen, trunk, vocabulary=0, fingerprint=""))
        else:
            heads = random_kind(trunk, form, depth=depth)
    return trunk.to(CUDA), None if heads is None else heads.to(CUDA).eval()


KINDS = ["plain", "chain", "decoder", "medusa", "shared-layers", "learned", "gemma3 chain"]


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize("form", KINDS)
def test_texts_are_those_without_graphs(form: str, tree: bool, gpu: Counts) -> None:
    """Fault: a number of the host, or memory of another graph, in what is replayed; rows without a text that matter."""
    trunk, heads = on_gpu(form)
    asked = requests(1, 5, 20)
    found, plain = (
        decoded(trunk, heads, gpu, asked, graphs=graphs, slots=3, nodes=6 * tree) for graphs in (True, False)
    )
    assert found.texts == plain.texts
    assert (found.rounds, found.sources) == (plain.rounds, plain.sources)
    assert found.graphs is not None
    assert not found.graphs.refused
    assert sum(graphs for _, _, graphs in found.costs) > 8
    assert not any(graphs for _, _, graphs in plain.costs)
    if form == "learned":
        assert sum(map(len, found.sources)) > 5, "nothing is accepted"


@pytest.mark.parametrize("choice", [Sampling, SampledDrafts])
def test_sampled_texts_are_those_without_graphs(choice: Callable[[], Choice], gpu: Counts) -> None:
    """Fault: random numbers of the round in which a graph was captured."""
    trunk, heads = on_gpu("chain")
    asked = requests(4, 9)
    found, plain = (decoded(trunk, heads, gpu, asked, graphs=graphs, choice=choice()) for graphs in (True, False))
    assert found.texts == plain.texts


@pytest.mark.parametrize(
    ("form", "tree", "most"),
    [("plain", False, (30, 1)), ("chain", False, (60, 1)), ("chain", True, (60, 5)), ("decoder", False, (60, 1))],
)
def test_what_is_launched_beside_graphs(form: str, tree: bool, most: tuple[int, int], gpu: Counts) -> None:
    """Fault: a round of a trunk with four heads whose launches take longer than reading its weights."""
    trunk, heads = on_gpu(form, depth=4)
    costs = decoded(trunk, heads, gpu, requests(7, 20), graphs=True, nodes=6 * tree).costs
    replayed = [(launches, syncs) for launches, syncs, graphs in costs if graphs > (heads is not None)]
    assert len(replayed) > 10
    # A round with a capture, or with a first call, launches more; most have neither.
    launches, syncs = sorted(replayed)[len(replayed) // 2]
    assert (launches < most[0], syncs <= most[1]) == (True, True), (launches, syncs, gpu.launches)


class Compared(Graphs):
    """Captures each call anew: all with one key have to launch the same."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.first: dict[Hashable, list[Any]] = {}
        self.calls = 0

    def run(self, key: Hashable, function: Callable[[], Tensors]) -> Tensors:
        graph = PretendedGraph()
        with torch.cuda.graph(graph):  # type: ignore[arg-type]
            function()
        self.calls += key in self.first
        assert self.first.setdefault(key, graph.signature) == graph.signature, f"{key}: another round, other numbers"
        return function()


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize("form", ["decoder", "medusa", "shared-layers", "learned", "gemma3 chain"])
def test_rounds_of_a_bucket_launch_the_same(form: str, tree: bool, gpu: Counts) -> None:
    """Fault: an operator, a shape or a number of the host that differs between rounds with the same graph."""
    trunk, heads = on_gpu(form)
    found = decoded(trunk, heads, gpu, requests(5, 9, tokens=6), graphs=Compared, nodes=6 * tree)
    assert isinstance(found.graphs, Compared)
    assert found.graphs.calls > 10


def test_a_pretended_graph_is_one(gpu: Counts) -> None:
    """Fault: a harness that runs Python again, computes while it captures, or lets pass what CUDA forbids."""
    there, here, result = torch.arange(4.0, device="cuda"), torch.arange(4.0), torch.zeros(4, device="cuda")
    number = 2.0
    graph: Any = PretendedGraph()
    with torch.cuda.graph(graph):
        between = there * number
        result.copy_(between + 1)
    assert result.tolist() == [0.0] * 4
    there += 1
    number = 3.0
    gpu.reset()
    graph.replay()
    assert gpu.launches == {"graph": 1}
    assert result.tolist() == [3.0, 5.0, 7.0, 9.0]
    assert between.isnan().all()
    forbidden: list[Callable[[], Any]] = [
        there.tolist,
        lambda: there[there > 2],
        lambda: here.to(CUDA),
        there.sum().item,
    ]
    for each in forbidden:
        with pytest.raises(RuntimeError, match="when stream is capturing"), torch.cuda.graph(PretendedGraph()):  # type: ignore[arg-type]
            each()
    assert pretend_cuda._counts.capturing is None


def test_graphs_keep_what_they_were_given(gpu: Counts) -> None:
    """Fault: a first call that is left out, or outputs that another graph writes over."""
    graphs = Graphs(CUDA)
    given = torch.zeros(3, device=CUDA)
    runs: list[str] = []

    def twice(key: str) -> Tensors:
        runs.append(key)
        return (given * 2,)

    for round_ in range(FIRST + 3):
        given.fill_(float(round_))
        [one] = graphs.run("one", lambda: twice("one"))
        [other] = graphs.run("other", lambda: (twice("other")[0] + 1,))
        assert one.tolist() == [2.0 * round_] * 3
        assert other.tolist() == [2.0 * round_ + 1] * 3
    assert runs.count("one") == FIRST + 1


@pytest.mark.parametrize("odd", ["experts", "dynamic positions"])
def test_what_cannot_be_captured_runs_kernel_by_kernel(odd: str, gpu: Counts, caplog: pytest.LogCaptureFixture) -> None:
    """Fault: a model whose host looks at numbers of the device ends decoding, or is captured with those of a round."""
    if odd == "experts":
        trunk, heads = on_gpu("qwen3_moe chain")
        trunk.config._experts_implementation = "eager"
    else:
        scaled = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        config = LlamaConfig(
            vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=32, rope_parameters=scaled,
        )  # fmt: skip
        torch.manual_seed(0)
        trunk, heads = Trunk(AutoModelForCausalLM.from_config(config).eval()).to(CUDA), None
    with caplog.at_level(logging.WARNING):
        found, plain = (decoded(trunk, heads, gpu, requests(5, tokens=6), graphs=graphs) for graphs in (True, False))
    assert found.texts == plain.texts
    assert found.graphs is not None
    assert found.graphs.refused
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "Decoding without CUDA graphs, kernel by kernel"
    ]
    assert found.costs[3:] == plain.costs[3:]


def test_memory_that_ends_is_told(gpu: Counts) -> None:
    """Fault: a card that is full is taken for a model that cannot be captured, and its slots are not halved."""
    graphs = Graphs(CUDA)

    def full() -> Tensors:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        graphs.run("full", full)
    assert not graphs.refused


def test_a_tree_as_wide_as_there_are(gpu: Counts) -> None:
    """Fault: buffers for fewer nodes than planners choose."""
    trunk, heads = on_gpu("chain")
    asked = requests(5, 9)
    found, plain = (decoded(trunk, heads, gpu, asked, graphs=graphs, nodes=MOST) for graphs in (True, False))
    assert found.texts == plain.texts


def test_no_graphs_on_a_processor() -> None:
    """Fault: sizes that are rounded up, and calls that warm up, where there is nothing to be captured."""
    trunk = Trunk(tiny_model("llama"), tokens=TOKENS)
    engine = Engine(trunk, random_heads(trunk), slots=3, capacity=20)
    assert engine.graphs is None
    newest = engine.places([4, 7, 5])
    assert (newest.rows, newest.width(3), list(newest)) == (3, 3, [4, 7, 5])
    [rows] = newest.run("any", lambda at: (torch.tensor([len(at.on_device)]),))
    assert rows.tolist() == [3]
