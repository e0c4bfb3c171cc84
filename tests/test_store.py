"""The store of hidden states: the trunk's own states, built once, and never another trunk's."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from mtpd.data import store
from mtpd.data.models import load_model
from mtpd.data.packing import PackedRows, Sample, pack
from mtpd.data.store import HiddenStore
from mtpd.errors import MtpdError
from mtpd.files import write_whole
from mtpd.trunk import Trunk


class Setting(NamedTuple):
    trunk: Trunk
    rows: PackedRows
    passes: list[int]


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch) -> Setting:
    """Ten rows in shards of four, and a trunk whose passes are counted."""
    monkeypatch.setattr(store, "SHARD_ROWS", 4)
    trunk = Trunk(load_model("tiny", dtype="bfloat16", device="cpu")[0])
    rows = pack([Sample.of(str(n), [n, 1, 2], [n + 3] * (10 + n % 7)) for n in range(10)], row_length=24)
    passes: list[int] = []
    hidden = trunk.hidden

    def counted(ids: Any, **kwargs: Any) -> Any:
        passes.append(len(ids))
        return hidden(ids, **kwargs)

    monkeypatch.setattr(trunk, "hidden", counted)
    assert len(rows) == 10
    return Setting(trunk, rows, passes)


def build(setting: Setting, directory: Path, key: str = "k") -> HiddenStore:
    return HiddenStore.build(setting.trunk, setting.rows, directory, key=key, batch_rows=3, progress=False)


def test_states_are_the_trunks_own(setting: Setting, tmp_path: Path) -> None:
    """Rows stored under another index, or states computed across document borders."""
    build(setting, tmp_path)
    # As the workers of a data loader receive it.
    opened = pickle.loads(pickle.dumps(HiddenStore.open(tmp_path, key="k")))  # noqa: S301
    assert len(opened) == 10
    assert opened[0].dtype == torch.bfloat16
    for index in (0, 3, 4, 9):
        row = setting.rows[index]
        expected = setting.trunk.hidden(row["input_ids"][None], position_ids=row["position_ids"][None])[0]
        torch.testing.assert_close(opened[index].float(), expected.float(), atol=0.05, rtol=0.05)
    with pytest.raises(IndexError):
        opened[10]


def test_an_interrupted_build_continues_by_shards(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build that starts anew after each kill never ends on a machine that is often interrupted."""
    write, written = write_whole, []

    def killed(path: Path, content: Any) -> None:
        written.append(path.name)
        if len(written) == 4:  # the index after the second shard
            raise KeyboardInterrupt
        write(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(store, "write_whole", killed)
        with pytest.raises(KeyboardInterrupt):
            build(setting, tmp_path)
    with pytest.raises(MtpdError, match="not finished"):
        HiddenStore.open(tmp_path, key="k")
    setting.passes.clear()
    build(setting, tmp_path)
    assert sum(setting.passes) == 6, "the first shard was computed again"
    setting.passes.clear()
    build(setting, tmp_path)
    assert not setting.passes
    HiddenStore.open(tmp_path, key="k")


def test_a_damaged_shard_is_found_and_built_again(setting: Setting, tmp_path: Path) -> None:
    """Bytes that changed on the disk and are trained on."""
    states = build(setting, tmp_path)[9].clone()
    shard = tmp_path / "hidden-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(MtpdError, match="damaged"):
        HiddenStore.open(tmp_path, key="k")
    setting.passes.clear()
    assert torch.equal(build(setting, tmp_path)[9], states)
    assert sum(setting.passes) == 2


def test_states_of_another_key_are_not_used(setting: Setting, tmp_path: Path) -> None:
    """Hidden states of another trunk or other rows teach nonsense."""
    build(setting, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(MtpdError, match="another trunk or other rows"):
        HiddenStore.open(tmp_path, key="other")
    setting.passes.clear()
    build(setting, tmp_path, key="other")
    assert sum(setting.passes) == 10
    assert (tmp_path / "notes.txt").exists()
    with pytest.raises(MtpdError, match="no store"):
        HiddenStore.open(tmp_path / "none", key="k")


def test_a_full_disk_is_told_before_the_work(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours of trunk passes that end in `No space left on device`."""
    usage = shutil.disk_usage(tmp_path)._replace(free=store.MARGIN + 10 * 24 * 64 * 2 - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(MtpdError, match=r"data\.hidden_states=recompute"):
        build(setting, tmp_path / "new")
    assert not setting.passes
