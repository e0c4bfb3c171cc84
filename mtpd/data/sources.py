"""Rows of prompts as they are stored: the built-in set, a file, a folder of files, or a `datasets` data set.

The hub's clients try each file five times over half a minute before they give up. `hub_access` asks
once and briefly first: a missing network becomes one clear line, and a cached copy is used at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

from mtpd.data import stdlib
from mtpd.data.rows.files import COMPRESSED, READ, Rows, file_rows, kind_of
from mtpd.errors import UserError

BUILTIN = Path(__file__).parent / "builtin"
HELD_OUT = "heldout-"
OTHER = "other"
"""The file of prompts of other families than those that are trained on."""
BUILTIN_SETS = ("builtin", "builtin-held-out", "builtin-other")


def read(source: str, *, split: str, subset: str | None) -> Rows:
    """The rows of a source, as `mtpd.data.prompts.load_prompts` takes it.

    Raises:
        UserError: a missing file or data set, or one that cannot be read.
    """
    if source in BUILTIN_SETS:
        return _builtin_rows(source)
    if source in (stdlib.SOURCE, stdlib.HELD_OUT):
        return stdlib.pieces(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder_rows(path, split, subset)
    if at_hand(source):
        return file_rows(path, split=split)
    return _dataset_rows(source, split, subset, local=False)


@cache
def hub_reachable() -> bool:
    """True when the hub answers within a few seconds, whatever the answer."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # of which library depends on the version of the hub's client
        return False
    return True


@contextmanager
def hub_access(*, needed: bool = True) -> Iterator[bool]:
    """Within it the hub's clients use only cached copies if the hub cannot be reached. Gives whether it can.

    Args:
        needed: False where nothing but local files is read; then the hub is not asked.
    """
    reachable = needed and hub_reachable()
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = not reachable
    try:
        yield reachable
    finally:
        constants.HF_HUB_OFFLINE = before


def built_in(source: str) -> bool:
    """Whether a source comes with mtpd or with Python."""
    return source in (*BUILTIN_SETS, stdlib.SOURCE, stdlib.HELD_OUT)


def at_hand(source: str) -> bool:
    """Whether a source is built in or a file (which may be missing), and so needs no `datasets` library."""
    path = Path(source).expanduser()
    looks_so = path.is_file() or kind_of(path) != "" or source.startswith((".", "/", "~"))
    return built_in(source) or (looks_so and not path.is_dir())


SAVED = ("dataset_info.json", "dataset_dict.json")
"""Files of a folder that `save_to_disk` of datasets wrote."""
DATA = ("*.jsonl", "*.json", "*.csv", "*.tsv", "*.parquet", "*.arrow", "*.txt", "*.zip", "*.gz", "*.zst", "*.py")
"""Files that make a folder one that `datasets` reads."""
ACCEPTED = f"accepted: builtin, a file ({', '.join(READ)}), a folder of data files, or a datasets id"
TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".txt", ".zip", ".gz")


def check_source(source: str, *, key: str, accepted: str = ACCEPTED) -> None:
    """Refuses a source that cannot be read, as far as a look at the file system tells.

    Args:
        key: of the recipe, named in messages.
        accepted: named in messages.

    Raises:
        UserError: a missing file, a file of another kind, or a folder without data.
    """
    path = Path(source).expanduser()
    if built_in(source):
        return
    if path.is_dir():
        if not any(True for pattern in DATA for _ in path.rglob(pattern)):
            raise UserError(f"{key}: {source} is a folder without data files; {accepted}")
    elif path.is_file():
        if not kind_of(path):
            raise UserError(
                f"{key}: {source}: is no file of rows; accepted: {', '.join(READ)}, and those of text with "
                f"{' or '.join(COMPRESSED)}"
            )
        if not os.access(path, os.R_OK):
            raise UserError(f"{key}: {source}: cannot be read (no permission)")
    elif at_hand(source) or path.suffix in TABLES or source.count("/") > 1:
        raise UserError(f"{key}: {source}: no such file; {accepted}")


def _builtin_rows(source: str) -> Rows:
    for path in sorted(BUILTIN.glob("*.jsonl")):
        if _set_of(path) == source:
            yield from file_rows(path)


def _set_of(path: Path) -> str:
    if path.name.startswith(HELD_OUT):
        return "builtin-held-out"
    return "builtin-other" if path.stem == OTHER else "builtin"


def _folder_rows(path: Path, split: str, subset: str | None) -> Rows:
    """The rows of a folder: what `save_to_disk` wrote, shards that are read here, or what `datasets` makes of it."""
    import datasets  # takes seconds to import

    place = f"data.prompts: {path}"
    if any((path / name).is_file() for name in SAVED):
        try:
            found = datasets.load_from_disk(str(path))
        except Exception as error:
            raise UserError(f"{place}: {_reason(error)}") from error
        if isinstance(found, datasets.DatasetDict):
            if split not in found:
                raise UserError(f"{place}, split {split}: is not there; accepted: {', '.join(found)}")
            found = found[split]
        for index, row in enumerate(found):
            yield f"{path} row {index}", row
        return
    shards = _shards(path, split) if subset is None else None
    if shards is None:
        yield from _dataset_rows(str(path), split, subset, local=True)
        return
    for shard in shards:
        yield from file_rows(shard, split=split)


def _shards(path: Path, split: str) -> list[Path] | None:
    """Files of one split of a folder, if all of them are of kinds that are read here."""
    from datasets.data_files import DataFilesDict, get_data_patterns  # takes seconds to import

    try:
        files = DataFilesDict.from_patterns(get_data_patterns(str(path)), base_path=str(path))
    except Exception:  # what it refuses is said by `load_dataset`
        return None
    shards = [Path(file) for file in files.get(split, [])]
    return shards if shards and all(map(kind_of, shards)) else None


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _dataset_rows(source: str, split: str, subset: str | None, *, local: bool) -> Rows:
    from datasets import load_dataset  # takes seconds to import

    place = f"data.prompts: {source}" + (f" ({subset})" if subset else "")
    with hub_access(needed=not local) as reachable:
        try:
            rows = load_dataset(source, subset, split=split)
        except Exception as error:
            if not reachable and not local:
                raise UserError(
                    f"{place}: the hub cannot be reached and no copy is cached; without network these work: "
                    "builtin, a .jsonl file, or a local folder of data"
                ) from error
            raise UserError(f"{place}, split {split}: {_reason(error)}") from error
    for index, row in enumerate(rows):
        yield f"{source}[{split}] row {index}", row
