"""Responses and hidden states by several ranks: those of one process, whatever is killed and however many go on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_ranks

from mtpd.data import disk_store, responses
from mtpd.data.disk_store import DiskStore, fill
from mtpd.data.models import load_model
from mtpd.data.packing import PackedRows, Sample, pack
from mtpd.data.prompts import Prompt
from mtpd.data.responses import generate_responses
from mtpd.errors import UserError
from mtpd.parallel import ranks
from mtpd.trunk import Trunk

CPU = torch.device("cpu")
PROMPTS = [Prompt(f"p{n}", "abcdefghijklmnop"[: 3 + 2 * (n % 5)] + str(n)) for n in range(9)]
KEY = {"trunk": "a", "tokenizer": "b", "prompts": "c", "packed rows": "d"}


@pytest.fixture(scope="module")
def loaded() -> Any:
    return load_model("tiny", dtype="float32", device="cpu")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def respond(loaded: Any, path: Path, killed: int | None = None) -> list[Any]:
    """Answers as rank, where the rank `killed` dies after its second line, in the middle of a third."""
    responses.FLUSH_SECONDS = 0.0
    append, calls = responses._append, []

    def append_and_die(file: Path, lines: str) -> None:
        append(file, lines)
        calls.append(lines)
        if ranks.rank() == killed and len(calls) == 2:
            with open(file, "a") as torn:
                torn.write('{"id": "p')
            die()

    if killed is not None:
        responses._append = append_and_die
    with ranks.joined(CPU):
        model, tokenizer = loaded
        settings: dict[str, Any] = {"trunk": "t", "max_new_tokens": 10, "max_length": 1024, "progress": False}
        samples = generate_responses(
            model, tokenizer, PROMPTS, path, temperature=1.0, batch=2, together=True, **settings
        )
        return [[sample.id, sample.ids] for sample in samples]


def kept(path: Path) -> list[str]:
    """Responses in the file, a line each, without the settings."""
    return path.read_text().splitlines()[1:]


def test_ranks_write_the_responses_of_one_process(loaded: Any, tmp_path: Path) -> None:
    """Fault: prompts that two ranks answer or none does, other samples with other shares, files left behind."""
    alone = respond(loaded, tmp_path / "alone.jsonl")
    ended = in_ranks(respond, loaded, tmp_path / "together.jsonl")
    assert ended.codes == [0, 0], ended.errors
    assert ended.values == [alone, alone]
    assert sorted(kept(tmp_path / "together.jsonl")) == sorted(kept(tmp_path / "alone.jsonl"))
    assert {path.name for path in tmp_path.iterdir()} == {"alone.jsonl", "together.jsonl"}


@pytest.mark.parametrize("count", [1, 3])
def test_killed_ranks_are_continued_by_others(loaded: Any, tmp_path: Path, count: int) -> None:
    """Fault: a kill loses what a rank had answered, or its prompts are answered twice by another number of ranks."""
    path = tmp_path / "r.jsonl"
    alone = respond(loaded, tmp_path / "alone.jsonl")
    ended = in_ranks(respond, loaded, path, 1)
    assert 0 not in ended.codes
    parts = [tmp_path / f"r.rank-{rank}.jsonl" for rank in range(2)]
    before = [line for part in parts for line in kept(part) if line.endswith("}")]
    assert len(before) >= 2
    # As a kill between the merge and the deletion of what was merged leaves it.
    path.write_text(path.read_text() + before[0] + "\n")
    if count == 1:
        assert respond(loaded, path) == alone
    else:
        assert in_ranks(respond, loaded, path, count=count).values == [alone] * count
    lines = kept(path)
    assert set(before) <= set(lines)
    assert sorted(json.loads(line)["id"] for line in lines) == sorted(prompt.id for prompt in PROMPTS)
    assert not any(part.exists() for part in parts)


def test_parts_of_other_settings_are_refused(loaded: Any, tmp_path: Path) -> None:
    """Fault: what ranks of another run left is taken for this run's."""
    header = {"settings": {"trunk": "another"}}
    (tmp_path / "r.rank-1.jsonl").write_text(json.dumps(header) + "\n")
    with pytest.raises(UserError, match=r"r\.rank-1\.jsonl: it was made with another trunk"):
        respond(loaded, tmp_path / "r.jsonl")


def make_rows() -> PackedRows:
    return pack([Sample.of(str(n), [n, 1, 2], [n + 3] * (10 + n % 7)) for n in range(10)], row_length=24)


def store_states(loaded: Any, directory: Path, killed: int | None = None) -> dict[str, Any]:
    """Fills a store as rank, in shards of two rows; the rank `killed` dies before the index of its second shard."""
    trunk, rows = Trunk(loaded[0]), make_rows()
    size, disk_store.SHARD_BYTES = disk_store.SHARD_BYTES, 2 * 24 * trunk.hidden_size * 4
    write, written, passes = disk_store.write_whole, [], [0]
    compute = disk_store.with_hidden

    def write_or_die(path: Path, content: Any) -> None:
        written.append(path)
        if ranks.rank() == killed and len(written) == 2:
            die()
        write(path, content)

    def counted(batch: Any, *args: Any, **options: Any) -> Any:
        passes[0] += len(batch["row"])
        return compute(batch, *args, **options)

    disk_store.with_hidden = counted
    if killed is not None:
        disk_store.write_whole = write_or_die
    try:
        with ranks.joined(CPU):
            found = DiskStore(directory, trunk, rows, key=KEY, together=True)
            fill(found, trunk, rows, batch_rows=2, progress=False)
            states = [found[row].sum().item() for row in range(len(rows))]
            return {"passes": passes[0], "states": states, "shards": sorted(found.index["shards"])}
    finally:
        disk_store.SHARD_BYTES = size
        disk_store.with_hidden = compute
        disk_store.write_whole = write


def test_ranks_fill_a_store_together(loaded: Any, tmp_path: Path) -> None:
    """Fault: a rank that does not see what the others stored, or a row that is computed by two."""
    alone = store_states(loaded, tmp_path / "alone")
    ended = in_ranks(store_states, loaded, tmp_path / "together")
    assert ended.codes == [0, 0], ended.errors
    assert [value["passes"] for value in ended.values] == [5, 5]
    for value in ended.values:
        assert value["states"] == pytest.approx(alone["states"], abs=1e-3)
        assert len(value["shards"]) == 6
    assert store_states(loaded, tmp_path / "together")["passes"] == 0
    assert {path.suffix for path in (tmp_path / "together").iterdir()} == {".safetensors", ".json"}
    assert len(list((tmp_path / "together").glob("index*"))) == 1


@pytest.mark.parametrize("count", [1, 3])
def test_a_store_of_killed_ranks_is_filled_by_others(loaded: Any, tmp_path: Path, count: int) -> None:
    """Fault: a shard without an index is read, one with an index is lost, or a damaged one is trusted by some rank."""
    alone = store_states(loaded, tmp_path / "alone")
    directory = tmp_path / "states"
    assert 0 not in in_ranks(store_states, loaded, directory, 1).codes
    whole = [
        row
        for path in directory.glob("index*.json")
        for shard in json.loads(path.read_text())["shards"].values()
        for row in shard["rows"]
    ]
    assert 2 <= len(whole) < 10
    damaged = sorted(directory.glob("hidden-*.rank-1.safetensors"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    if count == 1:
        values = [store_states(loaded, directory)]
    else:
        values = in_ranks(store_states, loaded, directory, count=count).values
    assert sum(value["passes"] for value in values) == 10 - len(whole) + 2
    for value in values:
        assert value["states"] == pytest.approx(alone["states"], abs=1e-3)
