"""Heads that draft tokens. One file a kind; a new kind joins by one line in `KINDS`."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from mtpd.errors import UserError
from mtpd.files import write_whole
from mtpd.heads.chain import ChainHeads
from mtpd.heads.config import HeadsConfig
from mtpd.trunk import Trunk

Heads = ChainHeads
KINDS = {"chain": ChainHeads}

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def build_heads(trunk: Trunk, config: HeadsConfig) -> Heads:
    """New heads of the kind that `config` names, with weights yet to be set.

    They get real weights whatever is around: a sharding or meta-device context of the caller would
    leave them without elements.
    """
    with torch.device(trunk.device):
        return KINDS[config.kind](trunk, config)


def save_heads(heads: Heads, directory: str | Path) -> None:
    """Writes `config.json` and `model.safetensors` (float32 masters as they are) into a directory."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in heads.state_dict().items()}
    # Weights last: where they are, the heads are whole.
    write_whole(directory / CONFIG, heads.config.model_dump_json(indent=2) + "\n")
    write_whole(directory / WEIGHTS, save(tensors, metadata={"format": "pt"}))


def load_heads(directory: str | Path, trunk: Trunk, *, fingerprint: str | None = None) -> Heads:
    """Heads from a directory that `save_heads` wrote, in eval mode.

    Args:
        trunk: the model they belong to.
        fingerprint: of the trunk; if given, heads of another trunk are refused.

    Raises:
        UserError: a missing or unreadable file, tensors that do not fit, or another trunk.
    """
    directory = Path(directory)
    try:
        config = HeadsConfig.model_validate_json((directory / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(directory / WEIGHTS)
    except ValidationError as error:
        first = error.errors()[0]
        where = ": ".join(["", *map(str, first["loc"])])
        raise UserError(f"{directory / CONFIG}: no readable heads here{where}: {first['msg']}") from error
    except (OSError, SafetensorError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{directory}: no readable heads here ({reason}); expected {CONFIG} and {WEIGHTS}") from error
    if config.kind not in KINDS:
        raise UserError(f"{directory / CONFIG}: kind: {config.kind} is not known; accepted: {', '.join(KINDS)}")
    # Imported heads say no trunk: their shapes have to fit, and they lie in its own checkpoint.
    if fingerprint is not None and config.trunk and config.trunk != fingerprint:
        raise UserError(
            f"{directory}: these heads belong to another trunk ({config.trunk[:12]}, not {fingerprint[:12]})"
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
    heads = build_heads(trunk, config)
    expected = {name: tensor.shape for name, tensor in heads.state_dict().items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if expected != found:
        odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise UserError(f"{directory / WEIGHTS}: tensors missing, unexpected or of another shape: {', '.join(odd[:3])}")
    heads.load_state_dict(tensors)
    return heads.eval()
