"""A recipe's text that has to be a registered name, of a loss for example."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import PydanticCustomError, core_schema


@dataclass(frozen=True)
class Registered:
    """Accepts the names that a register has when the recipe is read; its JSON schema lists them.

    Used as `Annotated[str, Registered(names)]`.
    """

    names: Mapping[str, Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._known, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**handler(schema), "enum": list(self.names)}

    def _known(self, name: str) -> str:
        if name not in self.names:
            raise PydanticCustomError("unregistered", "not one of {names}", {"names": ", ".join(self.names)})
        return name
