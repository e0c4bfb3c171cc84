"""Costs of passes on this machine: measured once for a shape, kept, and never in the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import random_heads, tiny_trunk
from kinds import random_kind
from test_shared_layers import deep, shared

from mtpd.decode import costs as costs_module
from mtpd.decode.costs import SIZES, machine_costs, measure_costs
from mtpd.decode.model import Model
from mtpd.decode.planner import Costs
from mtpd.heads import Heads
from mtpd.trunk import Trunk


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setattr("mtpd.decode.costs.CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "costs"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Costs]:
    """What was measured, not read."""
    found: list[Costs] = []

    def watched(*args: Any) -> Costs:
        found.append(measure_costs(*args))
        return found[-1]

    monkeypatch.setattr(costs_module, "measure_costs", watched)
    return found


@pytest.mark.parametrize("kind", ["none", "chain", "linear", "medusa", "btree", "shared layers", "few tokens"])
def test_costs_of_every_kind(llama: Trunk, kind: str) -> None:
    """Fault: heads whose drafts cannot be timed, so that nothing is generated with them."""
    trunk, heads = llama, None
    if kind == "chain":
        heads = random_heads(llama)
    elif kind == "few tokens":
        heads = random_heads(llama, vocabulary=torch.tensor([5, 17, 40]))
    elif kind == "shared layers":
        trunk = deep()
        heads = shared(trunk, "medusa", 2)
    elif kind != "none":
        heads = random_kind(llama, kind)
    found = measure_costs(trunk, heads)
    assert sorted(found.passes) == sorted(SIZES)
    seconds = [found.passes[size] for size in sorted(SIZES)]
    assert seconds[0] > 0
    assert seconds == sorted(seconds), "a wider pass is never cheaper"
    assert (found.head > 0) == (kind != "none")


def test_costs_are_measured_once(llama: Trunk, cache: Path, measured: list[Costs]) -> None:
    """Fault: each process waits for a measurement, or heads of another shape take over what was measured."""
    first = machine_costs(llama, random_heads(llama))
    assert measured == [first]
    assert machine_costs(llama, random_heads(llama)) == first
    assert len(measured) == 1
    for heads in (None, random_heads(llama, depth=2)):
        machine_costs(llama, heads)
    machine_costs(tiny_trunk("qwen3"), None)
    assert len(measured) == 4 == len(list(cache.iterdir()))
    again = machine_costs(llama, random_heads(llama), anew=True)
    assert measured[4:] == [again]
    assert machine_costs(llama, random_heads(llama)) == again
    # A model asks once, and those made of it ask no more.
    model = Model(llama, random_heads(llama))
    assert model.costs is model.drafting_with(sources=("lookup",)).costs
    assert model.costs == again
    assert model.measure_costs() == model.costs == measured[5]


@pytest.mark.parametrize("damage", ["cut", "number", "keys", "no object", "types", "bytes"])
def test_damaged_costs_are_measured_over(llama: Trunk, cache: Path, measured: list[Costs], damage: str) -> None:
    """Fault: a cache that is damaged stops decoding, or decides what is drafted."""
    machine_costs(llama, None)
    [file] = cache.iterdir()
    whole = file.read_text()
    content = json.loads(whole)
    damaged = {
        "cut": whole[: len(whole) // 2].encode(),
        "number": json.dumps({**content, "head": 7.0}).encode(),
        "keys": b'{"passes": {}}',
        "no object": b"[]",
        "types": b'{"passes": [1], "head": 0}',
        "bytes": b"\xff\xfe",
    }[damage]
    file.write_bytes(damaged)
    second = machine_costs(llama, None)
    assert measured[1:] == [second]
    assert machine_costs(llama, None) == second
    assert len(measured) == 2


def test_a_cache_that_cannot_be_written(llama: Trunk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a home without write permission, or none, ends in an error though nothing has to be kept."""
    (tmp_path / "file").write_text("no folder")
    for place in (tmp_path / "file" / "cache", Path("/proc/mtpd")):
        monkeypatch.setattr("mtpd.decode.costs.CACHE", place)
        heads: Heads | None = None
        assert machine_costs(llama, heads).passes
    assert (tmp_path / "file").read_text() == "no folder"
