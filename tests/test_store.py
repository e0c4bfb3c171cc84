"""The store of hidden states: the trunk's own states, computed once, and never another trunk's."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path
from typing import Any, NamedTuple

import psutil  # type: ignore[import-untyped]
import pytest
import torch

from mtpd.data import disk_store, store, store_index
from mtpd.data.disk_store import DiskStore, fill
from mtpd.data.models import load_model
from mtpd.data.packing import PackedRows, Sample, collate, pack
from mtpd.data.store import MemoryStore, store_key, with_hidden
from mtpd.errors import MtpdError
from mtpd.files import write_whole
from mtpd.train.rows import TrainingRows
from mtpd.trunk import Trunk

KEY = {"trunk": "a", "tokenizer": "b", "prompts": "c", "packed rows": "d"}


class Setting(NamedTuple):
    trunk: Trunk
    rows: PackedRows
    passes: list[int]

    def batch(self, *numbers: int) -> dict[str, Any]:
        return collate([{**self.rows[number], "row": number} for number in numbers])


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch) -> Setting:
    """Ten rows in shards of four, and a trunk whose passes are counted."""
    trunk = Trunk(load_model("tiny", dtype="bfloat16", device="cpu")[0])
    rows = pack([Sample.of(str(n), [n, 1, 2], [n + 3] * (10 + n % 7)) for n in range(10)], row_length=24)
    monkeypatch.setattr(disk_store, "SHARD_BYTES", 4 * 24 * trunk.hidden_size * 2)
    passes: list[int] = []
    hidden = trunk.hidden

    def counted(ids: Any, **kwargs: Any) -> Any:
        passes.append(len(ids))
        return hidden(ids, **kwargs)

    monkeypatch.setattr(trunk, "hidden", counted)
    assert len(rows) == 10
    return Setting(trunk, rows, passes)


def filled(setting: Setting, directory: Path) -> DiskStore:
    found = DiskStore(directory, setting.trunk, setting.rows, key=KEY)
    fill(found, setting.trunk, setting.rows, batch_rows=2, progress=False)
    return found


def test_states_are_the_trunks_own(setting: Setting, tmp_path: Path) -> None:
    """Fault: rows stored under another number, or states computed across document borders."""
    found = filled(setting, tmp_path)
    reopened = DiskStore(tmp_path, setting.trunk, setting.rows, key=KEY)
    assert reopened[0].dtype == torch.bfloat16
    for number in range(10):
        row = setting.rows[number]
        expected = setting.trunk.hidden(row["input_ids"][None], position_ids=row["position_ids"][None])[0]
        torch.testing.assert_close(reopened[number].float(), expected.float(), atol=0.05, rtol=0.05)
        assert torch.equal(found[number], reopened[number])
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) < 1.1 * store.bytes_needed(
        10, 24, setting.trunk
    )


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_the_trunk_runs_once_for_each_row(setting: Setting, tmp_path: Path, kind: str) -> None:
    """Fault: a second epoch that runs the trunk again; rows of a half-known batch that change places."""
    found: Any = MemoryStore(setting.trunk, setting.rows)
    if kind == "disk":
        found = DiskStore(tmp_path, setting.trunk, setting.rows, key=KEY)
    first = {}
    for numbers in ((7, 2, 5), (9, 0, 1), (3, 8, 4), (6,)):
        batch = with_hidden(setting.batch(*numbers), setting.trunk, found)
        assert "row" not in batch
        first |= dict(zip(numbers, batch["hidden"].clone(), strict=True))
    assert sum(setting.passes) == 10
    mixed = with_hidden(setting.batch(4, 9, 7), setting.trunk, found)
    for state, number in zip(mixed["hidden"], (4, 9, 7), strict=True):
        assert torch.equal(state, first[number])
    assert sum(setting.passes) == 10
    # A store that lacks one row of a batch computes that row alone, and keeps the order.
    other = MemoryStore(setting.trunk, setting.rows)
    other.put([4, 7], torch.stack([first[4], first[7]]))
    mixed = with_hidden(setting.batch(4, 9, 7), setting.trunk, other)
    assert setting.passes[-1] == 1
    for state, number in zip(mixed["hidden"], (4, 9, 7), strict=True):
        torch.testing.assert_close(state.float(), first[number].float(), atol=0.05, rtol=0.05)
    without = with_hidden(setting.batch(4), setting.trunk, None)
    assert without["hidden"].shape == (1, 24, setting.trunk.hidden_size)


def test_what_is_interrupted_continues_by_shards(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: a store that starts anew after each kill never ends on a machine that is often interrupted."""
    write, written = write_whole, []

    def killed(path: Path, content: Any) -> None:
        written.append(path.name)
        if len(written) == 2:  # the index after the second shard
            raise RuntimeError("killed")
        write(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(disk_store, "write_whole", killed)
        with pytest.raises(RuntimeError, match="killed"):
            filled(setting, tmp_path)
    setting.passes.clear()
    filled(setting, tmp_path)
    assert sum(setting.passes) == 6, "the first shard was computed again"
    setting.passes.clear()
    whole = filled(setting, tmp_path)
    assert not setting.passes
    assert all(number in whole for number in range(10))


def test_a_damaged_shard_is_computed_again(setting: Setting, tmp_path: Path) -> None:
    """Fault: bytes that changed on the disk are trained on; a command that fills a store and leaves it damaged."""
    states = filled(setting, tmp_path)[9].clone()
    shard = tmp_path / "hidden-00002.safetensors"
    for fills in (True, False):
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
        setting.passes.clear()
        if fills:
            assert torch.equal(filled(setting, tmp_path)[9], states)
        else:
            opened = DiskStore(tmp_path, setting.trunk, setting.rows, key=KEY)
            opened.expect(9)
            batch = with_hidden(setting.batch(8, 1, 9), setting.trunk, opened)
            opened.flush()
            torch.testing.assert_close(batch["hidden"][2].float(), states.float(), atol=0.05, rtol=0.05)
        assert sum(setting.passes) == 2
        assert all(row in DiskStore(tmp_path, setting.trunk, setting.rows, key=KEY) for row in range(10))


def test_opening_reads_no_states(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: minutes of hashing before the first step; a file of another size that is found while training."""
    states = filled(setting, tmp_path)
    hashed: list[str] = []
    inside = disk_store.fingerprint_file

    def seen(path: Path) -> str:
        hashed.append(path.name)
        return inside(path)

    monkeypatch.setattr(disk_store, "fingerprint_file", seen)
    opened = DiskStore(tmp_path, setting.trunk, setting.rows, key=KEY)
    assert not hashed
    for _ in range(2):
        assert torch.equal(opened[5], states[5])
    assert hashed == ["hidden-00001.safetensors"]
    shard = tmp_path / "hidden-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert [row for row in range(10) if row not in DiskStore(tmp_path, setting.trunk, setting.rows, key=KEY)] == [
        0,
        1,
        2,
        3,
    ]


def test_rows_are_read_ahead(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: rows that are expected keep more memory than they may, or one is given in the place of another."""
    states = filled(setting, tmp_path)
    monkeypatch.setattr(disk_store, "AHEAD_BYTES", 3 * store.bytes_needed(1, 24, setting.trunk))
    opened = DiskStore(tmp_path, setting.trunk, setting.rows, key=KEY)
    loaded = TrainingRows(setting.rows, stores=[opened])
    for number in (4, 0, 4, 7, 2, 9):
        loaded[number]
    assert sorted(opened._ahead) == [0, 4, 7]
    for number in (0, 4, 7, 2, 9):
        assert torch.equal(opened[number], states[number])
    assert not opened._ahead
    assert loaded.__getstate__()["stores"] == ()


def test_states_are_written_while_others_come(setting: Setting, tmp_path: Path) -> None:
    """Fault: rows on their way to the disk that are computed again, changed by those after them, or lost."""
    found = DiskStore(tmp_path, setting.trunk, setting.rows, key=KEY)
    release = threading.Event()
    found._writer.submit(release.wait)
    shape = (1, 24, setting.trunk.hidden_size)
    states = {row: torch.full(shape, float(row), dtype=torch.bfloat16) for row in range(10)}
    for row in range(8):
        found.put([row], states[row])
    # Two shards are full and neither is written.
    assert not list(tmp_path.glob("*"))
    assert all(row in found and torch.equal(found[row], states[row][0]) for row in range(8))
    threading.Timer(0.2, release.set).start()
    found.put([8, 9], torch.cat([states[8], states[9]]))
    found.flush()
    assert not found._held
    reopened = DiskStore(tmp_path, setting.trunk, setting.rows, key=KEY)
    reopened.check()
    assert all(torch.equal(each[row], states[row][0]) for row in range(10) for each in (found, reopened))


def test_a_disk_that_fails_ends_the_run(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: an error in the thread that writes is never seen, and the store misses what it said it had."""

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left")

    found = DiskStore(tmp_path, setting.trunk, setting.rows, key=KEY)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(MtpdError, match=r"hidden-0000\d.safetensors: cannot write: No space left \(.*needed"):
            fill(found, setting.trunk, setting.rows, batch_rows=2, progress=False)
        found._writer.shutdown()
    assert not list(tmp_path.glob("*.safetensors"))
    setting.passes.clear()
    filled(setting, tmp_path)
    assert sum(setting.passes) == 10


@pytest.mark.parametrize("name", KEY)
def test_states_of_something_else_are_refused(setting: Setting, tmp_path: Path, name: str) -> None:
    """Fault: hidden states of another trunk or other rows teach nonsense; or another run's are deleted."""
    filled(setting, tmp_path)
    with pytest.raises(MtpdError, match=f"of another run: other {name}; delete the directory"):
        DiskStore(tmp_path, setting.trunk, setting.rows, key={**KEY, name: "z"})
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    (tmp_path / "index.json").write_text('{"schema": 1}')
    with pytest.raises(MtpdError, match="not readable as the index"):
        DiskStore(tmp_path, setting.trunk, setting.rows, key=KEY)


def test_the_key_names_all_that_states_depend_on(setting: Setting) -> None:
    """Fault: a changed chat template, prompt or packing that leaves the key as it was."""
    tokenizer: Any = load_model("tiny", device="cpu")[1]
    key = store_key("trunk", tokenizer, ["p", "q"], setting.rows)
    assert key == store_key("trunk", tokenizer, ["q", "p"], setting.rows)
    assert key.keys() == KEY.keys()
    tokenizer.chat_template = "other"
    other = store_key("other", tokenizer, ["p"], pack([Sample.of("", [1], [2])], row_length=24))
    assert not set(key.values()) & set(other.values())


def test_a_full_disk_is_told_before_the_work(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: hours of trunk passes that end in `No space left on device`."""
    needed = 10 * 24 * setting.trunk.hidden_size * 2
    usage = shutil.disk_usage(tmp_path)._replace(free=store_index.MARGIN + needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(MtpdError, match=r"need [\d.]+ MB, .* has [\d.]+ MB free; set data\.hidden_states"):
        DiskStore(tmp_path / "new", setting.trunk, setting.rows, key=KEY)
    assert not (tmp_path / "new").exists()


def test_too_little_memory_is_told_before_the_work(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a run that the system kills at the end of its first epoch."""
    memory = psutil.virtual_memory()._replace(available=10 * 24 * setting.trunk.hidden_size * 2 - 1)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(MtpdError, match=r"memory needs [\d.]+ MB .* accepted then: disk or recompute"):
        MemoryStore(setting.trunk, setting.rows)
