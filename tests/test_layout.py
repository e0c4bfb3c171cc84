"""Imports point in one direction, so that a part can be read, tested and replaced without what stands on it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mtpd"

# What each part may import of the others. `errors`, `files`, `interrupts`, `progress`, `quantised` and `section` stand
# under everything.
BELOW = {"errors", "files", "interrupts", "progress", "quantised", "section"}
MAY_IMPORT = {
    "errors": set(),
    "files": {"errors"},
    "interrupts": set(),
    "progress": set(),
    "quantised": set(),
    "section": set(),
    "recipe": BELOW | {"heads", "losses"},
    "finished_run": BELOW | {"recipe"},
    "alignment": BELOW,
    "trunk": BELOW | {"alignment"},
    "slots": BELOW | {"trunk"},
    "packed_modules": BELOW | {"trunk"},
    "losses": BELOW | {"trunk", "alignment"},
    "heads": BELOW | {"losses", "trunk", "packed_modules", "slots", "alignment"},
    "decode": BELOW | {"heads", "losses", "packed_modules", "slots", "trunk", "alignment"},
    "parallel": BELOW | {"recipe", "trunk", "alignment"},
    "data": BELOW | {"parallel", "decode", "heads", "losses", "trunk", "alignment"},
    "evaluate": BELOW | {"recipe", "decode", "data", "heads", "losses", "trunk", "alignment"},
    "report": BELOW | {"evaluate", "data", "decode", "heads"},
    "formats": BELOW | {"finished_run", "recipe", "evaluate", "decode", "data", "heads", "trunk", "alignment"},
    "train": BELOW | {"recipe", "parallel", "evaluate", "data", "heads", "losses", "trunk", "alignment"},
    "pretrain": BELOW | {"recipe", "parallel", "train", "data", "heads", "losses", "trunk", "alignment"},
    "run": BELOW
    | {"recipe", "parallel", "train", "report", "formats", "evaluate", "decode", "data", "heads", "losses", "trunk"}
    | {"alignment", "finished_run"},
    "plan": BELOW | {"recipe", "run", "pretrain", "train", "parallel", "data", "heads", "losses", "trunk"},
}
MAY_IMPORT["cli"] = set(MAY_IMPORT)
MAY_IMPORT["__main__"] = {"cli", "interrupts"}


def part(module: str) -> str | None:
    """The part of mtpd that a module belongs to, or None if it is of another package."""
    names = module.split(".")
    return names[1] if names[0] == "mtpd" and len(names) > 1 else None


def modules(file: Path) -> set[str]:
    """Modules, and names out of modules, that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imported(file: Path) -> set[str]:
    """Parts of mtpd that a file imports, wherever in it."""
    return {name for module in modules(file) if (name := part(module)) is not None}


FILES = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    """Fault: heads or losses that know a recipe, a trainer or prompts; two parts that need each other."""
    own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert own in MAY_IMPORT, f"{own} is a new part: say here what it may import"
    forbidden = imported(file) - MAY_IMPORT[own] - {own}
    assert not forbidden, f"mtpd/{file.relative_to(PACKAGE)} imports {', '.join(sorted(forbidden))}"


def test_directions_have_no_circle() -> None:
    """Fault: a line added above that lets two parts import each other."""
    left = dict(MAY_IMPORT)
    while left:
        free = [name for name, below in left.items() if not below - {name} & set(left)]
        assert free, f"these need each other: {', '.join(left)}"
        for name in free:
            del left[name]


def files_of(module: str) -> Iterator[Path]:
    """The file that importing a module, or a name out of one, asks for."""
    path = PACKAGE.parent.joinpath(*module.split("."))
    places = [place for each in (path, path.parent) for place in (each.with_suffix(".py"), each / "__init__.py")]
    yield from [file for file in places if file.is_file()][:1]


@pytest.mark.parametrize("room", ["heads"])
def test_files_have_no_circle(room: str) -> None:
    """Fault: two files that need each other, be it for a type or inside of a function."""
    left = {
        file: {need for name in modules(file) for need in files_of(name)} for file in (PACKAGE / room).rglob("*.py")
    }
    while left:
        free = [file for file, needs in left.items() if not needs - {file} & left.keys()]
        assert free, f"these need each other: {', '.join(str(file.relative_to(PACKAGE)) for file in left)}"
        for file in free:
            del left[file]
