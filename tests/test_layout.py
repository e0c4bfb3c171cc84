"""Imports point in one direction, so that a part can be read, tested and replaced without what stands on it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mtpd"

# What each part may import of the others. `errors`, `files` and `interrupts` stand under everything.
BELOW = {"errors", "files", "interrupts"}
MAY_IMPORT = {
    "errors": set(),
    "files": {"errors"},
    "interrupts": set(),
    "ranks": {"errors", "interrupts"},
    "launch": {"errors"},
    "recipe_text": BELOW,
    "recipe": BELOW | {"recipe_text"},
    "alignment": BELOW,
    "trunk": BELOW | {"alignment"},
    "slots": BELOW | {"trunk"},
    "fast": BELOW | {"trunk"},
    "heads": BELOW | {"losses", "trunk", "fast", "slots", "alignment"},
    "losses": BELOW | {"trunk", "alignment"},
    "decode": BELOW | {"heads", "losses", "fast", "slots", "trunk", "alignment"},
    "data": BELOW | {"ranks", "decode", "heads", "losses", "trunk", "alignment"},
    "loading": BELOW | {"recipe", "data", "decode", "evaluate", "heads", "trunk"},
    "checkpoints": BELOW | {"recipe_text", "recipe", "evaluate", "decode", "data", "heads", "trunk", "alignment"},
    "evaluate": BELOW | {"recipe_text", "decode", "data", "heads", "losses", "trunk", "alignment"},
    "distill": BELOW
    | {"ranks", "recipe_text", "recipe", "checkpoints", "evaluate", "decode", "data", "heads", "losses"}
    | {"trunk", "alignment"},
}
MAY_IMPORT["cli"] = set(MAY_IMPORT)
MAY_IMPORT["__main__"] = {"cli"}


def part(module: str) -> str | None:
    """The part of mtpd that a module belongs to, or None if it is of another package."""
    names = module.split(".")
    return names[1] if names[0] == "mtpd" and len(names) > 1 else None


def imported(file: Path) -> set[str]:
    """Parts of mtpd that a file imports, wherever in it."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {found for module in modules if (found := part(module)) is not None}


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
