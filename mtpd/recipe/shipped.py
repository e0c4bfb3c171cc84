"""The recipes that come with mtpd: taken by name, such as `demo`, wherever a recipe file is taken."""

from __future__ import annotations

import difflib
from pathlib import Path

from mtpd.errors import UserError


def shipped_folder() -> Path:
    """Gives their folder: in the installed package, or `recipes` of the source tree."""
    here = Path(__file__).resolve()
    installed = here.parent / "shipped"
    return installed if installed.is_dir() else here.parents[2] / "recipes"


def shipped_names() -> list[str]:
    """Names of the recipes, sorted; those in a folder behind it."""
    folder = shipped_folder()
    found = [*folder.glob("*.yaml"), *folder.glob("papers/*.yaml")]
    return sorted((path.relative_to(folder).with_suffix("").as_posix() for path in found), key=_in_folder)


def _in_folder(name: str) -> tuple[bool, str]:
    return "/" in name, name


def find_recipe(given: Path | str) -> Path:
    """The file that a path or name means.

    A name without ending always means the recipe that comes with mtpd, so that a command does the same in every
    folder; a file is given with its ending (`demo.yaml`) or as a path (`./demo`).

    Raises:
        UserError: there is no such file, and no recipe of that name.
    """
    path = Path(given)
    names = shipped_names()
    if str(given) in names:
        return shipped_folder() / f"{given}.yaml"
    if path.is_dir():
        inside = path / "recipe.yaml"
        what = f"{inside}, the recipe of that run" if inside.is_file() else "a YAML file, or a name (mtpd recipe ls)"
        raise UserError(f"recipe file {path}: is a directory; accepted: {what}")
    if path.exists():
        return path
    raise UserError(f"recipe file {path}: no such file; {_way_out(path, names)}")


def _way_out(path: Path, names: list[str]) -> str:
    stem = path.stem if path.suffix in (".yaml", ".yml") else path.name
    if stem in names:
        return f"accepted: {stem}, the recipe that comes with mtpd (mtpd recipe copy {stem} writes {stem}.yaml)"
    near = difflib.get_close_matches(stem, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}accepted: a YAML file, or a name that mtpd recipe ls lists ({', '.join(names)})"


def about(path: Path) -> str:
    """The first sentence of the comment that a recipe file begins with."""
    words = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        words.append(line[2:])
    first, dot, _ = " ".join(words).partition(". ")
    return first + dot.rstrip()
