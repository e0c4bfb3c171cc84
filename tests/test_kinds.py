"""A kind of heads is one folder: whatever asks for a kind asks its entry or its class."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import shift_heads

from mtpd.cli import main
from mtpd.errors import UserError
from mtpd.heads import KINDS, register
from mtpd.recipe import load_recipe

PACKAGE = Path(__file__).parents[1] / "mtpd"
WAYS = ("decode/speed.py", "cli/bench.py", "evaluate/decoded.py", "evaluate/run_tables.py")
NAMESAKES = {"medusa": ("formats",), "chain": WAYS}
"""What has the name of a kind, and where: a family of checkpoints, a layout of exports, a way of drafting."""


def strings(file: Path) -> set[str]:
    """Texts in a file that are values, not documentation."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    notes = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in notes
    }


def test_the_name_of_a_kind_stands_in_its_own_folder() -> None:
    """Fault: a table or a condition elsewhere that a new kind would have to be added to."""
    found = {file.relative_to(PACKAGE): strings(file) for file in PACKAGE.rglob("*.py")}
    assert len(KINDS) > 3
    for name in KINDS:
        homes = {file for file, texts in found.items() if name in texts}
        # A layout of exports may have the name of a kind, and the command that writes it names it too.
        homes = {file for file in homes if not file.as_posix().startswith(NAMESAKES.get(name, ()))}
        homes -= {Path("cli", "export.py")}
        assert homes == {Path("heads", name, "config.py")}, name


def test_kinds_have_the_same_files() -> None:
    """Fault: a kind whose class or first weights a reader has to search for."""
    for name in KINDS:
        files = {file.name for file in (PACKAGE / "heads" / name).iterdir()}
        assert {"config.py", "heads.py", "start.py"} <= files, name


@pytest.fixture
def shift(monkeypatch: pytest.MonkeyPatch) -> str:
    """A kind from outside of the package."""
    name = shift_heads.KIND.name
    # What `register` adds is taken away again.
    monkeypatch.setitem(KINDS, name, shift_heads.KIND)
    del KINDS[name]
    return register(shift_heads.KIND).name


def test_a_kind_from_outside_is_trained_and_decoded(shift: str, tmp_path: Path) -> None:
    """Fault: a kind that needs an edit inside of the package: in the recipe, training, measurement or decoding."""
    run = tmp_path / "run"
    words = ["smoke", f"output={run}", f"heads.kind={shift}", "data.limit=6", "data.max_new_tokens=12"]
    words += ["train.max_steps=2", "evaluation.prompts_limit=2", "evaluation.max_new_tokens=8"]
    assert main(["distill", *words, "evaluation.decode_prompts=2"]) == 0
    assert json.loads((run / "heads" / "config.json").read_text())["kind"] == shift
    suites = json.loads((run / "acceptance-decoded.json").read_text())["suites"].values()
    assert all(suite["identical"] == suite["prompts"] > 0 for suite in suites)
    assert all(len(suite["drafted"]) == 2 and suite["drafted"][0] > 0 for suite in suites)
    assert main(["generate", str(run), "--prompt", "Hello", "--max-new-tokens", "6"]) == 0


def test_what_a_kind_from_outside_does_not_read(shift: str) -> None:
    """Fault: an option of chains that is taken and ignored by a kind that nobody thought of."""
    accepted = r"heads.kind: fast is not accepted; accepted: chain, parallel, medusa, circuit, shift"
    with pytest.raises(UserError, match=accepted):
        load_recipe("smoke", ["heads.kind=fast"])
    with pytest.raises(
        UserError, match=rf"extend.to: {shift} heads do not read each other.* accepted heads.kind: chain"
    ):
        load_recipe("smoke", [f"heads.kind={shift}", "extend.to=4"])


OPTIONS = """
import sys
from mtpd.heads.kinds import Kind, register
from mtpd.section import Section

class Options(Section):
    width: int = 3

register(Kind("wide", "heads of a width", heads="wide:Heads", start="wide", section=Options))
from mtpd.errors import UserError
from mtpd.recipe import load_recipe
print(load_recipe("smoke", ["heads.kind=wide", "heads.wide.width=5"]).heads.wide.width)
try:
    load_recipe("smoke", ["heads.wide.width=x"])
except UserError as error:
    print(error)
from mtpd.heads.config import HeadsConfig
saved = HeadsConfig(kind="wide", depth=2, hidden_size=8, wide=Options(width=7)).model_dump_json()
print(HeadsConfig.model_validate_json(saved).own.width, "torch" in sys.modules)
"""


def test_options_of_a_kind_from_outside() -> None:
    """Fault: a section that has to be written a second time, for recipes or for saved heads; one that needs PyTorch."""
    found = subprocess.run([sys.executable, "-c", OPTIONS], capture_output=True, text=True, check=False)
    assert found.stderr == ""
    assert found.stdout.splitlines() == [
        "5",
        "heads.wide.width: x is not accepted; accepted: an integer (command line)",
        "7 False",
    ]
