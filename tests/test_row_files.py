"""Files of rows: forms of JSON, tables, compression, folders, and files that cannot be read."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from datasets import Dataset, DatasetDict
from pyarrow import parquet

from mtpd.data import sources
from mtpd.data.prompts import load_prompts
from mtpd.data.rows import files
from mtpd.data.rows.files import file_rows
from mtpd.data.rows.left_out import Unusable
from mtpd.errors import UserError
from mtpd.recipe import parse_recipe
from mtpd.run.check import check_recipe

ROWS: list[dict[str, Any]] = [{"prompt": "one\u2028two"}, {"prompt": "grüß"}, {"prompt": "three"}]
TEXTS = [row["prompt"] for row in ROWS]


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


FORMS = {
    "rows.jsonl": jsonl(ROWS),
    "rows.ndjson": "\ufeff" + jsonl(ROWS).replace("\n", "\r\n"),
    "lines.json": jsonl(ROWS),
    "array.json": json.dumps(ROWS),
    "indented.json": json.dumps(ROWS, indent=2),
    "array.jsonl": json.dumps(ROWS),
    "object.json": json.dumps({"version": 1, "data": ROWS}),
    "splits.json": json.dumps({"test": [{"prompt": "no"}], "train": ROWS}, indent=1),
    "rows.csv": "prompt,other\n" + "".join(f'"{text}",1\n' for text in TEXTS),
    "rows.tsv": "prompt\tother\n" + "".join(f"{text}\t1\n" for text in TEXTS),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_forms_of_files(name: str, ending: str, tmp_path: Path) -> None:
    """Fault: a common form of file is refused, or read as another one."""
    path, content = tmp_path / (name + ending), FORMS[name].encode()
    if ending == ".gz":
        content = gzip.compress(content)
    if ending == ".zst":
        with pyarrow.CompressedOutputStream(str(path), "zstd") as out:
            out.write(content)
    else:
        path.write_bytes(content)
    assert [prompt.text for prompt in load_prompts(str(path))] == TEXTS


def test_parquet_with_nested_columns(tmp_path: Path) -> None:
    """Fault: what columnar files fill with null in every message is taken for a field that the message has."""
    messages = [
        {"role": "user", "content": "hello", "name": None},
        {"role": "assistant", "content": "hi", "name": "me"},
    ]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": messages}] * 3), tmp_path / "rows.parquet")
    (first, *_) = found = load_prompts(str(tmp_path / "rows.parquet"))
    assert (len(found), first.prompt) == (3, [{"role": "user", "content": "hello"}])
    assert first.response == [{"role": "assistant", "content": "hi", "name": "me"}]


def test_folders_of_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: only one shard is read, shards of another split are, or rows of different forms are refused."""
    monkeypatch.setattr(sources, "hub_reachable", lambda: pytest.fail("the hub was asked"))
    odd = {"messages": [{"role": "user", "content": [{"type": "text", "text": "parts"}]}], "tools": []}
    (tmp_path / "train-00000.jsonl").write_text(jsonl([*ROWS, odd]))
    (tmp_path / "train-00001.jsonl.gz").write_bytes(gzip.compress(jsonl([{"prompt": "four"}]).encode()))
    (tmp_path / "test-00000.jsonl").write_text(jsonl([{"prompt": "held out"}]))
    assert [prompt.text for prompt in load_prompts(str(tmp_path))] == [*TEXTS, "parts", "four"]
    assert [prompt.text for prompt in load_prompts(str(tmp_path), split="test")] == ["held out"]
    with pytest.raises(UserError, match="split dev"):
        load_prompts(str(tmp_path), split="dev")


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    """Fault: what `datasets` itself wrote cannot be read, or another split is taken."""
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}).save_to_disk(tmp_path / "two")
    assert [prompt.text for prompt in load_prompts(str(tmp_path / "one"))] == TEXTS
    assert [prompt.text for prompt in load_prompts(str(tmp_path / "two"))] == TEXTS
    assert [prompt.text for prompt in load_prompts(str(tmp_path / "two"), split="test")] == TEXTS[:1]
    with pytest.raises(UserError, match=r"split dev: is not there; accepted: train, test"):
        load_prompts(str(tmp_path / "two"), split="dev")
    check_recipe(
        parse_recipe({"model": "tiny", "output": str(tmp_path / "run"), "data": {"prompts": str(tmp_path / "one")}})
    )


def test_data_sets_by_subset_and_split(tmp_path: Path) -> None:
    """Fault: the subset or the split of a data set with several is ignored."""
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- {config_name: a, data_files: [{split: dev, path: a.jsonl}]}\n"
        "- {config_name: b, data_files: [{split: dev, path: b.jsonl}]}\n---\n"
    )
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(jsonl([{"prompt": name}]))
    assert [prompt.text for prompt in load_prompts(str(tmp_path), subset="b", split="dev")] == ["b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl.gz", b"no gzip", r"rows\.jsonl\.gz: cannot read: Not a gzipped file"),
        ("rows.jsonl.gz", gzip.compress(jsonl(ROWS * 99).encode(), mtime=0)[:40], r"rows\.jsonl\.gz: cannot read: "),
        ("rows.jsonl.zst", b"no zstd", r"rows\.jsonl\.zst: cannot read: "),
        ("rows.parquet", b"no parquet", r"rows\.parquet: cannot be read as Parquet"),
        ("rows.json", b"{", r"rows\.json:1: not a JSON object"),
        ("rows.json", b'[{"prompt": "a"}, {"prompt"', r"rows\.json\[1\]: not JSON .*what follows is not read"),
        ("rows.json", b'{"a": [{"prompt": "a"}], "b": [{"prompt": "b"}]}', r"holds several lists \(a, b\)"),
        ("rows.csv", b"prompt\na,b\n", r"rows\.csv:2: has not the 1 cells of the header"),
        ("rows.csv", b'prompt\n"a', r"rows\.csv: not a table"),
        ("rows.xlsx", b"", r"rows\.xlsx: is no file of rows; accepted: \.jsonl, \.json"),
        ("rows.jsonl", b"\xff\xfe{}", r"rows\.jsonl: not text in UTF-8"),
    ],
)
def test_files_that_cannot_be_read(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    """Fault: a traceback, a half file that is taken for a whole one, or a message without the file."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_prompts(str(path))
    assert "\n" not in str(caught.value)


def test_arrays_are_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a row that stands across two pieces is lost, cut, or ends the file."""
    rows = [{"prompt": "ab" * n, "n": n} for n in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "numbers.json").write_text("[1, 23, 456]")
    for chunk in (1, 2, 7, 64, 1000):
        monkeypatch.setattr(files, "CHUNK", chunk)
        assert [row for _, row in file_rows(tmp_path / "rows.json")] == rows
        assert [row for _, row in file_rows(tmp_path / "numbers.json")] == [1, 23, 456]
    (tmp_path / "torn.json").write_text(json.dumps(rows)[:-100])
    found = [row for _, row in file_rows(tmp_path / "torn.json")]
    assert found[:-1] == rows[: len(found) - 1]
    assert isinstance(found[-1], Unusable)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_memory_is_bounded_where_a_limit_is_drawn(name: str, tmp_path: Path) -> None:
    """Fault: a file that does not fit into memory is read as a whole before some rows of it are drawn."""
    rows = [{"prompt": f"{n} " + "words " * 2000} for n in range(1500)]
    content = {"rows.jsonl": jsonl(rows), "rows.json": json.dumps(rows)}.get(name)
    path = tmp_path / name
    path.write_text(content or "prompt\n" + "".join(f"{row['prompt']}\n" for row in rows))
    assert path.stat().st_size > 17e6
    load_prompts(str(path), limit=5)
    tracemalloc.start()
    try:
        assert len(load_prompts(str(path), limit=5)) == 5
        assert tracemalloc.get_traced_memory()[1] < 9e6
    finally:
        tracemalloc.stop()
