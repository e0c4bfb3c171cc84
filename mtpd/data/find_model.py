"""Where a model lies that a recipe names, and what is wrong with what lies there. Nothing here loads a model."""

from __future__ import annotations

import json
import math
import shlex
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mtpd.errors import UserError

BUILT_IN = ("demo", "tiny")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
PICKLED = ("pytorch_model*.bin", "*.pth", "*.pt")
ADAPTER = "adapter_config.json"
_GGUF_NUMBERS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of the values in a GGUF header, by the number of their type; 8 is text, 9 a list."""


@dataclass(frozen=True)
class Adapter:
    """A directory that PEFT wrote: a difference to another model, which is its base."""

    path: Path
    base: str


def find_adapter(name: str, base: str | None = None, *, weights: bool = True) -> Adapter | None:
    """Finds the adapter that a name means, and its base; None where it means a model.

    Args:
        base: where its base lies, in place of what the adapter says.
        weights: whether it has to have weights.

    Raises:
        UserError: a base for what is no adapter, or an adapter that says no base, or has no weights.
    """
    path = Path(name).expanduser()
    whole = (path / "config.json").is_file() and _has_weights(path, WEIGHTS)
    if not (path / ADAPTER).is_file() or whole:
        if base is not None:
            raise UserError(f"model_base: {base} is not accepted, since model {name} is no adapter; accepted: null")
        return None
    if weights and not any(path.glob("adapter_model*.safetensors")):
        if (path / "adapter_model.bin").is_file():
            raise UserError(
                f"model {name}: is an adapter with pickled weights alone (adapter_model.bin), which are not read; "
                f"convert them: {_convert_adapter(path)}"
            )
        raise UserError(f"model {name}: is an adapter without weights; is adapter_model.safetensors still to come?")
    base = base or _base_of(path, name)
    if not base:
        raise UserError(f"model {name}: is an adapter that does not say for which model; accepted: that as model_base")
    return Adapter(path, base)


def locate(name: str, *, weights: bool = True) -> tuple[str, bool, dict[str, Any]]:
    """Locates a model for transformers: (place, whether it is local, further options).

    Args:
        weights: whether a directory has to have weights; a configuration alone is enough to plan a run.

    Raises:
        UserError: there is no such path, or it holds something else than a model.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"model {name}: no such file")
        check_gguf(path, name)
        return str(path.parent), True, {"gguf_file": path.name}
    if path.is_dir():
        _check_directory(path, name, weights=weights)
        return str(path), True, {}
    if path.is_file():
        raise UserError(f"model {name}: expected a directory, a .gguf file or a hub id, got another file")
    # A hub id has at most one slash and no leading dot; everything else can only be meant as a path.
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise UserError(f"model {name}: no such directory")
    return name, False, {}


def check_model(name: str, *, base: str | None = None, weights: bool = True) -> None:
    """Raises UserError for a model that `locate` or `find_adapter` refuses; a hub id is not looked up.

    Args:
        base: of an adapter, in place of what it says.
    """
    adapter = find_adapter(name, base, weights=weights)
    if adapter is None:
        if name not in BUILT_IN:
            locate(name, weights=weights)
        return
    try:
        check_model(adapter.base, weights=weights)
    except UserError as error:
        raise refused_base(name, adapter, error) from error


def refused_base(name: str, adapter: Adapter, error: Exception) -> UserError:
    """An adapter whose base cannot be used."""
    return UserError(f"model {name}: is an adapter for {adapter.base} (model_base names another place of it): {error}")


def check_checkpoint(name: str) -> None:
    """Raises UserError for a name that can be no checkpoint of safetensors files; a hub id is not looked up."""
    path = Path(name).expanduser()
    if name in BUILT_IN or path.is_dir():
        return
    if path.suffix == ".gguf":
        raise UserError(f"model {name}: has no safetensors files; a checkpoint directory or a hub id is needed")
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"model {name}: no such directory")


def _check_directory(path: Path, name: str, *, weights: bool) -> None:
    if (path / "recipe.yaml").is_file() and not (path / "config.json").is_file():
        raise UserError(f"model {name}: is a run directory; accepted: the model that its recipe.yaml names")
    if not (path / "config.json").is_file():
        gguf = sorted(path.glob("*.gguf"))
        if gguf:
            raise UserError(f"model {name}: is a folder of .gguf files; accepted: one of them, such as {gguf[0]}")
        held = "holds a tokenizer alone" if (path / "tokenizer_config.json").is_file() else "the directory has no"
        lacking = " and no config.json" if held.endswith("alone") else " config.json"
        raise UserError(
            f"model {name}: {held}{lacking}, so it is no checkpoint of transformers; accepted: a directory that "
            "save_pretrained of a model wrote, a .gguf file or a hub id"
        )
    if not {"model_type", "auto_map"} & _read_config(path / "config.json", name).keys():
        raise UserError(
            f"model {name}: its config.json names no model_type, so it is no model of transformers"
            + (" (heads of mtpd belong to a run directory)" if path.name == "heads" else "")
        )
    if weights and not _has_weights(path, WEIGHTS):
        pickled = next((file.name for pattern in PICKLED for file in path.glob(pattern)), None)
        if pickled is not None:
            raise UserError(
                f"model {name}: has pickled weights alone ({pickled}), which are not read; convert them: "
                f"{convert_command(name, path)}"
            )
        raise UserError(f"model {name}: has config.json and no weights; are the .safetensors files still to come?")


def _read_config(path: Path, name: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model {name}: its config.json cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"model {name}: its config.json holds no JSON object")
    return config


def _has_weights(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(not file.name.startswith("adapter_") for pattern in patterns for file in path.glob(pattern))


def convert_command(name: str, path: Path) -> str:
    """A command that writes a model with pickled weights again, with safetensors, into a directory beside it."""
    target = f"{str(path).rstrip('/')}-safetensors"
    code = (
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f"[part.from_pretrained({name!r}).save_pretrained({target!r}) for part in (M, T)]"
    )
    return f"python -c {shlex.quote(code)}"


def _convert_adapter(path: Path) -> str:
    source, target = str(path / "adapter_model.bin"), str(path / "adapter_model.safetensors")
    code = (
        "import torch, safetensors.torch as s; "
        f"s.save_file({{k: v.clone() for k, v in torch.load({source!r}, weights_only=True).items()}}, {target!r})"
    )
    return f"python -c {shlex.quote(code)}"


def _base_of(path: Path, name: str) -> str:
    """The model that an adapter says it is for; nothing where it says none."""
    try:
        config = json.loads((path / ADAPTER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model {name}: its {ADAPTER} cannot be read ({error})") from error
    found = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    return str(found or "")


def check_gguf(path: Path, name: str) -> None:
    """Raises UserError if a .gguf file is none, or shorter than its header says."""
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"model {name}: is no GGUF file (it begins with other bytes); download it again")
            needed = _gguf_size(file)
    except (struct.error, KeyError, OverflowError, UnicodeDecodeError, MemoryError) as error:
        raise UserError(f"model {name}: is cut off or damaged in its header; download it again") from error
    except OSError as error:
        raise UserError(f"model {name}: cannot be read: {error.strerror}") from error
    size = path.stat().st_size
    if size < needed:
        raise UserError(f"model {name}: is cut off: it has {size:,} of {needed:,} bytes; download it again")


def _gguf_size(file: BinaryIO) -> int:
    """Bytes of the whole file, as its header has it."""
    from gguf.constants import GGML_QUANT_SIZES  # takes a moment to import

    def number(form: str) -> int:
        return int(struct.unpack(f"<{form}", file.read(struct.calcsize(form)))[0])

    def skip_value(kind: int) -> None:
        if kind == 8:
            file.seek(number("Q"), 1)
        elif kind == 9:
            inner, count = number("I"), number("Q")
            if inner in (8, 9):
                for _ in range(count):
                    skip_value(inner)
            else:
                file.seek(_GGUF_NUMBERS[inner] * count, 1)
        else:
            file.seek(_GGUF_NUMBERS[kind], 1)

    number("I")
    tensors, pairs = number("Q"), number("Q")
    alignment = 32
    for _ in range(pairs):
        key = file.read(number("Q")).decode()
        kind = number("I")
        if key == "general.alignment":
            alignment = number("I")
        else:
            skip_value(kind)
    end = 0
    sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
    for _ in range(tensors):
        file.seek(number("Q"), 1)
        elements = math.prod(number("Q") for _ in range(number("I")))
        block, stored = sizes[number("I")]
        end = max(end, number("Q") + elements // block * stored)
    return -(-file.tell() // alignment) * alignment + end
