"""`mtpd import`: the heads of a checkpoint as mtpd's own, and `mtpd graft`: heads back onto a base that lost them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch

from mtpd.data import builtin_models
from mtpd.data.find_model import check_checkpoint
from mtpd.data.sources import hub_access
from mtpd.errors import UserError
from mtpd.finished_run import IMPORTED
from mtpd.formats.directory import Checkpoint, new_directory, write_beside, write_json
from mtpd.formats.families import FAMILIES
from mtpd.formats.family import OTHER, lookup
from mtpd.formats.find_heads import Native, find_heads, layer_shapes
from mtpd.formats.tensors import stored, write_tensors
from mtpd.formats.to_family import first_heads
from mtpd.heads import CONFIG as HEADS_CONFIG
from mtpd.heads import KINDS, WEIGHTS, Heads, HeadsConfig, build_heads, class_of
from mtpd.heads.chain.config import KIND as CHAIN
from mtpd.recipe.text import to_yaml
from mtpd.trunk import Trunk

OTHERS = "other.safetensors"
"""Beside the heads: tensors of the family that chain heads have no place for."""


def open_checkpoint(name: str) -> Checkpoint:
    """A checkpoint by what `model` in a recipe accepts: a directory, a hub id, `demo` or `tiny`.

    Raises:
        UserError: there is none, or it has no files of its own (a GGUF file).
    """
    if name == "demo":
        return Checkpoint(builtin_models.demo_directory(), shown="demo")
    if name == "tiny":
        return Checkpoint(builtin_models.tiny_directory(), shown="tiny")
    check_checkpoint(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return Checkpoint(path, shown=name)
    with hub_access() as reachable:
        try:
            found = huggingface_hub.snapshot_download(name, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf"])
        except Exception as error:
            reason = "" if reachable else "; the hub cannot be reached and no copy is cached"
            raise UserError(f"model {name}: no such directory, and no hub id that can be had{reason}") from error
    return Checkpoint(Path(found), shown=name)


def import_heads(
    source: str,
    output: Path,
    *,
    family: str | None = None,
    base: str | None = None,
    depth: int | None = None,
    trust_remote_code: bool = False,
) -> Native:
    """Writes a run directory with the heads of a checkpoint.

    Args:
        source: a checkpoint, as `model` in a recipe.
        output: the run directory, which must not exist.
        family: of the heads, where the config does not tell.
        base: the model, for families that keep heads apart from it.
        depth: how many of the heads; for a checkpoint with one, how often it is used in turn. None: all.
        trust_remote_code: whether the run may execute code that comes with the model.

    Raises:
        UserError: as `find_heads` and `open_checkpoint`; an output that exists; a depth that there is not.
    """
    native = find_heads(open_checkpoint(source), family=family, base=open_checkpoint(base) if base else None)
    shared, heads = shape_of(native, depth)
    with new_directory(output) as folder:
        write_heads(native, folder / "heads", depth=heads, shared=shared)
        write_json(folder / IMPORTED, provenance(native, source))
        if native.cannot_run is None:
            form = {"kind": native.family.kind, "depth": heads, "shared": shared, **form_of(native)}
            recipe: dict[str, Any] = {
                "model": base or source,
                "output": str(output),
                "heads": form | _start(native, family),
            }
            if trust_remote_code:
                recipe["trust_remote_code"] = True
            (folder / "recipe.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    return native


def _start(native: Native, family: str | None) -> dict[str, str]:
    """Gives the recipe keys with which a run starts from these heads, where `heads=native` finds them in the base."""
    return {} if native.family.separate or family is not None else {"init": "native"}


def shape_of(native: Native, depth: int | None) -> tuple[bool, int]:
    """Whether the heads share one block, and how many depths they have."""
    wanted = native.count if depth is None else depth
    if wanted < 1 or (native.count > 1 and wanted > native.count):
        accepted = "at least 1" if native.count == 1 else f"1 to {native.count}"
        raise UserError(f"depth: {wanted} is not accepted; accepted: {accepted}, {native.checkpoint.shown} has so many")
    if not KINDS[native.family.kind].loops and wanted > native.count:
        raise UserError(
            f"depth: {wanted} is not accepted; accepted: 1 to {native.count}, {native.family.kind} heads are not reused"
        )
    return native.count == 1 and wanted > 1, wanted


def heads_config(native: Native, *, depth: int, shared: bool, vocabulary: int = 0, trunk: str = "") -> HeadsConfig:
    """Describes heads of mtpd that start as these."""
    kind = native.family.kind
    own = class_of(kind).from_native(
        native.tensors,
        source_layers=native.source_layers if KINDS[kind].loops else [],
        depth=depth,
        shared=shared,
        vocabulary=vocabulary,
    )
    return HeadsConfig(
        kind=kind, depth=depth, hidden_size=native.hidden_size, vocabulary_size=vocabulary, trunk=trunk, **own
    )


def native_heads(
    name: str, trunk: Trunk, *, depth: int, shared: bool, vocabulary: torch.Tensor | None, fingerprint: str
) -> Heads:
    """The heads that a checkpoint has, in memory and float32, to be trained further.

    Args:
        name: the model of a recipe.
        trunk: of the same checkpoint.
        shared: whether the recipe wants one block for all depths.
        vocabulary: token ids of a draft vocabulary, or None.
        fingerprint: of the trunk.

    Raises:
        UserError: the checkpoint has no heads, or ones that mtpd cannot compute.
    """
    native = runnable(name)
    if shared and native.count > 1:
        raise UserError(
            f"heads.shared: true is not accepted for {name}, which has {native.count} heads; accepted: false"
        )
    shared, depth = shape_of(native, depth)
    size = 0 if vocabulary is None else len(vocabulary)
    heads = build_heads(trunk, heads_config(native, depth=depth, shared=shared, vocabulary=size, trunk=fingerprint))
    tensors = {key: tensor.load() for key, tensor in first_heads(native.tensors, 1 if shared else depth).items()}
    if vocabulary is not None:
        tensors = type(heads).native_rows(tensors, vocabulary)
    tensors["vocabulary"] = torch.zeros(0, dtype=torch.long) if vocabulary is None else vocabulary
    heads.load_state_dict(tensors)
    return heads


def native_form(name: str) -> dict[str, Any]:
    """The keys of `heads` in a recipe that say what heads a checkpoint has: all but what a recipe is free to choose.

    Raises:
        UserError: as `native_heads`.
    """
    native = runnable(name)
    return {"kind": native.family.kind, "depth": native.count, **form_of(native)}


def form_of(native: Native) -> dict[str, Any]:
    """Gives the keys of `heads` in a recipe that native heads of their kind need beside kind and depth."""
    return dict(KINDS[native.family.kind].native or {})


def runnable(name: str) -> Native:
    """The heads of a checkpoint, if mtpd can compute them."""
    native = find_heads(open_checkpoint(name))
    if native.cannot_run:
        raise UserError(f"heads.init: native is not accepted for {name}: {native.cannot_run}")
    return native


def write_heads(native: Native, folder: Path, *, depth: int, shared: bool) -> None:
    """`heads/` of a run: streamed, the tensors bit for bit as they are."""
    folder.mkdir(parents=True)
    tensors = {name: tensor for name, tensor in native.tensors.items() if not name.startswith(OTHER)}
    if native.cannot_run is None:
        tensors = first_heads(tensors, 1 if shared else depth)
        # A buffer that heads of a run have: the tokens of a draft vocabulary, here none.
        tensors["vocabulary"] = stored(torch.zeros(0, dtype=torch.long))
        config = heads_config(native, depth=depth, shared=shared)
        (folder / HEADS_CONFIG).write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    others = {name: tensor for name, tensor in native.tensors.items() if name.startswith(OTHER)}
    if others:
        write_tensors(folder / OTHERS, others)
    write_tensors(folder / WEIGHTS, tensors)


def provenance(native: Native, source: str) -> dict[str, Any]:
    """Contents of `import.json`."""
    return {
        "schema": 1,
        "source": source,
        "family": native.family.name,
        "heads": native.count,
        "cannot_run": native.cannot_run,
        "tensors": sorted(native.raw),
    }


def graft(base: str, *, original: str, output: Path, family: str | None = None) -> Native:
    """Writes the base with the original's MTP tensors, as they are; all other files are the base's.

    Args:
        base: a fine-tuned checkpoint that lost its heads.
        original: the checkpoint that it was tuned from, or another one with heads of the same shapes.

    Raises:
        UserError: the base has heads already, or is of other sizes than the original.
    """
    tuned, source = open_checkpoint(base), find_heads(open_checkpoint(original), family=family)
    present = sorted(set(source.raw) & set(tuned.tensors))
    if present:
        raise UserError(f"{base}: has MTP heads already (such as {present[0]}); accepted: a base without them")
    for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        mine, theirs = tuned.text_config.get(key), source.checkpoint.text_config.get(key)
        if mine != theirs:
            raise UserError(f"{base}: {key} is {mine}, and {theirs} in {original}; they are no base and its original")
    mine_layers, theirs_layers = (layer_shapes(each, without=set(source.raw)) for each in (tuned, source.checkpoint))
    if tuned.quantisation is None and source.checkpoint.quantisation is None and mine_layers != theirs_layers:
        raise UserError(f"{base}: its layers have other shapes than those of {original}")
    config = without_declarations(tuned.config, details=False)
    for key in source.family.counts:
        if any(lookup(each, key) is not None for each in (source.checkpoint.config, source.checkpoint.text_config)):
            set_key(config, key, source.count + source.family.main_too, nested="text_config" in config)
    exclude_from_quantisation(config, sorted({name.rsplit(".", 1)[0] for name in source.raw}))
    with new_directory(output) as folder:
        write_beside(tuned, folder, source.raw, config, without=())
    return source


def without_declarations(config: Mapping[str, Any], *, details: bool = True) -> dict[str, Any]:
    """A copy of a config that declares no MTP heads, so that what is then written says once how many there are.

    Args:
        details: whether what a family says of its heads besides their number goes too.
    """
    counts = {key for family in FAMILIES.values() if family.kind == CHAIN.name for key in family.counts}
    gone = {key for key in config if key in counts or (details and key.startswith("mtp_"))}
    found = {key: value for key, value in config.items() if key not in gone}
    if isinstance(nested := found.get("text_config"), dict):
        found["text_config"] = without_declarations(nested, details=details)
    return found


def set_key(config: dict[str, Any], key: str, value: Any, *, nested: bool) -> None:
    """Sets a dotted key where the family has it: in the text config if there is one and the key is not deeper."""
    *path, last = key.split(".")
    place = config
    if nested and not path:
        config["text_config"] = place = dict(config["text_config"])
    for step in path:
        place[step] = dict(place.get(step) or {})
        place = place[step]
    place[last] = value


IGNORING = {
    "fp8": "modules_to_not_convert",
    "awq": "modules_to_not_convert",
    "mxfp4": "modules_to_not_convert",
    "torchao": "modules_to_not_convert",
    "bitsandbytes": "llm_int8_skip_modules",
    "compressed-tensors": "ignore",
    "modelopt": "ignore",
}
"""By quantisation method, the config key that names modules which are not quantised."""


def exclude_from_quantisation(config: dict[str, Any], modules: list[str]) -> None:
    """Names the heads' modules in the base's quantisation config, so that loaders leave them in 16 bits.

    Raises:
        UserError: a method that is not known to have such a list.
    """
    settings = config.get("quantization_config")
    if not isinstance(settings, dict):
        return
    method = settings.get("quant_method")
    if method not in IGNORING:
        raise UserError(
            f"quantization_config.quant_method: {method} is not supported for a base of heads in 16 bits; "
            f"accepted: {', '.join(IGNORING)}"
        )
    key = IGNORING[method]
    if method == "compressed-tensors":
        # Its names mean a module alone, and not what lies in it; behind `re:` stands how a name begins.
        modules = [rf"re:{re.escape(module)}(\.|$)" for module in modules]
    config["quantization_config"] = {**settings, key: sorted({*(settings.get(key) or ()), *modules})}


def read_imported(folder: Path) -> dict[str, Any] | None:
    """`import.json` of a run directory, or None where the heads are a run's own."""
    path = folder / IMPORTED
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
