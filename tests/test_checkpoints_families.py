"""Every family: found by its config, imported and written back bit for bit, computed as transformers computes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import native_checkpoints as native
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from mtpd.formats.directory import Checkpoint
from mtpd.formats.families import FAMILIES
from mtpd.formats.find_heads import find_heads
from mtpd.formats.importing import OTHERS, import_heads
from mtpd.formats.tensors import read_header
from mtpd.formats.to_family import as_family
from mtpd.heads import load_heads
from mtpd.trunk import Trunk

COUNTS = {"transformers": 2, "glm4moe": 2}
"""Heads of the tiny checkpoints; the other families have one."""


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, native.Tensors]]:
    """A checkpoint of each family that transformers builds bases of."""
    made = {}
    for name in native.RUNNING:
        folder = tmp_path_factory.mktemp("native") / "checkpoint"
        made[name] = (folder, native.native_checkpoint(name, folder, count=COUNTS.get(name, 1), dtype=torch.bfloat16))
    return made


def imported_tensors(run: Path) -> native.Tensors:
    """All that an import wrote."""
    found = {name: tensor.load() for name, tensor in read_header(run / "heads" / "model.safetensors")[0].items()}
    if (run / "heads" / OTHERS).is_file():
        found |= {name: tensor.load() for name, tensor in read_header(run / "heads" / OTHERS)[0].items()}
    return found


def round_trip(folder: Path, expected: native.Tensors, run: Path, **options: Any) -> None:
    """Imports a checkpoint, writes the imported tensors under the family's names, and compares every bit."""
    found = import_heads(str(folder), run, **options)
    stored = {**read_header(run / "heads" / "model.safetensors")[0]}
    if (run / "heads" / OTHERS).is_file():
        stored |= read_header(run / "heads" / OTHERS)[0]
    back = as_family(
        stored,
        found.family,
        heads=found.count,
        layers=found.base.layers,
        model_type=found.model_type,
        per_head=found.family.per_head(found.checkpoint.text_config),
    )
    copies = {name for name in expected if name.endswith(("embed_tokens.weight", "shared_head.head.weight"))}
    assert set(back) == set(expected) - copies
    for name, tensor in back.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor.load(), expected[name]), name


@pytest.mark.parametrize("name", native.RUNNING)
def test_families_that_run_round_trip(
    running: dict[str, tuple[Path, native.Tensors]], name: str, tmp_path: Path
) -> None:
    """Fault: a tensor renamed, permuted, rounded or left out on the way in or out."""
    folder, tensors = running[name]
    found = find_heads(Checkpoint(folder))
    assert found.family.name == name.removesuffix("-moe") or found.family.name == name
    assert found.cannot_run is None
    round_trip(folder, tensors, tmp_path / "run")


@pytest.mark.parametrize("name", native.BY_NAME)
def test_other_families_round_trip(name: str, tmp_path: Path) -> None:
    """Fault: as above, for families whose heads mtpd does not compute or transformers has no class for."""
    tensors = native.named_checkpoint(name, tmp_path / "checkpoint")
    options: dict[str, Any] = {}
    if FAMILIES[name].separate:
        native.named_checkpoint("fastmtp", tmp_path / "base")
        options["base"] = str(tmp_path / "base")
    if name == "fastmtp":
        options["family"] = name
    round_trip(tmp_path / "checkpoint", tensors, tmp_path / "run", **options)
    said = json.loads((tmp_path / "run" / "import.json").read_text())
    assert (said["cannot_run"] is None) == (tmp_path / "run" / "recipe.yaml").is_file()
    assert said["family"] == name


def test_every_family_has_a_checkpoint_here() -> None:
    """Fault: a family that joins without a test."""
    covered = {FAMILIES[name.removesuffix("-moe")].name if name == "qwen3.5-moe" else name for name in native.RUNNING}
    assert covered | set(native.BY_NAME) == set(FAMILIES)


@pytest.mark.parametrize("name", native.RUNNING)
def test_heads_compute_what_transformers_does(
    running: dict[str, tuple[Path, native.Tensors]], name: str, tmp_path: Path
) -> None:
    """Fault: halves of the projection swapped, a gain less 1 read as a gain, experts in another order."""
    folder, _ = running[name]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    import_heads(str(folder), tmp_path / "run")
    heads = load_heads(tmp_path / "run" / "heads", Trunk(model))
    count = heads.depth
    settings = model.config.get_text_config()
    settings.num_mtp_layers = count
    if getattr(settings, "layer_types", None) is not None:
        settings.mtp_layer_types = ["full_attention"] * count
    if getattr(settings, "mlp_layer_types", None) is not None:
        settings.mtp_mlp_layer_types = ["sparse"] * count
    layered = any(tensor.startswith(f"model.layers.{native.L}.") for tensor in find_heads(Checkpoint(folder)).raw)
    model._keys_to_ignore_on_load_unexpected = (
        [rf"model\.layers\.{native.L + index}\." for index in range(count)] if layered else [r"^mtp\."]
    )
    theirs = MtpModel.from_pretrained(model).eval()
    ids = torch.randint(3, 200, (1, 12), generator=torch.Generator().manual_seed(0))
    trunk = Trunk(model)
    positions = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        theirs_state = trunk.hidden(ids)
        for depth, state in enumerate(heads(trunk, theirs_state, ids, position_ids_BT=positions), start=1):
            # Theirs moves positions with depth; inside of one layer only distances count.
            cache = MtpCache(config=model.config.get_mtp_config())
            theirs_state = theirs.forward_layer(
                depth - 1, theirs_state, positions, cache, input_ids=torch.roll(ids, -depth, dims=1)
            )
            valid = ids.shape[1] - depth
            torch.testing.assert_close(
                trunk.unembedding(state[:, :valid]),
                trunk.unembedding(theirs_state[:, :valid]),
                rtol=1e-4,
                atol=1e-4,
            )
