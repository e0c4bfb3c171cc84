"""How the rows of a source are read where their columns do not say it themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mtpd.data.rows.left_out import Unusable
from mtpd.data.rows.prompt import Prompt
from mtpd.data.rows.read_row import read_row

TEMPLATES = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
KEPT = ("id", "family", "category", "system", "tools", "chat_template_kwargs")
"""Columns that keep their meaning beside named ones."""


@dataclass(frozen=True)
class RowFormat:
    """How rows are read, as keys of a recipe's `data` section say."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """By what a row has, such as `prompt`, the column that is taken for it."""
    template: str | None = None
    """Jinja template of the user's message over the columns of a row."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the chat template; those of a row go before them."""
    escape: bool = False
    """Whether control tokens inside of a text are read as characters."""

    def read(self, row: Any, *, place: str, default_id: str, default_family: str = "") -> Prompt:
        """One row as a Prompt.

        Args:
            row: as `mtpd.data.rows.files.Rows` has it.

        Raises:
            Unusable: naming `place` and what is accepted.
        """
        if isinstance(row, Unusable):
            raise row
        if isinstance(row, dict) and (self.columns or self.template is not None):
            row = self._renamed(row, place)
        prompt = read_row(
            row, place=place, default_id=default_id, default_family=default_family, template=self.chat_template_kwargs
        )
        return replace(prompt, escape=True) if self.escape else prompt

    def _renamed(self, row: Mapping[str, Any], place: str) -> dict[str, Any]:
        found = {key: row[key] for key in KEPT if key in row}
        for name, column in self.columns.items():
            if column not in row:
                raise Unusable(
                    "a column missing",
                    f"{place}: no column {column}, which data.columns.{name} names; it has {', '.join(map(str, row))}",
                )
            found[name] = row[column]
        if self.template is not None:
            try:
                said = fill(self.template, row)
            except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
                columns = ", ".join(map(str, row))
                raise Unusable(
                    "refused by data.template", f"{place}: data.template: {error}; it has {columns}"
                ) from error
            found["prompt"] = [{"role": "user", "content": said}]
            if isinstance(found.get("completion"), str):
                found["completion"] = [{"role": "assistant", "content": found["completion"]}]
        return found


def fill(template: str, row: Mapping[str, Any]) -> str:
    """Fills a Jinja template with the columns of a row, in a sandbox.

    Raises:
        TemplateError: the template is none, names a column that is missing, or reaches into Python.
    """
    return TEMPLATES.from_string(template).render(row)
