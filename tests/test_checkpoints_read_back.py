"""Exports are loaded again: a loader that does not read what was written is found, and nothing is left behind."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from conftest import learn
from test_checkpoints_export import finished_run
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import MtpModel

from mtpd.cli import main
from mtpd.decode.transformers_mtp import mtp_in_transformers
from mtpd.errors import MtpdError
from mtpd.formats.directory import Checkpoint
from mtpd.formats.engines.with_transformers import mtp_model
from mtpd.formats.export import export
from mtpd.formats.families import FAMILIES
from mtpd.formats.find_heads import find_heads
from mtpd.formats.layouts import mimo
from mtpd.formats.noise_check import perturbed

READ = re.compile(r"read back by (\w+).*: CAR_1 ([\d.]+), with noise for heads ([\d.]+), 92 places")


@pytest.mark.parametrize(
    ("layout", "loader"), [("hf-mtp", "transformers"), ("glm4moe", "transformers"), ("mimo-draft", "mtpd")]
)
def test_heads_made_noise_accept_less(layout: str, loader: str, tmp_path: Path) -> None:
    """Fault: an export that nobody has loaded; one loaded with heads of its loader's own."""
    trunk = architectures.tiny_trunk("llama")
    run = finished_run(tmp_path, trunk, architectures.new_heads(trunk, "identity", depth=1))
    _, said = export(run, tmp_path / "out", to=layout)
    found = READ.search(said)
    assert found is not None, said
    assert found[1] == loader
    assert float(found[2]) > 0.3 > 0.1 > float(found[3])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "run"]


def test_a_tensor_that_transformers_does_not_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: one norm of the second head that its loader leaves at ones, unseen because drafts are accepted anyway."""
    trunk = architectures.tiny_trunk("llama")
    run = finished_run(tmp_path, trunk, architectures.random_heads(trunk, depth=2))
    whole = MtpModel.from_pretrained

    def deaf(model: Any, **options: Any) -> Any:
        loaded = whole(model, **options)
        torch.nn.init.ones_(loaded.layers[1].hnorm.weight)
        return loaded

    monkeypatch.setattr(MtpModel, "from_pretrained", deaf)
    assert main(["export", str(run), "--to", "hf-mtp", "-o", str(tmp_path / "out")]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert re.search(r"does not read model\.layers\.4\.hnorm\.weight: noise in its place changes nothing", lines[-1])
    assert {path.name for path in tmp_path.iterdir()} == {"base", "run"}
    assert main(["export", str(run), "--to", "hf-mtp", "--no-perturb", "-o", str(tmp_path / "out")]) == 0


def test_a_loader_that_takes_other_heads_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a loader that has heads of its own, whatever the file says; the message names what it does not read."""
    trunk = architectures.tiny_trunk("llama")
    run = finished_run(tmp_path, trunk, architectures.new_heads(trunk, "identity", depth=1))
    kept: list[Any] = []
    whole = MtpModel.from_pretrained

    def first(model: Any, **options: Any) -> Any:
        kept.append(kept[0] if kept else whole(model, **options))
        return kept[0]

    monkeypatch.setattr(MtpModel, "from_pretrained", first)
    with pytest.raises(MtpdError, match=r"does not read model\.layers\.3\..* and 12 more"):
        export(run, tmp_path / "out", to="hf-mtp")
    assert not (tmp_path / "out").exists()


def test_tensors_beyond_those_of_the_heads_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: biases in a draft model that the trained heads do not have."""
    trunk = architectures.tiny_trunk("llama")
    run = finished_run(tmp_path, trunk, architectures.random_heads(trunk, depth=1))
    monkeypatch.setattr(mimo.torch, "zeros", torch.ones)
    with pytest.raises(MtpdError, match=r"bias was written, which .* does not have"):
        export(run, tmp_path / "out", to="mimo-draft", perturb=False)
    assert not (tmp_path / "out").exists()


def test_noise_takes_the_place_of_every_tensor_and_goes_again(tmp_path: Path) -> None:
    """Fault: a perturbed copy in which a tensor stays, or that writes through a link into the export itself."""
    trunk = architectures.tiny_trunk("llama")
    run = finished_run(tmp_path, trunk, architectures.random_heads(trunk, depth=2))
    export(run, tmp_path / "out", to="hf-mtp", perturb=False)
    native = find_heads(Checkpoint(tmp_path / "out"))
    before = {name: tensor.load() for name, tensor in native.raw.items()}
    with perturbed(native) as copy:
        noisy = Checkpoint(copy.folder).tensors
        assert not any(torch.equal(noisy[name].load(), tensor) for name, tensor in before.items())
        for kind in copy.kinds:
            copy.give_back(kind)
        assert all(torch.equal(noisy[name].load(), tensor) for name, tensor in before.items())
    assert all(torch.equal(native.raw[name].load(), tensor) for name, tensor in before.items())


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_heads_in_memory_are_those_of_the_export(name: str, tmp_path: Path) -> None:
    """Fault: `mtpd bench --against transformers` that measures other heads than the export holds."""
    learned = learn(name)
    run = finished_run(tmp_path, learned.trunk, learned.half)
    export(run, tmp_path / "out", to="hf-mtp", perturb=False)
    model: Any = learned.trunk.model
    with mtp_in_transformers(learned.trunk, learned.half):
        held = MtpModel.from_pretrained(model).state_dict()
    read = mtp_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        tmp_path / "out",
        find_heads(Checkpoint(tmp_path / "out"), family=FAMILIES["transformers"].name),
    )
    assert held.keys() == read.state_dict().keys()
    for key, tensor in read.state_dict().items():
        assert torch.equal(held[key], tensor), key
