"""The documents: the site that is built from them, their pictures, and the files that they name."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "mtpd").glob("*/README.md")),
]
# Shared by benchmarks, or drawing what they measured.
NO_BENCHMARKS = {"lab", "measure", "plot", "step_counts", "step_time", "test_gpu", "test_step_time"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    pytest.importorskip("mkdocstrings", reason="the extra `docs` is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_the_site_is_built_without_a_warning(site: Path) -> None:
    """Fault: a link that leads nowhere, a page that no menu has, a name that the reference lacks."""
    reference = (site / "api.html").read_text(encoding="utf-8")
    for name in ("load", "distill", "load_recipe", "Model", "Acceptance", "generate"):
        assert re.search(rf'<h\d id="mtpd\.[\w.]*\b{name}"', reference), name
    assert (site / "inside" / "train.html").is_file()


def test_the_site_asks_no_other_machine(site: Path) -> None:
    """Fault: fonts, scripts or pictures that a reader without network waits for."""
    for page in site.rglob("*.html"):
        fetched = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"?(https?:[^\" >]+)", page.read_text())
        assert not fetched, f"{page.relative_to(site)} fetches {fetched}"


def plots() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plot", ROOT / "benchmarks" / "plot.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_are_those_of_their_data() -> None:
    """Fault: a picture that shows other figures than its rows, or rows that nobody has drawn."""
    plot = plots()
    assert set(plot.DRAWINGS) == {path.stem for path in (RESULTS / "data").glob("*.json")}
    for name, draw in plot.DRAWINGS.items():
        drawn = draw(plot.read_rows(RESULTS / "data" / f"{name}.json"))
        assert drawn == (RESULTS / f"{name}.svg").read_text(encoding="utf-8"), f"python benchmarks/plot.py {name}"


def test_each_benchmark_has_a_page_with_its_command() -> None:
    """Fault: a benchmark without a page, or a page that does not say how its figures are made."""
    for script in sorted((ROOT / "benchmarks").glob("*.py")):
        if script.stem not in NO_BENCHMARKS:
            page = RESULTS / f"{script.stem}.md"
            assert page.is_file(), f"{script.name} has no page"
            assert f"    python benchmarks/{script.name}" in page.read_text(encoding="utf-8"), page.name


def test_figures_of_the_summary_stand_on_their_pages() -> None:
    """Fault: a page is measured anew and the summary keeps the old figures."""
    rows = [line for line in (ROOT / "docs" / "results.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 10
    for row in rows:
        _, claim, figure, *_, details, _ = (cell.strip() for cell in row.split("|"))
        linked = [ROOT / "docs" / target for target in re.findall(r"\(([^)]+\.md)\)", details)]
        pages = "".join(path.read_text(encoding="utf-8") for path in linked)
        exact = re.findall(r"(?<![\d.])\d+\.\d+(?=x)|\.\d{3}", figure)
        assert all(number in pages for number in exact), f"{claim}: {exact}"


def test_files_that_documents_name_exist() -> None:
    """Fault: a page or the README of a room names a file that has moved."""
    named = 0
    for page in PAGES:
        for name in re.findall(r"`([\w./-]+\.py)`", page.read_text(encoding="utf-8")):
            if "NAME" in name:
                continue
            places = [ROOT / name, ROOT / "mtpd" / name, page.parent / name]
            assert any(place.is_file() for place in places), f"{page.relative_to(ROOT)} names {name}"
            named += 1
    assert named > 20


EXTENDED = """
import sys
import torch
from mtpd.cli import main
from mtpd.formats.families import FAMILIES
from mtpd.losses.settings import LOSSES, LossSettings, Student, Teacher

folder, loss = sys.argv[1], LOSSES["brier"]
y, z = torch.randn(2, 5, 7, dtype=torch.float64)
y.requires_grad_()
expected = loss.reference(y, z, n=0)
[gradient] = torch.autograd.grad(expected.sum(), y)
teacher = Teacher(z, z.softmax(1), z.logsumexp(1), (z.softmax(1) * z.log_softmax(1)).sum(1), None, None)
student = Student(y.detach(), y.detach().softmax(1), y.detach().logsumexp(1))
value, ours = loss.twin(student, teacher, LossSettings((0.0,), (1.0,), "brier"), torch.tensor(0.0))
torch.testing.assert_close(value, expected.detach())
torch.testing.assert_close(ours, gradient)

small = ["data.limit=6", "data.max_new_tokens=8", "train.max_steps=1", "evaluation.prompts_limit=1"]
small += ["evaluation.max_new_tokens=6", "device=cpu"]
assert main(["distill", "smoke", *small, "train.loss=brier", "evaluation.decode_prompts=0", f"output={folder}/a"]) == 0
assert main(["export", f"{folder}/a", "--to", "acme", "-o", f"{folder}/out"]) == 0
names = FAMILIES["acme"].to_mtpd(["draft.1.enorm.weight"], heads=2, layers=4)
assert names == {"layers.1.embed_norm.weight": "draft.1.enorm.weight"}, names
bigram = ["heads.kind=bigram", "heads.bigram.rank=8", "evaluation.decode_prompts=1"]
assert main(["distill", "smoke", *small, *bigram, f"output={folder}/b"]) == 0
"""


def test_the_changes_that_extending_shows_do_what_they_say(tmp_path: Path) -> None:
    """Fault: a shown change that no longer applies, or whose loss, kind, family or layout is not taken."""
    shutil.copytree(ROOT / "mtpd", tmp_path / "mtpd", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    diffs = re.findall(r"^```diff\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(diffs) == 4
    for diff in diffs:
        command = ["git", "apply", "--unidiff-zero", "-"]
        applied = subprocess.run(command, cwd=tmp_path, input=diff, capture_output=True, text=True, check=False)
        assert applied.returncode == 0, f"docs/extending.md: {applied.stderr}{diff}"
    command = [sys.executable, "-c", EXTENDED, str(tmp_path / "runs")]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
