"""A run directory as a model that generates: `mtpd.load`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from mtpd.decode.chances import read_chances
from mtpd.decode.corpus import read_corpus
from mtpd.decode.drafting import SOURCES, Drafting
from mtpd.decode.model import Model
from mtpd.errors import UserError
from mtpd.run.finished import reopen

logger = logging.getLogger(__name__)

OLD_DRAFTING = "decoding.json"
"""Beside the heads of older runs: how far to draft with them, which each round decides by itself now."""


def load(
    run: str | Path,
    *,
    dtype: str | None = None,
    device: str | None = None,
    drafting: Literal["auto"] | Drafting | Mapping[str, Any] = "auto",
    untrusted: bool = False,
) -> Model:
    """The model of a run with its heads.

    Args:
        run: a run directory of `mtpd distill`.
        dtype: number format; None is the one of the run.
        device: None is the one of the run's recipe.
        drafting: auto lets heads and look-up (what followed the newest tokens when they last stood in the text) draft
            together, in each round as much as pays on this machine. Else the fields of `Drafting`: {"sources":
            ["heads"]} leaves look-up out, {"depth": 2} drafts a chain of two heads in every round.
        untrusted: the run is somebody else's: code that comes with its model is not run, whatever its recipe says.

    Raises:
        UserError: no finished run, heads of another model than the recipe names, or a depth that they lack.
    """
    path = Path(run)
    folder = path / "heads"
    finished = reopen(path, device=device, untrusted=untrusted).in_dtype(dtype or "trunk")
    heads = finished.heads("heads")
    if (folder / OLD_DRAFTING).is_file():
        logger.warning(
            "%s: is of an earlier version and not read: what is drafted is decided in each round now; delete the file",
            folder / OLD_DRAFTING,
        )
    chances, corpus = read_chances(folder), read_corpus(folder, finished.tokenizer)
    return Model(finished.trunk, heads, finished.tokenizer, read_settings(drafting), chances, corpus)


def read_settings(given: str | Drafting | Mapping[str, Any]) -> Drafting:
    """Reads the settings of drafting that a caller gives.

    Raises:
        UserError: an unknown field or source.
    """
    if isinstance(given, Drafting):
        return given
    try:
        return Drafting() if given == "auto" else Drafting.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("drafting", *first["loc"])))
        raise UserError(
            f"{where}: {first['msg']}; accepted: auto, or a mapping of sources (a list of {', '.join(SOURCES)}), depth "
            "and sampled"
        ) from error
