"""The kinds of heads: each registers itself once, without PyTorch, so that a recipe is read in no time.

To add a kind, write a folder like `medusa/` (`config.py` with its entry, `heads.py` with its class, `start.py` with its
first weights) and a line in `__init__.py`. Another package calls `register` itself; for a kind with a section of its
own, before it imports `mtpd.recipe` or `mtpd.heads.config`, which take their fields from here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, create_model

from mtpd.section import Section

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Kind:
    """The entry of a kind of heads, known before any are built."""

    name: str
    about: str
    """Describes the kind in the recipe's schema, behind its name and a colon."""
    heads: str
    """Names the class as "module:Class", a subclass of `mtpd.heads.base.Heads`."""
    start: str
    """Names the module that gives new heads their first weights. It has

    - `configure(settings, trunk)`: from the `heads` section of a recipe, and `columns` (how many tokens can be
      drafted), what the kind adds to `HeadsConfig`. Raises UserError.
    - `initialise(heads, trunk, start, seed=)`: sets the first weights, and says whether `fit` has to follow.
    - `fit(heads, trunk, batches)`: fits them to rows with `hidden`, which it may read several times.
    - `adopt(heads, trunk, others, seed=)`, if it can: first weights from other heads of the trunk. Raises UserError.
    """
    section: type[Section] | None = None
    """Options of the kind alone: the section of its name in `heads` of a recipe and in `HeadsConfig`."""
    keys: frozenset[str] = frozenset()
    """Keys of `heads` that no other kind reads."""
    blocks: Callable[[Any], int] = field(default=lambda config: 0)
    """Counts the decoder blocks of a `HeadsConfig`. Raises ValueError for options that contradict each other."""
    loops: bool = False
    """Whether a head reads the state of the one before, so that `extend` can loop the last ones."""
    native: Mapping[str, Any] | None = None
    """Further keys of `heads` in a recipe that starts from a checkpoint's own heads; None if none has such heads."""


KINDS: dict[str, Kind] = {}
"""All kinds by name; the first one is the default of a recipe."""

_closed: list[str] = []


def register(kind: Kind) -> Kind:
    """Adds a kind, and returns it. Its name has to be new."""
    assert kind.name not in KINDS, f"a kind of heads named {kind.name} is registered already"
    assert kind.section is None or not _closed, f"{kind.name}: register it before {_closed[0]} is imported"
    KINDS[kind.name] = kind
    return kind


def with_sections(*, optional: bool) -> Callable[[type[Model]], type[Model]]:
    """Adds to a model, as its decorator, a field for the section of each kind, of the kind's name.

    Args:
        optional: whether heads of other kinds have None there, in place of the section's defaults.
    """

    def extended(model: type[Model]) -> type[Model]:
        _closed.append(model.__module__)
        fields: dict[str, Any] = {
            kind.name: (kind.section | None, None) if optional else (kind.section, kind.section())
            for kind in KINDS.values()
            if kind.section is not None
        }
        return create_model(
            model.__name__, __base__=model, __module__=model.__module__, __doc__=model.__doc__, **fields
        )

    return extended
