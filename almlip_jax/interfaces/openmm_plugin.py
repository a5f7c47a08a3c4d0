"""The entry point that openmmml asks when it is imported; what it takes to load a potential is imported later."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from almlip_jax.potential import Potential


class AlmlipFactory:
    """Makes what ``MLPotential('almlip', potential=...)`` asks for.

    It is no subclass of openmmml's factories, since openmmml has not read its own module to the end where it is
    imported from here.
    """

    def createImpl(self, name: str, potential: Potential | Path | str) -> Any:
        """What adds the forces of a potential.

        Args:
            name: by which openmmml knows it.
            potential: a potential, or the folder of one.

        Raises:
            InputError: the folder holds no potential.
        """
        from almlip_jax.interfaces.openmm_ml import AlmlipImpl

        return AlmlipImpl(name, potential)
