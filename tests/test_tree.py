"""Trees of drafts: which paths they have, what their nodes see, and that the text stays the one of plain decoding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import greedy_text, random_tokens, tiny_trunk
from kinds import random_kind
from test_decode import PATCHY, Scripted, tree_of_heads
from test_parallel import taught
from test_shared_layers import deep, shared, text_of
from test_shared_layers import taught as taught_shared
from torch import Tensor
from transformers import PretrainedConfig

from mtpd.cli import main
from mtpd.data.models import load_model, trunk_fingerprint
from mtpd.decode.counts import Counts
from mtpd.decode.drafting import HEADS, LOOKUP, Drafting
from mtpd.decode.drafts import Drafts
from mtpd.decode.engine import Engine
from mtpd.decode.model import Model
from mtpd.decode.planner import Planner
from mtpd.decode.sampling import Sampling, temperature_and_top_p
from mtpd.decode.text import Request, Text
from mtpd.evaluate.depths import Depths
from mtpd.heads import Heads, save_heads
from mtpd.heads.drafting import Drafter, Pick
from mtpd.recipe import dump, parse_recipe
from mtpd.slots import Span, attention_masks
from mtpd.trunk import Trunk


class ScriptedTree(Scripted):
    """Scripted drafts that do not depend on each other."""

    independent = True


def paths(drafts: Drafts) -> list[list[tuple[int, ...]]]:
    """Of each row, the tokens from the first depth to each node."""
    assert drafts.parents is not None
    assert drafts.depths is not None
    found = []
    for row in zip(drafts.tokens.tolist(), drafts.parents.tolist(), drafts.depths.tolist(), strict=True):
        known: list[tuple[int, ...]] = [()]
        for column, parent, depth in zip(*row, strict=True):
            known.append((*known[parent], column))
            assert len(known[-1]) == depth
        found.append(known[1:])
    return found


class Given(Drafter):
    """Drafts from the same distributions in every round, [N, M] by depth, none of which depends on another draft."""

    independent = True

    def __init__(self, *chances: Tensor) -> None:
        self.chances = chances

    @property
    def depth(self) -> int:
        return len(self.chances)

    def begin(self, span: Span, hidden: Tensor, tokens: Tensor, lengths: Sequence[int]) -> None:
        raise AssertionError("nothing is read")

    def read(self, span: Span, hidden: Tensor) -> None:
        raise AssertionError("nothing is read")

    def copy_row(self, source: int, target: int, length: int) -> None:
        raise AssertionError("no text moves")

    def drafts(
        self, tokens: Tensor, newest: Sequence[int], depth: int, pick: Pick
    ) -> Iterator[tuple[Tensor | None, Tensor]]:
        for k, chances in enumerate(self.chances):
            yield chances.log(), pick(chances.log(), k)

    def tree(self, nodes: int) -> Drafts:
        """What the planner offers of them."""
        rows = len(self.chances[0])
        texts = [Text(Request([1], 9), row) for row in range(rows)]
        tokens = torch.zeros(rows, 9, dtype=torch.long)
        drafts = tree_of_heads(nodes).draft(self, self.depth, tokens, [0] * rows, texts)
        assert drafts is not None
        return drafts


def likely(chances: dict[int, float]) -> Tensor:
    return torch.tensor([[chances.get(token, 0.0) for token in range(10)]])


def test_a_tree_by_hand() -> None:
    """Fault: a path that is likelier than one in the tree and left out; a node that stands before its parent."""
    drafter = Given(likely({7: 0.6, 4: 0.3, 9: 0.1}), likely({2: 0.55, 7: 0.35, 1: 0.1}))
    # 7: 0.6, 72: 0.33, 4: 0.3, 77: 0.21, 42: 0.165, 47: 0.105, 9: 0.1
    drafts = drafter.tree(4)
    assert drafts.tokens.tolist() == [[7, 2, 4, 7]]
    assert drafts.parents is not None
    assert drafts.parents.tolist() == [[0, 1, 0, 1]]
    assert drafts.depths is not None
    assert drafts.depths.tolist() == [[1, 2, 1, 2]]
    assert paths(drafter.tree(2)) == [[(7,), (7, 2)]]
    assert paths(drafter.tree(6)) == [[(7,), (7, 2), (4,), (7, 7), (4, 2), (4, 7)]]
    every = [*itertools.product((7, 4, 9)), *itertools.product((7, 4, 9), (2, 7, 1))]
    assert set(paths(drafter.tree(12))[0]) == set(every)
    # What is certain or impossible ties: a child never stands without its parent.
    sure = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    for nodes in range(1, 37):
        tree = Given(sure, sure, sure).tree(nodes)
        assert len(set(paths(tree)[0])) == nodes
        assert tree.parents is not None
        assert all(parent <= place for place, parent in enumerate(tree.parents[0].tolist()))


@pytest.mark.parametrize(("depth", "nodes"), [(2, 1), (2, 6), (2, 20), (3, 1), (3, 4), (3, 6)])
def test_the_likeliest_paths(depth: int, nodes: int) -> None:
    """Fault: paths of one row in another, or a cut between depths that loses likely ones."""
    generator = torch.Generator().manual_seed(0)
    scales = (1.0, 2.0, 0.3)[:depth]
    # Four tokens each, of which all go on: no path with so few likelier ones is cut.
    chances = [(torch.randn(3, 4, generator=generator) * scale).softmax(-1) for scale in scales]
    for row, mine in enumerate(paths(Given(*chances).tree(nodes))):
        every = {
            path: math.prod(chances[k][row, column].item() for k, column in enumerate(path))
            for length in range(1, depth + 1)
            for path in itertools.product(range(4), repeat=length)
        }
        assert set(mine) == set(sorted(every, key=lambda path: -every[path])[:nodes])


def test_what_nodes_see() -> None:
    """Fault: a node that sees another branch, or a sliding window counted in places instead of positions."""
    parents = torch.tensor([[0, 0, 1, 2, 4, 5, 3], [0, 1, 2, 3, 4, 5, 0]])
    lines = [
        [{0}, {0}, {0, 1}, {0, 2}, {0, 2, 4}, {0, 2, 4, 5}, {0, 1, 3}],
        [set(range(n)) for n in range(1, 7)] + [{0}],
    ]
    depths = torch.tensor([[len(line) for line in lines[0]], [len(line) for line in lines[1]]])
    drafts = Drafts(torch.zeros(2, 7, dtype=torch.long), 6, parents, depths)
    seen = drafts.seen()
    for row, of in enumerate(lines):
        for column, line in enumerate([set(), *of]):
            assert set(seen[row, column].nonzero()[:, 0].tolist()) == line | {column}
    starts = torch.tensor([9, 4])
    own = starts[:, None] + torch.arange(8)
    positions = starts[:, None] + torch.cat([torch.zeros(2, 1, dtype=torch.long), depths], dim=1)
    config = PretrainedConfig(layer_types=["sliding_attention", "full_attention"], sliding_window=3)
    config._attn_implementation = "sdpa"
    masks: Any = attention_masks(config, positions, torch.arange(24), own=own, seen=seen, dtype=torch.float32)
    for row, of in enumerate(lines):
        start = int(starts[row])
        for column, line in enumerate([set(), *of]):
            full = set(range(start)) | {start + each for each in line | {column}}
            assert set(masks["full_attention"][row, 0, column].nonzero()[:, 0].tolist()) == full
            # Positions of the places that are seen are all different, and none is behind the column's own.
            at = {place: place if place < start else int(positions[row, place - start]) for place in full}
            near = {place for place in full if at[place] > int(positions[row, column]) - 3}
            assert set(masks["sliding_attention"][row, 0, column].nonzero()[:, 0].tolist()) == near
            assert len(near) == min(3, 1 + int(positions[row, column]))


def rounds(
    trunk: Trunk, heads: Any, samples: Sequence[tuple[list[int], list[int]]], nodes: int | None, limits: Sequence[int]
) -> int:
    """Rounds that a chain, or a tree of so many nodes, needs for the texts, which are right."""
    plan = None if nodes is None else tree_of_heads(nodes)
    engine = Engine(trunk, heads, slots=2, capacity=72, planner=plan)
    requests = [Request(prompt, limit) for (prompt, _), limit in zip(samples, limits, strict=True)]
    written = sorted(engine.run(requests), key=lambda text: text.number)
    texts = [text[:limit] for (_, text), limit in zip(samples, limits, strict=True)]
    assert [text.tokens for text in written] == texts
    # A reader of the buffer of tokens or of the states would part here.
    assert [text.tokens for text in engine.run(requests[:1])] == texts[:1]
    return sum(len(text.rounds) for text in written)


def test_text_is_that_of_generate(name: str, trunk: Trunk) -> None:
    """Fault: keys, values or states of an accepted path that are not moved into their places, in any row."""
    texts = [greedy_text(name, length) for length in (5, 40, 20)]
    chain, tree = (rounds(trunk, ScriptedTree(texts, PATCHY), texts, nodes, [30] * 3) for nodes in (None, 9))
    assert tree < chain, "nodes beside the chain were accepted"


def test_counts_of_a_tree() -> None:
    """Fault: accepted length counted along the chain instead of the accepted path."""
    prompt, text = greedy_text("llama", 5)
    # The first choice is never right, the second always: of all paths of the two, one is. Of the likeliest four, three
    # begin with the first.
    for nodes, forwards, accepted in ((14, 8, [7, 7, 7]), (4, 15, [14])):
        heads: Any = ScriptedTree([(prompt, text)], [0])
        engine = Engine(tiny_trunk("llama"), heads, slots=1, capacity=72, planner=tree_of_heads(nodes))
        [written] = engine.run([Request(prompt, 29)])
        assert written.tokens == text[:29]
        assert written.counts(0) == Counts(0, tokens=29, forwards=forwards, sources={HEADS: accepted})
        assert written.counts(0).tau == 29 / forwards
        # By token: who drafted it, and how deep.
        deep = len(accepted)
        expected = [(None, 0), *[*((HEADS, k + 1) for k in range(deep)), (None, 0)] * (28 // (deep + 1))]
        assert written.drafted_by() == expected


@pytest.mark.parametrize("form", ["decoder", "linear", "medusa", "ff"])
def test_kinds_that_draft_trees(llama: Trunk, form: str) -> None:
    """Fault: a kind whose drafts are taken from the wrong columns, or a tree that accepts less than its chain."""
    vocabulary = torch.arange(2, 110) if form in ("linear", "medusa") else None
    heads = taught(llama, form, random_kind(llama, form, vocabulary=vocabulary), steps=12)
    samples = [greedy_text("llama", length, 24) for length in (1, 5, 9, 20)]
    chain, tree = (rounds(llama, heads, samples, nodes, [24, 19, 24, 19]) for nodes in (None, 20))
    assert tree < chain


def test_trees_behind_shared_layers() -> None:
    """Fault: states below the shared layers that stay where a node stood; heads that are taken for dependent ones."""
    trunk = deep()
    texts = [text_of(trunk, length) for length in (3, 9)]
    heads = taught_shared(trunk, shared(trunk, "medusa", 2), *texts[0], steps=5)
    chain, tree = (rounds(trunk, heads, texts, nodes, [16, 16]) for nodes in (None, 40))
    assert tree < chain


def test_sampling_with_trees(free_drafts: None) -> None:
    """Fault: a node that is accepted by another number than that of its place, so that the text is another one."""
    trunk = tiny_trunk("llama")
    heads = random_kind(trunk, "medusa")
    requests = [Request(random_tokens(9, seed=number).tolist(), 20, seed=number) for number in range(4)]

    def texts(heads: Heads | None, plan: Planner | None) -> list[list[int]]:
        choice = Sampling(temperature_and_top_p(0.4, 0.8))
        engine = Engine(trunk, heads, slots=3, capacity=40, planner=plan, choice=choice)
        return [text.tokens for text in sorted(engine.run(requests), key=lambda text: text.number)]

    plain = texts(None, None)
    assert len(set(map(tuple, plain))) == 4
    assert texts(heads, tree_of_heads(30)) == plain
    ids = random_tokens(2, 9)
    for settings in ({"do_sample": True, "top_k": 5}, {"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 2}):
        outputs = []
        for model in (
            Model(trunk, heads),
            Model(trunk, heads, drafting=Drafting(sources=(HEADS,))),
            Model(trunk, None),
        ):
            torch.manual_seed(3)
            outputs.append(model.generate(ids, max_new_tokens=15, **{"do_sample": False, **settings}))
        assert torch.equal(outputs[0], outputs[2]), settings
        assert torch.equal(outputs[1], outputs[2]), settings


def test_drafts_that_are_drawn_stand_in_a_chain(llama: Trunk, free_drafts: None) -> None:
    """Fault: a tree, or a look-up, where drafts are drawn from the heads: texts of another distribution."""
    model = Model(llama, random_kind(llama, "medusa"), drafting=Drafting(sampled=True))
    ids = torch.tensor([[5, 6, 5, 6, 5]])
    model.generate(ids, do_sample=True, max_new_tokens=40, pad_token_id=0)
    assert set(model.acceptance.sources) <= {HEADS}
    greedy = model.generate(ids, do_sample=False, max_new_tokens=40, pad_token_id=0)
    assert LOOKUP in model.acceptance.sources
    assert torch.equal(greedy, Model(llama, None).generate(ids, do_sample=False, max_new_tokens=40, pad_token_id=0))


def test_independent_heads_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], free_drafts: None) -> None:
    """Fault: an option that nobody reads, or a number of drafts that `bench` does not measure."""
    run = tmp_path / "run"
    run.mkdir()
    recipe = {"model": "tiny", "dtype": "float32", "device": "cpu", "heads": {"kind": "medusa", "depth": 3}}
    (run / "recipe.yaml").write_text(dump(parse_recipe(recipe)))
    model, _ = load_model("tiny", dtype="float32", device="cpu")
    heads = random_kind(Trunk(model), "medusa")
    heads.config = heads.config.model_copy(update={"trunk": trunk_fingerprint(model)})
    save_heads(heads, run / "heads")
    shown = []
    for further in ([], ["--sources", "heads"], ["--sources", "lookup"], ["--depth", "2"]):
        assert main(["generate", str(run), "--raw", "--prompt", "hello", "--max-new-tokens", "60", *further]) == 0
        shown.append(capsys.readouterr())
    assert len({each.out for each in shown}) == 1
    assert " from lookup" not in shown[1].err
    assert " from heads" not in shown[2].err
    limits = ["--prompts", "1", "--max-new-tokens", "3", "--runs", "1"]
    assert main(["bench", str(run), *limits, "--sources", "heads"]) == 0
    assert "; drafts of heads\n" in capsys.readouterr().out
    assert len(Depths.load(run / "depths.json").depths) == 4
    assert main(["bench", str(run), *limits, "--depth", "2"]) == 0
    assert "; a chain of 2 in every round\n" in capsys.readouterr().out
