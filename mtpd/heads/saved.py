"""Heads on disk: `config.json` beside `model.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mtpd.errors import UserError
from mtpd.files import fingerprint_file, sealed, tensors_written, write_whole
from mtpd.heads.base import Heads
from mtpd.heads.build import empty_heads, fill_heads
from mtpd.heads.config import CONFIG, WEIGHTS, HeadsConfig, read_config
from mtpd.heads.kinds import KINDS
from mtpd.trunk import Trunk


def save_heads(heads: Heads, directory: str | Path, *, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Writes `config.json` and `model.safetensors` (float32 masters as they are) into a directory.

    Args:
        tensors: the state of the heads, where theirs has no elements because it is partitioned.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = heads.state_dict() if tensors is None else tensors
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with tensors_written(directory / WEIGHTS, tensors, {"format": "pt"}) as beside:
        config = {**heads.config.model_dump(mode="json"), "weights": fingerprint_file(beside)}
        # Weights last: where they are, the heads are whole.
        write_whole(directory / CONFIG, json.dumps(sealed(config), indent=2) + "\n")


def check_weights(directory: str | Path, config: HeadsConfig) -> None:
    """Raises UserError if the weights are not those that were saved together with the config."""
    path = Path(directory) / WEIGHTS
    if config.weights and path.is_file() and fingerprint_file(path) != config.weights:
        raise UserError(
            f"{path}: no readable heads here: it is damaged, its SHA-256 is not the one in {CONFIG}; restore it, or "
            f"delete {path.parent} and repeat the command that made it"
        )


def _trained_with(directory: Path) -> str:
    """Reads which model the recipe beside heads names."""
    try:
        recipe = yaml.safe_load((directory.parent / "recipe.yaml").read_text(encoding="utf-8"))
        model = recipe["model"]
        # A model that was made beside them is described there, and has no name.
        return model if isinstance(model, str) else str(directory.parent / "model")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        return "that is not named beside them"


def load_heads(
    directory: str | Path, trunk: Trunk, *, fingerprint: str | None = None, dtype: torch.dtype = torch.float32
) -> Heads:
    """Loads heads from a directory that `save_heads` wrote, in eval mode, one tensor at a time onto the trunk's device.

    Args:
        trunk: the model they belong to.
        fingerprint: of the trunk; if given, heads of another trunk are refused.
        dtype: number format that they get.

    Raises:
        UserError: a missing or unreadable file, tensors that do not fit, or another trunk.
    """
    directory = Path(directory)
    config = read_config(directory)
    check_weights(directory, config)
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
    # The checksum is of the file: heads that are trained on from here have other weights.
    heads = empty_heads(trunk, config.model_copy(update={"weights": ""}))
    with _reading(directory, heads) as read:
        return fill_heads(heads, read, device=trunk.device, dtype=dtype).eval()


def restore_heads(heads: Heads, directory: str | Path) -> None:
    """Gives heads the weights of a directory that `save_heads` wrote of them, one tensor at a time.

    Raises:
        UserError: a missing or unreadable file, or tensors that do not fit.
    """
    directory = Path(directory)
    check_weights(directory, read_config(directory))
    with _reading(directory, heads) as read, torch.no_grad():
        for name, tensor in heads.state_dict().items():
            tensor.copy_(read(name))


@contextmanager
def _reading(directory: Path, heads: Heads) -> Iterator[Callable[[str], Tensor]]:
    """Within it, a function reads tensors of heads by their names.

    Raises:
        UserError: there is no file that can be read, or its tensors are not those of the heads.
    """
    try:
        file = safe_open(directory / WEIGHTS, framework="pt")
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{directory}: no readable heads here ({reason}); expected {CONFIG} and {WEIGHTS}") from error
    with file:
        expected = {name: list(tensor.shape) for name, tensor in heads.state_dict().items()}
        names = file.keys()
        found = {name: file.get_slice(name).get_shape() for name in names}
        if expected != found:
            odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            raise UserError(
                f"{directory / WEIGHTS}: tensors missing, unexpected or of another shape: {', '.join(odd[:3])}"
            )
        yield file.get_tensor
