"""A checkpoint directory of transformers: its config, its safetensors files, and writing a new one.

A directory is written beside its place and renamed when it is whole. Files that do not change are hard
links to the original where the file system allows it, and copies elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from mtpd.errors import UserError
from mtpd.files import replacing
from mtpd.formats.tensors import Stored, read_header, write_tensors

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
SHARD = 5 * 10**9
"""Bytes of a shard at most."""


class Checkpoint:
    """A directory with `config.json` and safetensors files.

    Raises:
        UserError: what makes it unreadable, in one line: no config, pickled weights, missing shards, an index
            that does not say what is in the files.
    """

    def __init__(self, path: Path, *, shown: str | None = None) -> None:
        self.path = path
        self.shown = shown or str(path)
        if not path.is_dir():
            raise UserError(f"{self.shown}: no such directory; expected a checkpoint with {CONFIG} and {SINGLE}")
        if not (path / CONFIG).is_file() and (found := _something_else(path)):
            raise UserError(f"{self.shown}: {found}")
        self.config = read_json(path / CONFIG, what="a checkpoint's config")
        self.index: dict[str, str] | None = None
        index = path / INDEX
        if index.is_file():
            self.index = read_json(index, what="a safetensors index").get("weight_map")
            if not isinstance(self.index, dict) or not all(isinstance(file, str) for file in self.index.values()):
                raise UserError(f"{index}: has no weight_map of tensor names to files")
            self.files = sorted(set(self.index.values()))
            absent = [file for file in self.files if not (path / file).is_file()]
            if absent:
                raise UserError(
                    f"{index}: names {len(absent)} files that are not there, among them {absent[0]}; "
                    "copy the missing shards into the directory"
                )
        elif (path / SINGLE).is_file():
            # Some models have the same weights in another form beside it.
            self.files = [SINGLE]
        else:
            self.files = sorted(file.name for file in path.glob("*.safetensors"))
            if not self.files:
                pickled = sorted(file.name for file in path.iterdir() if file.suffix in PICKLED)
                if pickled:
                    raise UserError(
                        f"{path / pickled[0]}: pickled weights are not read, they can run code; convert them once with "
                        "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...), which writes safetensors"
                    )
                raise UserError(
                    f"{self.shown}: has no safetensors files, only a config; copy the model's weights there"
                )

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """All tensors by name."""
        found: dict[str, Stored] = {}
        self.file_of: dict[str, str] = {}
        for file in self.files:
            for name, tensor in read_header(self.path / file)[0].items():
                if self.index is not None and self.index.get(name) != file:
                    said = self.index.get(name, "no file")
                    raise UserError(f"{self.path / INDEX}: says that {name} is in {said}, and it is in {file}")
                if name in found:
                    raise UserError(f"{self.path / file}: holds {name}, which {self.file_of[name]} holds too")
                found[name] = tensor
                self.file_of[name] = file
        lost = sorted(set(self.index or ()) - set(found))
        if lost:
            raise UserError(
                f"{self.path / INDEX}: names {len(lost)} tensors that their files lack, among them {lost[0]}"
            )
        return found

    @cached_property
    def text_config(self) -> dict[str, Any]:
        """The part of the config that describes the language model."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    @property
    def layers(self) -> int:
        """Decoder layers of the base, MTP layers not counted."""
        return int(self.text_config.get("num_hidden_layers", 0))

    @property
    def quantisation(self) -> dict[str, Any] | None:
        found = self.config.get("quantization_config") or self.text_config.get("quantization_config")
        return found if isinstance(found, dict) else None


def _something_else(path: Path) -> str | None:
    """Says what a directory without `config.json` holds, and what to give in its place; None where it is not known."""
    adapter = path / "adapter_config.json"
    if adapter.is_file():
        base = read_json(adapter, what="an adapter's config").get("base_model_name_or_path") or "its base"
        return (
            f"holds an adapter of {base} and no model; merge it first (peft: merge_and_unload(), then save_pretrained) "
            f"and give the merged directory, or give {base}"
        )
    words = any((path / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))
    if words and not any(path.glob("*.safetensors")):
        return f"holds a tokenizer and no model ({CONFIG} and {SINGLE} are missing); give the directory of the model"
    return None


def read_json(path: Path, *, what: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: it is missing or is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be read as {what}: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: cannot be read as {what}: it holds no object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A place to write a directory in that then appears whole at `path`, or not at all.

    Raises:
        UserError: there is something at `path` already.
    """
    if path.exists() or path.is_symlink():
        raise UserError(f"output: {path} exists; choose another output, or delete it first")
    with replacing(path) as folder:
        yield folder


def link(source: Path, target: Path) -> None:
    """The same file under another name: a hard link, or a copy where there can be none."""
    source = source.resolve()  # a hub cache holds symbolic links into its blobs
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def link_others(source: Path, target: Path, *, without: set[str]) -> None:
    """Links all files of a directory and its folders but those in `without` (names relative to it)."""
    for file in sorted(source.rglob("*")):
        name = file.relative_to(source)
        hidden = any(piece.startswith(".") for piece in name.parts)
        if file.is_file() and str(name) not in without and not hidden and file.suffix not in PICKLED:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            link(file, target / name)


def write_beside(
    base: Checkpoint,
    target: Path,
    added: Mapping[str, Stored],
    config: Mapping[str, Any],
    *,
    without: Sequence[str] = ("README.md",),
) -> None:
    """The base with another config and one more shard with further tensors, under one index.

    A base of one file gets the name of a shard: readers look for `model.safetensors` first, and would not
    see the index.
    """
    name = "model-mtp.safetensors"
    link_others(base.path, target, without={*base.files, INDEX, CONFIG, *without})
    write_json(target / CONFIG, config)
    files = {file: file for file in base.files}
    if len(base.files) == 1:
        files = {base.files[0]: "model-base.safetensors"}
    for file, renamed in files.items():
        link(base.path / file, target / renamed)
    write_tensors(target / name, added)
    weights = {tensor: files[base.file_of[tensor]] for tensor in base.tensors}
    write_index(target, weights | dict.fromkeys(added, name), sizes={**base.tensors, **added})


def write_sharded(target: Path, tensors: Mapping[str, Stored], *, limit: int = SHARD) -> None:
    """Tensors in files of at most `limit` bytes (a tensor is never split), with an index if there are several."""
    shards: list[dict[str, Stored]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(each.size for each in shards[-1].values()) + tensor.size > limit:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        write_tensors(target / SINGLE, tensors)
        return
    weights: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(target / file, shard)
        weights |= dict.fromkeys(shard, file)
    write_index(target, weights, sizes=tensors)


def write_index(target: Path, weights: Mapping[str, str], *, sizes: Mapping[str, Stored]) -> None:
    """`model.safetensors.index.json`."""
    total = sum(tensor.size for tensor in sizes.values())
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
    write_json(target / INDEX, content)
