"""jax-md's operators: of the whole package, which takes seconds to import, only what is used here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from almlip_jax.partial_import import import_part

if TYPE_CHECKING:
    from jax_md import simulate, space
else:
    simulate, space = import_part("jax_md", "simulate", "space")

__all__ = ["simulate", "space"]
