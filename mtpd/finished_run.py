"""A run directory as every command opens it: what is checked, what is said, and what its recipe is.

Nothing of its model is loaded, and nothing imported that takes long: `mtpd.run.finished` loads it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mtpd.errors import UserError
from mtpd.recipe import Recipe, load_recipe
from mtpd.recipe.untrusted import refuse_code

RECIPE = "recipe.yaml"
HEADS_FILE = "model.safetensors"
EXPORTED = "mtpd.json"
"""In what `mtpd export` wrote: what `mtpd inspect` and `mtpd verify` read of it."""
IMPORTED = "import.json"
"""In what `mtpd import` wrote: where its heads are from."""


@dataclass(frozen=True)
class FinishedRun:
    """A run with heads."""

    path: Path
    recipe: Recipe

    @property
    def model(self) -> str:
        """The model that the heads belong to: the run's own `trunk/` if it trained one, else the recipe's."""
        own = self.path / "trunk"
        return str(own) if (own / "config.json").is_file() else self.recipe.model


def open_finished(path: Path, *, heads: str | None = "heads", untrusted: bool = False) -> FinishedRun:
    """Opens a run.

    Args:
        heads: as for `check_finished`.
        untrusted: the run is somebody else's: its recipe may not say that code of its model is run.

    Raises:
        UserError: the directory holds no run, the run has no such heads, or its recipe is refused.
    """
    check_finished(path, heads=heads)
    recipe = load_recipe(path / RECIPE)
    if untrusted:
        refuse_code(recipe, source=str(path / RECIPE))
    return FinishedRun(path, recipe)


def check_finished(path: Path, *, heads: str | None = "heads") -> None:
    """Raises UserError unless a directory holds a run with heads of that name; None: with heads or without."""
    if not path.exists():
        raise UserError(f"{path}: no such directory; accepted: the output directory of mtpd distill, such as runs/demo")
    if not path.is_dir():
        raise UserError(f"{path}: is a file; accepted: the output directory of mtpd distill, such as runs/demo")
    if not (path / RECIPE).is_file():
        parent = path.resolve().parent
        hint = f" (did you mean {path.parent}?)" if (parent / RECIPE).is_file() else ""
        if (path / EXPORTED).is_file():
            raise UserError(
                f"{path}: is an export, for other engines (mtpd verify serves it); give the run that it was written "
                f"from: {_run_of(path)}"
            )
        if (path / IMPORTED).is_file():
            hint = " (imported heads that mtpd cannot compute; `mtpd graft` moves them)"
        elif (path / "config.json").is_file() and not hint:
            hint = " (this is a model; heads belong to the run that it was exported from)"
        raise UserError(
            f"{path}: holds no run (no {RECIPE}); give the output directory of mtpd distill, such as runs/demo{hint}"
        )
    if heads is not None and not (path / heads / HEADS_FILE).is_file():
        others = sorted(file.parent.name for file in path.glob(f"heads*/{HEADS_FILE}"))
        hint = f"accepted here: {', '.join(others)}; or " if others else ""
        raise UserError(f"{path / heads}: holds no heads; {hint}finish the run with mtpd distill {path / RECIPE}")


def _run_of(export: Path) -> str:
    """The run that an export says it is of."""
    try:
        return str(json.loads((export / EXPORTED).read_text(encoding="utf-8"))["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return "what mtpd distill wrote"
