"""The formula of a step's time: what it counts against real steps, and the time against steps that were measured."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_fresh_ranks
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.step_counts import ULYSSES, CountSteps
from benchmarks.step_time import (
    Machine,
    Work,
    copied,
    heads_flops,
    heads_swept,
    received,
    softmaxes,
    step_seconds,
    trunk_flops,
    trunk_swept,
    updated,
    work_of,
)
from mtpd.data.disk_store import fill
from mtpd.data.packing import PackedRows
from mtpd.data.store import MemoryStore
from mtpd.heads import build_heads, configure_heads, start_heads
from mtpd.plan.scaling import Sharding
from mtpd.recipe import load_recipe
from mtpd.run.directory import RunDirectory
from mtpd.run.session import Session
from mtpd.run.training import train_heads
from mtpd.trunk import Trunk

RECORD = Path(__file__).parent / "step-times.json"
MODEL = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
SHAPE: dict[str, Any] = {key: value for key, value in MODEL.items() if key != "model_type"}
WORDS = ["heads.depth=2", "dtype=float32", "device=cpu", "data.row_length=192", "train.micro_batch_rows=1"]
WORDS.append("train.top_n=200")
DEEP = 5
CASES: dict[int, list[tuple[Sharding, bool, int] | tuple[Sharding, bool, int, int]]] = {
    # Sharding, whether the trunk's states are stored, depth, and the processes that share a row.
    1: [("none", True, 2), ("none", False, 2)],
    2: [
        *(("none", True, 2), ("zero1", True, 2), ("zero2", True, 2), ("zero3", True, 2)),
        *(("zero3", False, 2), ("zero3", True, DEEP)),
        *(("zero2", False, 2, 2), ("zero3", False, 2, 2), ("zero3", True, 2, 2)),
    ],
}


def load_of(model: dict[str, Any], words: list[str], folder: Path) -> Work:
    """What the formula is given, from the configuration alone."""
    (folder / "config.json").write_text(json.dumps(model))
    return work_of(load_recipe(None, [*words, f"model={folder}"]))


def counted(folder: str) -> dict[str, Any]:
    """What the steps of a rank do, by sharding, and whether the trunk's states are stored."""
    found = {}
    count = int(os.environ["WORLD_SIZE"])
    if count == 1:
        # As without a launcher.
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
    for sharding, stored, depth, *shared in CASES[count]:
        parts = shared[0] if shared else 1
        torch.manual_seed(0)
        trunk = Trunk(LlamaForCausalLM(LlamaConfig(**SHAPE)).eval())
        name = "null" if sharding == "none" else sharding
        case = f"{sharding}{' stored' * stored}{' deep' * (depth == DEEP)}{' split' * (parts > 1)}"
        run = Path(folder) / f"{count} {case}"
        given = [f"train.deepspeed={name}", f"output={run}", f"heads.depth={depth}", "train.max_steps=2"]
        given.append(f"train.sequence_parallel={parts}")
        recipe = load_recipe(None, [*WORDS, "model=none", *given])
        config = configure_heads(recipe.heads.model_dump(), trunk, vocabulary=0, fingerprint="")
        heads = build_heads(trunk, config)
        start_heads(heads, trunk, "identity", lambda: [])
        length = recipe.data.row_length
        ids = torch.randint(1024, (4, length), generator=torch.Generator().manual_seed(0))
        rows = PackedRows(ids, ids, torch.arange(length).expand(4, length), documents=4, cut=0, dropped=0)
        store = MemoryStore(trunk, rows) if stored else None
        if store is not None:
            fill(store, trunk, rows, progress=False)
        counter = CountSteps()
        session = Session(recipe, RunDirectory(run), trunk, None, "", [2], False)
        train_heads(session, heads, rows, store, [], callbacks=[counter])
        found[case] = counter.of
    return found


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What was counted of one rank, and of the first of two."""
    ended = in_fresh_ranks(
        "benchmarks.test_step_time", "counted", str(tmp_path_factory.mktemp("counted")), counts=(1, 2)
    )
    for each in ended:
        assert set(each.codes) == {0}, each.errors
    return {count: each.values[0] for count, each in enumerate(ended, start=1)}


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Work:
    words = [*WORDS, "train.deepspeed=zero2", "train.sequence_parallel=2"]
    return load_of(MODEL, words, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Work:
    return load_of(MODEL, WORDS, tmp_path_factory.mktemp("model"))


def total(step: dict[str, Any], what: str) -> int:
    return sum(step[what].values())


def test_products(steps: dict[int, dict[str, Any]], load: Work) -> None:
    """Fault: a product that the formula forgets or counts twice: a depth's, the teacher's, one of the backward pass."""
    alone, without = steps[1]["none"], steps[1]["none stored"]
    assert total(without, "flops") == pytest.approx(heads_flops(load), rel=0.01)
    assert total(alone, "flops") - total(without, "flops") == pytest.approx(trunk_flops(load), rel=0.01)


@pytest.mark.parametrize("sharding", ["none", "zero1", "zero2", "zero3"])
def test_messages(steps: dict[int, dict[str, Any]], load: Work, sharding: Sharding) -> None:
    """Fault: weights or gradients that are sent more often than the formula says, or a frozen trunk's backward pass."""
    of_heads, of_trunk = received(load, sharding, 2)
    stored = total(steps[2][f"{sharding} stored"], "received")
    assert stored == pytest.approx(of_heads, rel=0.01)
    if sharding == "zero3":
        assert total(steps[2][sharding], "received") - stored == pytest.approx(of_trunk, rel=0.01)
        # Of more heads than stay whole, some are collected for the backward pass again.
        deep = replace(load, heads=load.heads // 2 * DEEP)
        assert total(steps[2]["zero3 stored deep"], "received") == pytest.approx(
            received(deep, sharding, 2)[0], rel=0.01
        )


def test_split_rows(steps: dict[int, dict[str, Any]], load: Work, split: Work) -> None:
    """Fault: a part is taken for a row, attention for that of a part, or nothing for what ranks exchange for it."""
    stored = steps[2]["zero3 stored split"]
    assert split.tokens == load.tokens // 2
    assert total(stored, "flops") == pytest.approx(heads_flops(split), rel=0.01)
    for sharding in ("zero2", "zero3"):
        step = steps[2][f"{sharding} split"]
        assert total(step, "flops") == pytest.approx(heads_flops(split) + trunk_flops(split), rel=0.01)
        assert total(step, "received") == pytest.approx(sum(received(split, sharding, 2)), rel=0.01)
    # The exchange by itself.
    found = stored["received"][ULYSSES]
    assert found == pytest.approx(split.tokens / 2 * split.exchanged_heads, rel=0.05)


def test_sweeps(steps: dict[int, dict[str, Any]], load: Work) -> None:
    """Fault: what lies between products is forgotten, or is taken to cost what it did when it was written otherwise."""
    alone, without = steps[1]["none"], steps[1]["none stored"]
    assert total(alone, "swept") - total(without, "swept") == pytest.approx(trunk_swept(load), rel=0.05)
    assert total(without, "swept") == pytest.approx(heads_swept(load) + updated(load, "none", 1), rel=0.05)
    # The selection of the top n is none of PyTorch's operations.
    assert total(without, "softmaxes") == pytest.approx(softmaxes(load) * (1 - 1 / load.softmaxes), rel=0.02)


@pytest.mark.parametrize("sharding", ["none", "zero1", "zero2", "zero3"])
def test_copies(steps: dict[int, dict[str, Any]], load: Work, sharding: Sharding) -> None:
    """Fault: gradients and weights that are copied more often than the formula says, or moments that are not shared."""
    of_heads, of_trunk = copied(load, sharding, 2)
    stored = total(steps[2][f"{sharding} stored"], "swept")
    more = stored - total(steps[1]["none stored"], "swept")
    assert more == pytest.approx(of_heads + updated(load, sharding, 2) - updated(load, "none", 1), rel=0.02)
    if sharding == "zero3":
        assert total(steps[2][sharding], "swept") - stored == pytest.approx(trunk_swept(load) + of_trunk, rel=0.05)


def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RECORD.read_text())
    return found


@pytest.mark.parametrize("case", recorded()["steps"], ids=lambda case: "-".join(map(str, list(case.values())[:4])))
def test_times_that_were_measured(case: dict[str, Any], tmp_path: Path) -> None:
    """Fault: a step that takes another time than the formula says, with the rates of the machine it ran on."""
    about = recorded()
    load = load_of(about["model"], [*about["words"], f"data.row_length={case['tokens']}"], tmp_path)
    rates = case["rates"]
    link = rates.get("link", 1.0)
    own = {name: rates[name] for name in ("flops", "memory", "copies", "softmax")}
    machine = Machine(**own, link=link, network=link, overlaps=False)
    said = step_seconds(load, case["sharding"], case["ranks"], machine, stored=case["stored"])
    # Nothing is added for what is left out, so that it is less than what was measured.
    assert 0.7 * case["seconds"] < said < 1.02 * case["seconds"]


LARGE = Work(
    trunk=70_000_000_000,
    layers=68_000_000_000,
    largest_layer=850_000_000,
    heads=4_000_000_000,
    largest_head=1_000_000_000,
    hidden=8192,
    item=2,
    beside={"loss": 10**9},
    tokens=4096,
    active=68_000_000_000,
    active_heads=4_000_000_000,
    row=2048,
    attended=1_300_000,
    attended_heads=65_000,
    between=50_000_000,
    between_heads=8_000_000,
    sweeps=76,
    softmaxes=10,
    depth=4,
    vocabulary=128_000,
)
MACHINE = Machine(flops=4e14, memory=2.7e12, copies=2.7e12, softmax=3e11, link=4e11, network=3e11)


def test_a_step_takes_the_longer_of_work_and_messages() -> None:
    """Fault: messages of the trunk where its states are stored, or time that goes down on a slower network."""
    stored = step_seconds(LARGE, "zero3", 16, MACHINE, stored=True)
    slow = replace(MACHINE, network=1e9)
    assert stored < step_seconds(LARGE, "zero3", 16, MACHINE, stored=False)
    assert step_seconds(LARGE, "zero3", 16, slow, stored=False) > 68e9 * 2 * 15 / 16 / 1e9
    assert step_seconds(LARGE, "zero3", 8, slow, stored=False) == step_seconds(LARGE, "zero3", 8, MACHINE, stored=False)
    assert step_seconds(LARGE, "zero3", 8, replace(MACHINE, overlaps=False), stored=True) > step_seconds(
        LARGE, "zero3", 8, MACHINE, stored=True
    )
    # What is collected has its time too, beside messages.
    trunk = 2 * 4096 * (68e9 + 2048 * 1.3e6) / 4e14 + 4096 * 50e6 * 3 / 2.7e12
    assert step_seconds(LARGE, "none", 1, MACHINE, stored=False) - step_seconds(
        LARGE, "none", 1, MACHINE, stored=True
    ) == pytest.approx(trunk)
