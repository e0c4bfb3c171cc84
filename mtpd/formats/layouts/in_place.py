"""The base's own MTP tensors replaced: for bases that have heads. Files without any are the base's own."""

from __future__ import annotations

import shutil
from pathlib import Path

from mtpd.errors import MtpdError, UserError
from mtpd.formats.directory import CONFIG, INDEX, Checkpoint, link_others, write_index, write_json
from mtpd.formats.exported_run import Run
from mtpd.formats.find_heads import Native, find_heads
from mtpd.formats.importing import exclude_from_quantisation
from mtpd.formats.layer_names import Tensors
from mtpd.formats.layout import PYTHON, SGLANG, VLLM, Layout
from mtpd.formats.quantised_heads import beside
from mtpd.formats.tensors import Stored, cast, overwrite, write_tensors
from mtpd.formats.to_family import as_family


def refused(run: Run) -> str | None:
    try:
        native = find_heads(run.base)
    except UserError as error:
        return f"{error}; accepted: hf-mtp"
    if native.cannot_run:
        return f"{run.base.shown}: {native.cannot_run}"
    if run.written > native.count:
        return (
            f"the base has {native.count} MTP heads and the run {run.written}; accepted: --depth {native.count}, or "
            "hf-mtp"
        )
    return None


def write(run: Run, folder: Path) -> None:
    """Files with heads are copied and the tensors' bytes overwritten: headers and all else stay as they are."""
    native = find_heads(run.base)
    tensors = run.heads(run.written)
    found = as_family(
        tensors,
        native.family,
        heads=run.written,
        layers=run.base.layers,
        model_type=native.model_type,
        per_head=native.family.per_head(run.base.text_config),
    )
    changed = {name: fitting(name, tensor, native) for name, tensor in found.items()}
    if native.quantised:
        _write_in_16_bits(run.base, folder, native, changed)
        return
    # What is the same already stays a link.
    changed = {name: tensor for name, tensor in changed.items() if not tensor.same(native.raw[name])}
    files = {run.base.file_of[name] for name in changed}
    link_others(run.base.path, folder, without=files)
    for file in sorted(files):
        shutil.copyfile(run.base.path / file, folder / file)
    for name, tensor in changed.items():
        overwrite(folder / run.base.file_of[name], native.raw[name], tensor)


def _write_in_16_bits(base: Checkpoint, folder: Path, native: Native, changed: Tensors) -> None:
    """Heads in bfloat16 where the base has quantised ones: other tensors' bytes stay, scales go, the config says so."""
    stems = {name.rpartition(".")[0] for name in native.quantised}
    gone = {name for name in base.tensors if name.rpartition(".")[0] in stems and beside(name, base.tensors)}
    changed = native.raw | changed
    files = {base.file_of[name] for name in (*changed, *gone)}
    link_others(base.path, folder, without={*files, CONFIG, INDEX})
    for file in sorted(files):
        own = {name: tensor for name, tensor in base.tensors.items() if base.file_of[name] == file}
        write_tensors(
            folder / file, {name: changed.get(name, tensor) for name, tensor in own.items() if name not in gone}
        )
    kept = {name: changed.get(name, tensor) for name, tensor in base.tensors.items() if name not in gone}
    if base.index is not None:
        write_index(folder, {name: base.file_of[name] for name in kept}, sizes=kept)
    config = dict(base.config)
    exclude_from_quantisation(config, sorted({name.rpartition(".")[0] for name in native.raw}))
    write_json(folder / CONFIG, config)


def fitting(name: str, tensor: Stored, native: Native) -> Stored:
    """The tensor in the number format of the one that it replaces."""
    if name not in native.raw:
        raise MtpdError(
            f"{native.checkpoint.shown}: has no tensor {name}, which the heads have; they are of another base"
        )
    old = native.raw[name]
    if old.shape != tensor.shape:
        raise MtpdError(f"{native.checkpoint.shown}: {name} has the shape {old.shape}, and the heads' {tensor.shape}")
    return cast(tensor, old.dtype)


LAYOUT = Layout(
    "in-place",
    "the base with its own MTP tensors replaced; every other file is the base's, byte for byte",
    refused,
    write,
    {
        "transformers": PYTHON % ("", ", use_mtp=True"),
        "vllm": VLLM,
        "sglang": SGLANG,
    },
    rank=0,
    replaces=True,
)
