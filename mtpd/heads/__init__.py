"""Heads that draft tokens. One file a kind; a new kind joins by one line in `KINDS`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from mtpd.errors import UserError
from mtpd.files import fingerprint as sha256
from mtpd.files import fingerprint_file, read_sealed, sealed, write_whole
from mtpd.heads.base import Batch, Heads, Readout
from mtpd.heads.chain import start as chain_start
from mtpd.heads.chain.heads import ChainHeads
from mtpd.heads.circuit import heads as circuit_heads
from mtpd.heads.config import CircuitShape, HeadsConfig, ParallelShape
from mtpd.heads.medusa import heads as medusa
from mtpd.heads.parallel import heads as parallel
from mtpd.heads.shared_layers import heads as shared_layers
from mtpd.heads.shared_layers.heads import SharedLayerHeads
from mtpd.trunk import Trunk

__all__ = [
    "CONFIG",
    "KINDS",
    "WEIGHTS",
    "Batch",
    "Heads",
    "HeadsConfig",
    "Kind",
    "Readout",
    "build_heads",
    "chain_of",
    "check_weights",
    "configure_heads",
    "load_heads",
    "read_config",
    "save_heads",
    "start_heads",
]


@dataclass(frozen=True)
class Kind:
    """One kind of heads."""

    heads: Callable[[Trunk, HeadsConfig], Heads]
    configure: Callable[[Mapping[str, Any], Trunk], dict[str, Any]]
    """From the `heads` section of a recipe, and `columns` (how many tokens can be drafted), what the kind adds to
    `HeadsConfig`. Raises UserError."""
    initialise: Callable[..., bool]
    """(heads, trunk, start, seed) gives the first weights, and says whether they are to be fitted to text."""
    fit: Callable[..., None]
    """(heads, trunk, batches); batches are rows with `hidden`, read several times."""
    adopt: Callable[..., None] | None = None
    """(heads, trunk, others, seed): first weights from other heads of the trunk. Raises UserError."""


KINDS = {
    "chain": Kind(ChainHeads, chain_start.configure, chain_start.start, chain_start.fit),
    "parallel": Kind(parallel.build, parallel.configure, parallel.initialise, parallel.fit, parallel.adopt),
    "medusa": Kind(medusa.MedusaHeads, medusa.configure, medusa.initialise, medusa.fit),
    "circuit": Kind(
        circuit_heads.CircuitHeads,
        circuit_heads.configure,
        circuit_heads.initialise,
        circuit_heads.fit,
        circuit_heads.adopt,
    ),
}
SECTIONS: dict[str, type[BaseModel]] = {"parallel": ParallelShape, "circuit": CircuitShape}
"""Sections of `heads` in a recipe that one kind alone reads, the one of the same name, and their defaults."""

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def build_heads(trunk: Trunk, config: HeadsConfig) -> Heads:
    """New heads of the kind that `config` names, with weights yet to be set.

    They get real weights whatever is around: a sharding or meta-device context of the caller would
    leave them without elements.
    """
    with torch.device(trunk.device):
        heads = KINDS[config.kind].heads(trunk, config)
        return SharedLayerHeads(trunk, config, heads) if config.shared_layers else heads


def configure_heads(settings: Mapping[str, Any], trunk: Trunk, *, vocabulary: int, fingerprint: str) -> HeadsConfig:
    """What a recipe means for this trunk.

    Args:
        settings: the `heads` section of a recipe.
        vocabulary: tokens of the draft vocabulary, 0 for all.
        fingerprint: of the trunk.

    Raises:
        UserError: a key that the kind does not read, or a value that it does not take.
    """
    kind = settings["kind"]
    for section, shape in SECTIONS.items():
        for key, value in settings[section].items():
            if kind != section and value not in (None, shape.model_fields[key].default):
                raise UserError(
                    f"heads.{section}.{key}: {value} does nothing with heads.kind: {kind}; accepted: kind: {section}"
                )
    if settings["shared"] and kind != "chain":
        raise UserError(f"heads.shared: true does nothing with heads.kind: {kind}; accepted: false, or kind: chain")
    if settings["adapters"] and kind != "chain":
        raise UserError(
            f"heads.adapters: {settings['adapters']} is not accepted with heads.kind: {kind}; accepted: 0, or chain"
        )
    if settings["source"] is not None and settings["init"] is not None:
        raise UserError(
            f"heads.init: {settings['init']} does nothing with heads.source, which says how heads start; accepted: null"
        )
    common = {"kind": kind, "depth": settings["depth"], "hidden_size": trunk.hidden_size}
    common |= shared_layers.configure(settings, trunk)
    tokens = trunk.tokens or trunk.unembedding.weight.shape[0]
    own = KINDS[kind].configure({**settings, "columns": vocabulary or tokens}, trunk)
    return HeadsConfig(**common, **own, vocabulary_size=vocabulary, trunk=fingerprint)


def start_heads(
    heads: Heads,
    trunk: Trunk,
    start: str | None,
    batches: Callable[[], Iterable[dict[str, Any]]],
    *,
    seed: int = 0,
    source: Heads | None = None,
) -> None:
    """Gives new heads their first weights.

    Args:
        start: `heads.init` of a recipe; None is what the kind prefers.
        batches: gives rows with `hidden`, the states that the heads read, for starts that are fitted; called for those
            alone.
        seed: of the random parts.
        source: other heads of the trunk to start from, instead.

    Raises:
        UserError: the source is none that this kind can start from.
    """
    kind = KINDS[heads.config.kind]
    if isinstance(heads, SharedLayerHeads):
        heads.start(seed)
        whole, below = heads, batches
        heads, batches = whole.inner, lambda: list(whole.above(trunk, below()))
    if source is not None:
        if kind.adopt is None:
            accepted = ", ".join(name for name, each in KINDS.items() if each.adopt is not None)
            raise UserError(
                f"heads.source: heads of kind {heads.config.kind} start from no others; accepted: {accepted}"
            )
        kind.adopt(heads, trunk, source, seed=seed)
        return
    if kind.initialise(heads, trunk, start, seed=seed):
        kind.fit(heads, trunk, batches())


def chain_of(heads: Heads, *, what: str) -> ChainHeads:
    """The heads, where only a chain is served.

    Args:
        what: begins the message, such as the name of a format.

    Raises:
        UserError: they are of another kind.
    """
    if not isinstance(heads, ChainHeads):
        raise UserError(f"{what}: heads of kind {heads.config.kind} are not accepted; accepted: chain")
    return heads


def save_heads(heads: Heads, directory: str | Path, *, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Writes `config.json` and `model.safetensors` (float32 masters as they are) into a directory.

    Args:
        tensors: the state of the heads, where theirs has no elements because it is partitioned.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = heads.state_dict() if tensors is None else tensors
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    weights = save(tensors, metadata={"format": "pt"})
    config = {**heads.config.model_dump(mode="json"), "weights": sha256(weights)}
    # Weights last: where they are, the heads are whole.
    write_whole(directory / CONFIG, json.dumps(sealed(config), indent=2) + "\n")
    write_whole(directory / WEIGHTS, weights)


def read_config(directory: str | Path) -> HeadsConfig:
    """What saved heads say about themselves.

    Raises:
        UserError: `config.json` is missing, damaged, or none of heads.
    """
    path = Path(directory) / CONFIG
    try:
        return HeadsConfig.model_validate(read_sealed(path, refusal="no readable heads here"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ": ".join(["", *map(str, first["loc"])])
        raise UserError(f"{path}: no readable heads here{where}: {first['msg']}") from error


def check_weights(directory: str | Path, config: HeadsConfig) -> None:
    """Raises UserError if the weights are not those that were saved together with the config."""
    path = Path(directory) / WEIGHTS
    if config.weights and path.is_file() and fingerprint_file(path) != config.weights:
        raise UserError(
            f"{path}: no readable heads here: it is damaged, its SHA-256 is not the one in {CONFIG}; restore it, or "
            f"delete {path.parent} and repeat the command that made it"
        )


def _trained_with(directory: Path) -> str:
    """The model that the recipe beside heads names."""
    try:
        recipe = yaml.safe_load((directory.parent / "recipe.yaml").read_text(encoding="utf-8"))
        return str(recipe["model"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        return "that is not named beside them"


def load_heads(directory: str | Path, trunk: Trunk, *, fingerprint: str | None = None) -> Heads:
    """Heads from a directory that `save_heads` wrote, in eval mode.

    Args:
        trunk: the model they belong to.
        fingerprint: of the trunk; if given, heads of another trunk are refused.

    Raises:
        UserError: a missing or unreadable file, tensors that do not fit, or another trunk.
    """
    directory = Path(directory)
    config = read_config(directory)
    check_weights(directory, config)
    try:
        tensors = load_file(directory / WEIGHTS)
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{directory}: no readable heads here ({reason}); expected {CONFIG} and {WEIGHTS}") from error
    if config.kind not in KINDS:
        raise UserError(f"{directory / CONFIG}: kind: {config.kind} is not known; accepted: {', '.join(KINDS)}")
    # Imported heads say no trunk: their shapes have to fit, and they lie in its own checkpoint.
    if fingerprint is not None and config.trunk and config.trunk != fingerprint:
        theirs, ours = _trained_with(directory), trunk.model.config.name_or_path or trunk.name
        raise UserError(
            f"{directory}: these heads belong to another trunk ({config.trunk[:12]}, not {fingerprint[:12]}): they "
            f"were trained with model {theirs}, and this is {ours}; give that model, as it was then, in the same dtype"
        )
    if config.hidden_size != trunk.hidden_size:
        raise UserError(
            f"{directory}: these heads have width {config.hidden_size}, and the trunk has {trunk.hidden_size}"
        )
    if not all(0 <= layer < trunk.depth for layer in config.source_layers):
        raise UserError(
            f"{directory / CONFIG}: source_layers: {config.source_layers}; accepted: 0 to {trunk.depth - 1}, "
            "the layers of the trunk"
        )
    if config.shared_layers > trunk.depth:
        raise UserError(
            f"{directory / CONFIG}: shared_layers: {config.shared_layers}; accepted: 0 to {trunk.depth}, the layers of "
            "the trunk"
        )
    # It is of the file: what is trained on from here has other weights.
    heads = build_heads(trunk, config.model_copy(update={"weights": ""}))
    expected = {name: tensor.shape for name, tensor in heads.state_dict().items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if expected != found:
        odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise UserError(f"{directory / WEIGHTS}: tensors missing, unexpected or of another shape: {', '.join(odd[:3])}")
    heads.load_state_dict(tensors)
    return heads.eval()
