"""Exports are loaded again: a loader that does not read what was written is found, and nothing is left behind."""

from __future__ import annotations

import copy
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
from mtpd.formats.exported_run import open_run
from mtpd.formats.families import FAMILIES
from mtpd.formats.find_heads import find_heads
from mtpd.formats.layouts import LAYOUTS, mimo_draft
from mtpd.formats.noise_check import Perturbed, perturbed
from mtpd.formats.read_back import MOVES, Reader, movements, reader_of, texts_of, unread
from mtpd.formats.tensors import is_zero
from mtpd.heads import HeadsConfig, build_heads
from mtpd.trunk import Trunk

READ = re.compile(
    r"read back by (\w+).*, every tensor of the heads: CAR_1 ([\d.]+), with noise for heads ([\d.]+), 92 places"
)


@pytest.mark.parametrize(
    ("layout", "loader"), [("hf-mtp", "transformers"), ("hyv3-draft", "mtpd"), ("mimo-draft", "mtpd")]
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
    assert re.search(r"does not read model\.layers\.4\.hnorm\.weight: other numbers there leave", lines[-1])
    assert "`mtpd inspect" in lines[-1]
    assert "--no-perturb writes this one all the same" in lines[-1]
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
    monkeypatch.setattr(mimo_draft.torch, "zeros", torch.ones)
    with pytest.raises(MtpdError, match=r"bias was written, which .* does not have"):
        export(run, tmp_path / "out", to="mimo-draft", perturb=False)
    assert not (tmp_path / "out").exists()


def test_noise_takes_the_place_of_every_tensor(tmp_path: Path) -> None:
    """Fault: a perturbed copy in which a tensor stays, or that writes through a link into the export itself."""
    trunk = architectures.tiny_trunk("llama")
    run = finished_run(tmp_path, trunk, architectures.random_heads(trunk, depth=2))
    export(run, tmp_path / "out", to="hf-mtp", perturb=False)
    native = find_heads(Checkpoint(tmp_path / "out"))
    before = {name: tensor.load() for name, tensor in native.raw.items()}
    with perturbed(native) as spoiled:
        noisy = Checkpoint(spoiled.folder).tensors
        once = {name: noisy[name].load() for name in before}
        assert not any(torch.equal(once[name], tensor) for name, tensor in before.items())
        for kind in spoiled.kinds:
            spoiled.spoil(kind, draw=1)
        assert not any(torch.equal(noisy[name].load(), tensor) for name, tensor in once.items())
        for kind in spoiled.kinds:
            spoiled.spoil(kind)
        assert all(torch.equal(noisy[name].load(), tensor) for name, tensor in once.items())
    assert all(torch.equal(native.raw[name].load(), tensor) for name, tensor in before.items())


EXPORTS = {
    "llama as hf-mtp, bfloat16": ("hf-mtp", "llama", torch.bfloat16),
    "mistral as hf-mtp, float16": ("hf-mtp", "mistral", torch.float16),
    "qwen3 as hf-mtp, float32": ("hf-mtp", "qwen3", torch.float32),
    "qwen3 as hyv3-draft, float32": ("hyv3-draft", "qwen3", torch.float32),
    "llama as mimo-draft, float16": ("mimo-draft", "llama", torch.float16),
    "llama as medusa, bfloat16": ("medusa", "llama", torch.bfloat16),
}
"""What differs in the check: layout and so the loader, the layers' tensors, number formats."""


def small_run(folder: Path, layout: str, name: str, dtype: torch.dtype) -> Path:
    """A run whose heads, as they start out, would hide what is not read: attention and MLP add nothing."""
    trunk = architectures.tiny_trunk(name)
    copy.deepcopy(trunk.model).to(dtype).save_pretrained(folder / "base")
    if layout == "medusa":
        heads = build_heads(trunk, HeadsConfig(kind="medusa", depth=2, hidden_size=32, columns=128))
    else:
        heads = architectures.new_heads(trunk, "identity", depth=1 if layout == "mimo-draft" else 2)
    run = finished_run(folder, trunk, heads, base=folder / "base")
    form = f"{{kind: {heads.config.kind}, depth: {heads.depth}}}"
    (run / "recipe.yaml").write_text(f"model: {folder / 'base'}\noutput: {run}\nheads: {form}\n")
    return run


@pytest.mark.parametrize("case", EXPORTS)
def test_every_kind_of_tensor_has_to_be_read(case: str, tmp_path: Path) -> None:
    """Fault: a check that passes a loader deaf to one kind (k_proj, say), or that accuses one that reads all."""
    layout, name, dtype = EXPORTS[case]
    path = small_run(tmp_path, layout, name, dtype)
    export(path, tmp_path / "out", to=layout, perturb=False)
    run, written = open_run(path), Checkpoint(tmp_path / "out")
    apart = LAYOUTS[layout].apart
    native = find_heads(written, family=LAYOUTS[layout].family, base=run.base if apart else written)
    assert {tensor.dtype for tensor in native.raw.values()} <= {dtype, torch.float32}
    model: Any = AutoModelForCausalLM.from_pretrained(run.base.path if apart else tmp_path / "out", dtype="auto")
    trunk = Trunk(model.eval())
    _, reader = reader_of(run, native, trunk, texts_of(trunk))
    with torch.inference_mode():
        for seed in range(2):
            with perturbed(native, seed=seed) as noisy:
                moved = movements(reader, noisy)
                assert not unread(native, moved), "a loader that reads everything is not accused"
                for kind, shares in moved.items():
                    theirs = native.names[noisy.kinds[kind][0]]
                    if layout == "mimo-draft" and theirs.endswith("_proj.bias"):
                        assert max(shares) == 0.0, "a Llama has no biases"
                        continue
                    # Ten times what the check asks for, and nothing at all where the tensor is not read.
                    assert min(shares) > 10 * MOVES, kind
                    deaf = movements(ignoring(kind, noisy, reader), noisy, kinds=[kind])
                    assert max(deaf[kind]) < MOVES / 10, kind
                    # Biases of zero need not be read.
                    assert theirs in unread(native, deaf) or is_zero(native.raw[theirs]), kind


def ignoring(kind: str, noisy: Perturbed, reader: Reader) -> Reader:
    """A loader that has numbers of its own for one kind of tensor."""

    def read(folder: Path) -> list[torch.Tensor]:
        noisy.spoil(kind, draw=2)
        return reader(folder)

    return read


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
        find_heads(Checkpoint(tmp_path / "out"), family=FAMILIES["transformers"]),
    )
    assert held.keys() == read.state_dict().keys()
    for key, tensor in read.state_dict().items():
        assert torch.equal(held[key], tensor), key
