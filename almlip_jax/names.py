"""Open lists of names in configs: each is declared next to what it stands for; a field takes any that is declared."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import core_schema

from almlip_jax.errors import nearest


@dataclass(frozen=True)
class Known:
    """Lets the names of what is declared pass: ``Annotated[str, Known("score", score_names)]`` is the type of a field.

    Where nothing is declared, any name passes: a room that is used alone knows no names of others.

    Attributes:
        sort: what they are names of, for messages.
        declared: gives the names, those of other packages too.
    """

    sort: str
    declared: Callable[[], Iterable[str]]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> Any:
        return {"type": "string", "enum": list(self.declared())}

    def _checked(self, name: str) -> str:
        known = tuple(self.declared())
        if known and name not in known:
            raise ValueError(f"'{name}' is not a {self.sort}{nearest(name, known)}")
        return name
