"""Files of rows: JSON in its forms, CSV, Parquet; compressed or not; folders of shards. Rows come one by one."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from mtpd.data.rows.left_out import Unusable
from mtpd.errors import UserError

Rows = Iterator[tuple[str, Any]]
"""Pairs of a place that messages name (file:line) and a row. A row may be `Unusable`: what is wrong with it."""

JSON, TABLES, PARQUET = (".jsonl", ".json", ".ndjson"), (".csv", ".tsv"), (".parquet",)
COMPRESSED = (".gz", ".zst")
READ = (*JSON, *TABLES, *PARQUET)
CHUNK = 1 << 20
"""Characters that are read at a time."""


def kind_of(path: Path) -> str:
    """The ending that says what a file holds, without that of its compression; empty for a file that is not read."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    ending = name.suffix.lower()
    return ending if ending in READ and not (ending in PARQUET and name != path) else ""


def file_rows(path: Path, *, split: str = "train") -> Rows:
    """The rows of a file.

    Args:
        split: which list of a JSON object that holds several.

    Raises:
        UserError: a missing file, one that cannot be read, or of another kind.
    """
    kind = kind_of(path)
    if not kind:
        raise UserError(
            f"data.prompts: {path}: is no file of rows; accepted: {', '.join(READ)}, and those of text "
            f"with {' or '.join(COMPRESSED)}"
        )
    try:
        if kind in PARQUET:
            yield from _parquet(path)
            return
        with _opened(path) as file:
            if kind in TABLES:
                yield from _table(path, file, "\t" if kind == ".tsv" else ",")
            else:
                yield from _json(path, file, split, lines=kind != ".json")
    except FileNotFoundError as error:
        raise UserError(f"data.prompts: {path}: no such file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8 ({error.reason} after byte {error.start})") from error
    except (OSError, EOFError) as error:
        raise UserError(f"data.prompts: {path}: cannot read: {getattr(error, 'strerror', None) or error}") from error


def _opened(path: Path) -> IO[str]:
    ending = path.suffix.lower()
    if ending == ".gz":
        return io.TextIOWrapper(cast(IO[bytes], gzip.open(path)), encoding="utf-8-sig", newline="")
    if ending == ".zst":
        import pyarrow  # type: ignore[import-untyped]  # takes time to import

        return io.TextIOWrapper(
            cast(IO[bytes], pyarrow.input_stream(str(path), compression="zstd")), encoding="utf-8-sig", newline=""
        )
    return open(path, encoding="utf-8-sig", newline="")


def _lines(path: Path, lines: Iterator[str] | IO[str]) -> Rows:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{path}:{number}"
            try:
                yield place, json.loads(line)
            except (ValueError, RecursionError) as error:
                what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                yield place, Unusable("no JSON", f"{place}: not a JSON object on one line ({what})")


def _json(path: Path, file: IO[str], split: str, *, lines: bool) -> Rows:
    """An array, an object with a list of rows, or one object a line, as the name of the file says."""
    start = ""
    while not start.strip() and (read := file.read(CHUNK)):
        start += read
    start = start.lstrip()
    if start.startswith("["):
        yield from _array(path, file, start[1:])
        return
    first, newline, rest = start.partition("\n")
    if lines or (newline and rest.strip() and _is_object(first)):
        yield from _lines(path, _joined(start, file))
        return
    text = start + file.read()
    try:
        content = json.loads(text) if text else []
    except (ValueError, RecursionError):
        yield from _lines(path, iter(text.split("\n")))
        return
    lists = {key: value for key, value in content.items() if _is_list(value)} if isinstance(content, dict) else {}
    own = (
        set(content) & {"messages", "conversations", "turns", "prompt", "text"} if isinstance(content, dict) else set()
    )
    if own or not isinstance(content, dict):
        yield f"{path}:1", content
    elif split in lists or len(lists) == 1:
        name = split if split in lists else next(iter(lists))
        yield from ((f"{path}: {name}[{index}]", row) for index, row in enumerate(lists[name]))
    elif lists:
        raise UserError(f"{path}: holds several lists ({', '.join(lists)}); accepted: one of them as data.split")
    else:
        yield f"{path}:1", content


def _array(path: Path, file: IO[str], text: str) -> Rows:
    """The items of a JSON array, as far as it is read: an array may be larger than the memory."""
    decoder, index = json.JSONDecoder(), 0
    place, more = 0, True
    while True:
        while place < len(text) and text[place] in " \t\r\n,":
            place += 1
        if place < len(text) and text[place] == "]":
            return
        where = f"{path}[{index}]"
        try:
            if place >= len(text):
                raise json.JSONDecodeError("the array has no end", text, place)
            row, end = decoder.raw_decode(text, place)
            # A number at the end of what was read may go on.
            whole = end < len(text)
        except (ValueError, RecursionError) as error:
            row, end, whole = error, place, False
        if not whole and more:
            read = file.read(max(CHUNK, len(text) - place))
            text, place, more = text[place:] + read, 0, bool(read)
            continue
        if isinstance(row, Exception):
            what = row.msg if isinstance(row, json.JSONDecodeError) else str(row)
            yield where, Unusable("no JSON", f"{where}: not JSON ({what}); what follows is not read")
            return
        yield where, row
        index, place = index + 1, end


def _joined(start: str, file: IO[str]) -> Iterator[str]:
    """Lines of a file of which the start was read."""
    # `splitlines` would break at characters that stand in strings.
    *whole, last = start.split("\n")
    yield from whole
    yield last + file.readline()
    yield from file


def _table(path: Path, file: IO[str], delimiter: str) -> Rows:
    csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        for row in reader:
            place = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                yield (
                    place,
                    Unusable(
                        "cells and columns differ",
                        f"{place}: has not the {len(reader.fieldnames or ())} cells of the header",
                    ),
                )
            else:
                yield place, row
    except csv.Error as error:
        raise UserError(f"{path}: not a table with commas ({error})") from error


def _parquet(path: Path) -> Rows:
    import pyarrow  # takes time to import
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    yield f"{path} row {number}", row
                    number += 1
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: cannot be read as Parquet ({str(error).splitlines()[0]})") from error


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)
