"""A layout of exports and a family of checkpoints are one file: whatever asks for one asks its entry."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from test_checkpoints_export import llama_run
from test_kinds import PACKAGE, strings

from mtpd.cli import main
from mtpd.formats import family, layout
from mtpd.formats.directory import Checkpoint, write_beside
from mtpd.formats.exported_run import Run, changed_config, open_run
from mtpd.formats.families import FAMILIES
from mtpd.formats.family import Family, layered
from mtpd.formats.find_heads import find_heads
from mtpd.formats.layout import VLLM, Layout
from mtpd.formats.layouts import LAYOUTS
from mtpd.formats.to_family import as_family
from mtpd.heads import KINDS

NAMESAKES = {"transformers"}
"""The name of a family that is one of an engine and of a library too."""


def homes(name: str) -> set[str]:
    """Files of the package with a name as a value, but for those of kinds of heads."""
    files = {file.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py") if name in strings(file)}
    return {file for file in files if not (name in KINDS and file.startswith("heads/"))}


def test_the_name_of_a_layout_stands_in_its_file() -> None:
    """Fault: a table or a condition elsewhere that a new layout would have to be added to."""
    assert len(LAYOUTS) > 5
    for name in LAYOUTS:
        own = {file for file in homes(name) if not file.startswith("formats/families/")}
        # A layout that has the name of its family takes it from there.
        assert own <= {f"formats/layouts/{name.replace('-', '_')}.py"}, name
        assert (PACKAGE / "formats" / "layouts" / f"{name.replace('-', '_')}.py").is_file(), name


def test_the_name_of_a_family_stands_in_one_file() -> None:
    """Fault: a table or a condition elsewhere that a new family would have to be added to."""
    assert len(FAMILIES) > 10
    for name in FAMILIES.keys() - NAMESAKES:
        own = {file for file in homes(name) if not file.startswith("formats/layouts/")}
        assert len(own) == 1, (name, own)
        assert own.pop().startswith("formats/families/"), name


def refused(run: Run) -> str | None:
    return None if run.depth < 3 else "it has room for two heads; accepted: --depth 2"


TWINS = Family(
    name="twins",
    title="two heads in a list",
    model_types=(),
    counts=("num_twins",),
    names=layered("twins.{i}"),
    reference="this test",
)


def write(run: Run, folder: Path) -> None:
    tensors = as_family(run.heads(run.depth), TWINS, heads=run.depth, layers=run.base.layers, model_type=run.model_type)
    write_beside(run.base, folder, tensors, changed_config(run.base, num_twins=run.depth))


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> Layout:
    """A layout and a family from outside of the package."""
    entry = Layout("twin-heads", "a base with twins", refused, write, {"vllm": VLLM}, rank=12, family=TWINS)
    # What `register` adds is taken away again.
    for register, entries, each in ((layout.register, LAYOUTS, entry), (family.register, FAMILIES, TWINS)):
        monkeypatch.setitem(entries, each.name, each)  # type: ignore[arg-type]
        del entries[each.name]
        register(each)  # type: ignore[arg-type]
    return entry


@pytest.mark.parametrize("to", ["twin-heads", "vllm"])
def test_a_layout_from_outside_is_exported_and_read(
    to: str, twins: Layout, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: an edit inside of the package that a layout needs: on the command line, to be chosen, read or served."""
    run, out = llama_run(tmp_path, depth=2), tmp_path / "out"
    assert main(["inspect", str(run)]) == 0
    assert "export --to twin-heads: fits" in capsys.readouterr().out
    assert main(["export", str(run), "--to", to, "-o", str(out)]) == 0
    assert "layout twin-heads" in capsys.readouterr().out
    assert f"\nvllm serve --config {out}/vllm.yaml\n" in (out / "README.md").read_text()
    drafts = {"method": "mtp", "num_speculative_tokens": 2}
    assert yaml.safe_load((out / "vllm.yaml").read_text()) == {"model": str(out), "speculative-config": drafts}
    assert main(["inspect", str(out)]) == 0
    said = capsys.readouterr().out
    assert "export of mtpd, layout twin-heads: a base with twins" in said
    assert "loaded by: vllm" in said
    assert main(["verify", str(out), "--engine", "transformers"]) == 2
    assert "does not load layout twin-heads; accepted: vllm" in capsys.readouterr().err


def test_a_family_from_outside_is_read(twins: Layout, tmp_path: Path) -> None:
    """Fault: an edit inside of the package that a family needs, to be found by its name or to be imported."""
    run, out = llama_run(tmp_path, depth=2), tmp_path / "out"
    assert main(["export", str(run), "--to", "twin-heads", "--no-perturb", "-o", str(out)]) == 0
    assert main(["import", str(out), "--family", "twins", "-o", str(tmp_path / "again")]) == 0
    first, again = open_run(run), open_run(tmp_path / "again")
    assert again.tensors.keys() == first.tensors.keys()
    assert all(torch.equal(tensor.load(), first.tensors[name].load()) for name, tensor in again.tensors.items())
    assert find_heads(Checkpoint(out), family="twins").count == 2


def test_a_run_that_a_layout_from_outside_refuses(
    twins: Layout, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: a refusal that is only heard for layouts that come with the package."""
    run = llama_run(tmp_path, depth=3)
    assert main(["export", str(run), "--to", "twin-heads", "-o", str(tmp_path / "out")]) == 2
    assert "--to twin-heads: it has room for two heads; accepted: --depth 2" in capsys.readouterr().err
