"""Open lists of names: each name is declared beside what it stands for, and a config takes any that is declared."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import PydanticCustomError, core_schema

from almlip_jax.kinds import load_plugins


class Names:
    """Names of one sort of thing; ``Annotated[str, names]`` is the type of a field that takes any of them.

    Attributes:
        sort: what they are names of, for messages.
    """

    def __init__(self, sort: str) -> None:
        self.sort = sort
        self._meanings: dict[str, str] = {}

    def declare(self, name: str, meaning: str) -> None:
        """Adds a name.

        Raises:
            TypeError: there is one already.
        """
        if name in self._meanings:
            raise TypeError(f"the {self.sort} '{name}' is declared twice.")
        self._meanings[name] = meaning

    @property
    def meanings(self) -> Mapping[str, str]:
        """What each name means, in the order of the alphabet, those of other packages too."""
        load_plugins()
        return dict(sorted(self._meanings.items()))

    def check(self, name: str) -> str:
        """The name itself, any where nothing is declared (a room that is used alone knows no names of others).

        Raises:
            PydanticCustomError: nobody has declared it; says which was meant.
        """
        known = list(self.meanings)
        if not known or name in known:
            return name
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'?" if near else f"valid are {', '.join(known)}."
        raise PydanticCustomError(
            "unknown_name", "'{name}' is no {sort}; {hint}", {"name": name, "sort": self.sort, "hint": hint}
        )

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> Any:
        return handler(schema) | {"enum": list(self.meanings)}
