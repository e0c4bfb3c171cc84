"""Trees of drafts: which paths they have, what their nodes see, and that the text stays the one of plain decoding."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import greedy_text, random_heads, random_tokens, tiny_trunk
from kinds import random_kind
from test_decode import PATCHY, Scripted
from test_parallel import taught
from test_shared_layers import deep, shared, text_of
from test_shared_layers import taught as taught_shared
from torch import Tensor
from transformers import PretrainedConfig

from mtpd.cli import main
from mtpd.data.models import load_model, trunk_fingerprint
from mtpd.decode.counts import Counts
from mtpd.decode.drafting import Drafting
from mtpd.decode.drafts import Drafts
from mtpd.decode.engine import Engine
from mtpd.decode.model import Model
from mtpd.decode.sampling import SampledDrafts, Sampling, temperature_and_top_p
from mtpd.decode.text import Request
from mtpd.decode.tree import grow
from mtpd.errors import UserError
from mtpd.evaluate.depths import Depths
from mtpd.heads import Heads, save_heads
from mtpd.recipe import dump, parse_recipe
from mtpd.run.loading import load
from mtpd.slots import attention_masks
from mtpd.trunk import Trunk


class ScriptedTree(Scripted):
    """Scripted drafts that do not depend on each other."""

    independent = True


def paths(columns: Tensor, parents: Tensor, depths: Tensor) -> list[list[tuple[int, ...]]]:
    """Of each row, the columns from the first depth to each node."""
    found = []
    for row in zip(columns.tolist(), parents.tolist(), depths.tolist(), strict=True):
        known: list[tuple[int, ...]] = [()]
        for column, parent, depth in zip(*row, strict=True):
            known.append((*known[parent], column))
            assert len(known[-1]) == depth
        found.append(known[1:])
    return found


def test_a_tree_by_hand() -> None:
    """Fault: a path that is likelier than one in the tree and left out; a node that stands before its parent."""
    first = torch.tensor([[0.6, 0.3, 0.1]]).log(), torch.tensor([[7, 4, 9]])
    second = torch.tensor([[0.55, 0.35, 0.1]]).log(), torch.tensor([[2, 7, 1]])
    # 7: 0.6, 72: 0.33, 4: 0.3, 77: 0.21, 42: 0.165, 47: 0.105, 9: 0.1
    columns, parents, depths = grow([first, second], 4)
    assert columns.tolist() == [[7, 2, 4, 7]]
    assert parents.tolist() == [[0, 1, 0, 1]]
    assert depths.tolist() == [[1, 2, 1, 2]]
    assert paths(*grow([first, second], 2)) == [[(7,), (7, 2)]]
    assert paths(*grow([first, second], 6)) == [[(7,), (7, 2), (4,), (7, 7), (4, 2), (4, 7)]]
    assert len(paths(*grow([first, second], 50))[0]) == 12
    # What is certain or impossible ties: a child never stands without its parent.
    sure = torch.tensor([[1.0, 0.0, 0.0]]).log(), torch.tensor([[0, 1, 2]])
    for nodes in range(1, 39):
        tree = grow([sure] * 3, nodes)
        assert len(set(paths(*tree)[0])) == nodes
        assert all(parent <= place for place, parent in enumerate(tree[1][0].tolist()))


def test_the_likeliest_paths() -> None:
    """Fault: paths of one row in another, or a cut between depths that loses likely ones."""
    generator = torch.Generator().manual_seed(0)
    chances = [(torch.randn(3, 5, generator=generator) * scale).log_softmax(-1) for scale in (1.0, 2.0, 0.3)]
    candidates = [chance.topk(5, dim=1) for chance in chances]
    for nodes in (1, 6, 20):
        found = paths(*grow([(each.values, each.indices) for each in candidates], nodes))
        for row, mine in enumerate(found):
            every = {
                path: sum(chances[k][row, column].item() for k, column in enumerate(path))
                for length in (1, 2, 3)
                for path in itertools.product(range(5), repeat=length)
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


def test_text_is_that_of_generate(name: str, trunk: Trunk) -> None:
    """Fault: keys, values or states of an accepted path that are not moved into their places, in any row."""
    texts = [greedy_text(name, length) for length in (5, 40, 20)]
    requests = [Request(prompt, 30) for prompt, _ in texts]
    forwards = {}
    for nodes in (0, 9):
        engine = Engine(
            trunk, ScriptedTree(texts, PATCHY), slots=2, capacity=72, drafting=Drafting(depth=3, tree=nodes)
        )  # type: ignore[arg-type]
        written = sorted(engine.run(requests), key=lambda text: text.number)
        assert [text.tokens for text in written] == [text for _, text in texts]
        forwards[nodes] = sum(len(text.rounds) for text in written)
    assert forwards[9] < forwards[0], "nodes beside the chain were accepted"


def test_counts_of_a_tree() -> None:
    """Fault: accepted length counted along the chain instead of the accepted path."""
    prompt, text = greedy_text("llama", 5)
    # The first choice is never right, the second always: of all paths of the two, one is.
    engine = Engine(
        tiny_trunk("llama"),
        ScriptedTree([(prompt, text)], [0]),
        slots=1,
        capacity=72,
        drafting=Drafting(depth=3, tree=14),
    )  # type: ignore[arg-type]
    [written] = engine.run([Request(prompt, 29)])
    assert written.tokens == text[:29]
    assert written.counts(3) == Counts(3, tokens=29, forwards=8, drafted=[7] * 3, accepted=[7] * 3)
    # Three wrong ones and the right one of depth 1, which ends each round: all depths count as drafted.
    engine = Engine(
        tiny_trunk("llama"),
        ScriptedTree([(prompt, text)], [0]),
        slots=1,
        capacity=72,
        drafting=Drafting(depth=3, tree=4),
    )  # type: ignore[arg-type]
    [written] = engine.run([Request(prompt, 29)])
    counts = written.counts(3)
    assert written.tokens == text[:29]
    assert counts.drafted == [13] * 3
    assert counts.accepted == [13, 0, 0]


@pytest.mark.parametrize("form", ["decoder", "linear", "medusa", "ff"])
def test_kinds_that_draft_trees(llama: Trunk, form: str) -> None:
    """Fault: a kind whose drafts are taken from the wrong columns, or a tree that accepts less than its chain."""
    vocabulary = torch.arange(2, 110) if form in ("linear", "medusa") else None
    heads = taught(llama, form, random_kind(llama, form, vocabulary=vocabulary), steps=12)
    samples = [greedy_text("llama", length, 24) for length in (1, 5, 9, 20)]
    requests = [Request(prompt, 24 - 5 * (number % 2)) for number, (prompt, _) in enumerate(samples)]
    forwards = []
    for threshold, nodes in ((0.0, 0), (0.0, 20), (0.05, 20)):
        engine = Engine(
            llama, heads, slots=2, capacity=64, drafting=Drafting(depth=heads.depth, threshold=threshold, tree=nodes)
        )
        written = sorted(engine.run(requests), key=lambda text: text.number)
        for text in written:
            assert text.tokens == samples[text.number][1][: requests[text.number].max_new_tokens]
        forwards.append(sum(len(text.rounds) for text in written))
    assert forwards[1] < forwards[0]
    # A reader of the buffer of tokens or of the states would part here.
    assert [text.tokens for text in engine.run(requests[:1])] == [samples[0][1]]


def test_trees_behind_shared_layers() -> None:
    """Fault: states below the shared layers that stay where a node stood; heads that are taken for dependent ones."""
    trunk = deep()
    texts = [text_of(trunk, length) for length in (3, 9)]
    heads = taught_shared(trunk, shared(trunk, "medusa", 2), *texts[0], steps=5)
    requests = [Request(prompt, 16) for prompt, _ in texts]
    forwards = []
    for nodes in (0, 40):
        engine = Engine(trunk, heads, slots=2, capacity=32, drafting=Drafting(depth=heads.depth, tree=nodes))
        written = sorted(engine.run(requests), key=lambda text: text.number)
        assert [text.tokens for text in written] == [text for _, text in texts]
        forwards.append(sum(len(text.rounds) for text in written))
    assert forwards[1] < forwards[0]


def test_sampling_with_trees() -> None:
    """Fault: a node that is accepted by another number than that of its place, so that the text is another one."""
    trunk = tiny_trunk("llama")
    heads = random_kind(trunk, "medusa")
    requests = [Request(random_tokens(9, seed=number).tolist(), 20, seed=number) for number in range(4)]

    def texts(heads: Heads | None, nodes: int) -> list[list[int]]:
        choice = Sampling(temperature_and_top_p(0.4, 0.8))
        engine = Engine(trunk, heads, slots=3, capacity=40, drafting=Drafting(depth=3, tree=nodes), choice=choice)
        return [text.tokens for text in sorted(engine.run(requests), key=lambda text: text.number)]

    plain = texts(None, 0)
    assert len(set(map(tuple, plain))) == 4
    assert texts(heads, 30) == plain
    ids = random_tokens(2, 9)
    for settings in ({"do_sample": True, "top_k": 5}, {"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 2}):
        outputs = []
        for model in (Model(trunk, heads, drafting=Drafting(depth=3, tree=30)), Model(trunk, None)):
            torch.manual_seed(3)
            outputs.append(model.generate(ids, max_new_tokens=15, **{"do_sample": False, **settings}))
        assert torch.equal(*outputs), settings


def test_where_no_tree_is_drafted(llama: Trunk) -> None:
    """Fault: a tree of drafts that were made for one path, or one that changes the distribution of a text."""
    for heads in (random_heads(llama), random_kind(llama, "cp")):
        with pytest.raises(UserError, match=f"tree: 8 is not accepted for heads of kind {heads.config.kind}"):
            Engine(llama, heads, slots=1, capacity=30, drafting=Drafting(depth=3, tree=8))
    medusa = random_kind(llama, "medusa")
    with pytest.raises(UserError, match="tree: 8 is not accepted where drafts are sampled"):
        Engine(llama, medusa, slots=1, capacity=30, drafting=Drafting(depth=3, tree=8), choice=SampledDrafts())
    model = Model(llama, medusa, drafting=Drafting(depth=3, tree=8, sampled=True))
    ids = torch.tensor([[5, 6]])
    model.generate(ids, do_sample=False, max_new_tokens=3, pad_token_id=0)
    with pytest.raises(UserError, match="tree: 8 is not accepted where drafts are sampled"):
        model.generate(ids, do_sample=True, max_new_tokens=3, pad_token_id=0)
    with pytest.raises(UserError, match="siblings: 2 does nothing beside tree: 8"):
        Model(llama, medusa, drafting=Drafting(depth=3, tree=8, siblings=2))


def test_trees_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: an option that nobody reads, or a stored tree that is lost when the depth is asked for."""
    run = tmp_path / "run"
    run.mkdir()
    recipe = {"model": "tiny", "dtype": "float32", "device": "cpu", "heads": {"kind": "medusa", "depth": 3}}
    (run / "recipe.yaml").write_text(dump(parse_recipe(recipe)))
    model, _ = load_model("tiny", dtype="float32", device="cpu")
    heads = random_kind(Trunk(model), "medusa")
    heads.config = heads.config.model_copy(update={"trunk": trunk_fingerprint(model)})
    save_heads(heads, run / "heads")
    assert load(run, tree=9).drafting == Drafting(depth=3, tree=9)
    shown = []
    for further in ([], ["--tree", "9"]):
        assert main(["generate", str(run), "--raw", "--prompt", "hello", "--max-new-tokens", "24", *further]) == 0
        shown.append(capsys.readouterr())
    assert shown[0].out == shown[1].out
    limits = ["--prompts", "1", "--max-new-tokens", "3", "--runs", "1"]
    assert main(["bench", str(run), *limits, "--tune"]) == 0
    assert "tree 32" in capsys.readouterr().out
    assert len(Depths.load(run / "depths.json").depths) == 4
    (run / "heads" / "decoding.json").write_text('{"depth": 3, "tree": 9}')
    assert load(run, depth=2).drafting == Drafting(depth=2, tree=9)
    assert load(run, tree=0).drafting == Drafting(depth=3)
    assert main(["bench", str(run), *limits]) == 0
    assert "depth 3, siblings 0, threshold 0, tree 9\n" in capsys.readouterr().out
