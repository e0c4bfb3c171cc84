"""A run directory as a model that generates: `mtpd.load`."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from mtpd.decode.chances import CHANCES, Chances, parse_chances
from mtpd.decode.drafting import Drafting
from mtpd.decode.model import Model
from mtpd.errors import UserError
from mtpd.evaluate.depths import Depths
from mtpd.files import write_whole
from mtpd.recipe import Recipe
from mtpd.run.finished import reopen

DRAFTING = "decoding.json"
"""Beside the heads: how far to draft with them, as `mtpd bench --tune` found it."""
DEPTHS = "depths.json"
"""In a run: how fast it decodes with every number of drafts."""


def load(
    run: str | Path,
    *,
    dtype: str | None = None,
    device: str | None = None,
    depth: int | None = None,
    tree: int | None = None,
    lookup: bool | None = None,
    untrusted: bool = False,
) -> Model:
    """The model of a run with its heads.

    Args:
        run: a run directory of `mtpd distill`.
        dtype: number format; None is the one of the run.
        device: None is the one of the run's recipe.
        depth: drafts a round; None is what `read_drafting` finds.
        tree: drafts are a tree of this many at most, as deep as `depth`; 0 is a chain, None what `decoding.json` says.
        lookup: heads and look-up (what followed the newest tokens before) draft together; None is what `decoding.json`
            says, or heads alone.
        untrusted: the run is somebody else's: code that comes with its model is not run, whatever its recipe says.

    Raises:
        UserError: no finished run, heads of another model than the recipe names, a depth that they lack, or a tree of
            drafts that depend on each other.
    """
    path = Path(run)
    finished = reopen(path, device=device, untrusted=untrusted).in_dtype(dtype or "trunk")
    heads = finished.heads("heads")
    drafting = read_drafting(path, finished.recipe, deepest=heads.depth)
    if depth is not None:
        if not 1 <= depth <= heads.depth:
            raise UserError(f"depth: {depth} is not accepted; accepted: 1 to {heads.depth}, the heads of {path}")
        drafting = Drafting(depth=depth, tree=drafting.tree)
    if tree is not None:
        drafting = drafting.model_copy(update={"tree": tree, **({"siblings": 0} if tree else {})})
    if lookup is not None:
        drafting = drafting.model_copy(update={"lookup": lookup})
    return Model(finished.trunk, heads, finished.tokenizer, drafting, read_chances(path / "heads"))


def read_chances(folder: Path) -> Chances:
    """How often drafts were right on held-out text, as `mtpd distill` counted it; without the file, heads are believed.

    Raises:
        UserError: the file is damaged.
    """
    file = folder / CHANCES
    return (
        parse_chances(file.read_text(encoding="utf-8", errors="replace"), source=str(file))
        if file.is_file()
        else Chances()
    )


def read_drafting(run: Path, recipe: Recipe, *, deepest: int) -> Drafting:
    """How far to draft with the heads of a run where nobody says it. The first of these that there is:

    1. what `mtpd bench --tune` stored beside the heads;
    2. the fastest number of drafts in `depths.json`, for which `mtpd bench` and `extend` decode with every number;
    3. the number that the run decodes with itself, `evaluation.decode_depth`;
    4. as many as there are heads.

    Raises:
        UserError: a file cannot be read, or is of deeper heads.
    """
    file = run / "heads" / DRAFTING
    if not file.is_file():
        wanted = recipe.evaluation.decode_depth or deepest
        if (run / DEPTHS).is_file():
            # Where none is the fastest, one costs least.
            wanted = max(1, Depths.load(run / DEPTHS).fastest)
        return Drafting(depth=min(wanted, deepest))
    try:
        drafting = Drafting.model_validate_json(file.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read; delete it, or write it anew with `mtpd bench --tune`") from error
    if drafting.depth > deepest:
        raise UserError(f"{file}: depth: {drafting.depth} is not accepted; accepted: 1 to {deepest}")
    return drafting


def write_drafting(folder: Path, drafting: Drafting) -> Path:
    """Stores it beside the heads, where `load` finds it."""
    write_whole(folder / DRAFTING, drafting.model_dump_json(indent=2) + "\n")
    return folder / DRAFTING
