"""The base of every config model: strict keys, and an error that names the nearest valid one."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Settings(BaseModel):
    """A frozen pydantic model that refuses unknown keys and says which one was probably meant.

    Each room keeps its own settings beside what they configure; `almlip_jax.config` composes them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _name_the_nearest_key(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = {name for name in cls.model_fields}
        for key in data:
            if key in known:
                continue
            near = difflib.get_close_matches(str(key), sorted(known), n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"valid keys: {', '.join(sorted(known))}."
            raise ValueError(f"unknown key '{key}'; {hint}")
        return data
