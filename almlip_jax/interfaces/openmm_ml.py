"""The plug-in of openmmml: systems that a potential describes whole or in part, ``MLPotential('almlip', ...)``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openmmml.mlpotential import MLPotentialImpl

from almlip_jax.ensembles import MixedEnsemble
from almlip_jax.errors import InputError, meant
from almlip_jax.interfaces.openmm import potential_force
from almlip_jax.potential import Potential

if TYPE_CHECKING:
    from almlip_jax.compilation import Precision

_PRECISIONS: dict[str | None, Precision | None] = {None: None, "single": "float32", "double": "float64"}
_ENERGIES = {"energy": False, "interaction_energy": True}
_OURS = ("charge", "multiplicity", "precision", "returnEnergyType")
_OF_EMBEDDINGS = ("mlLongRange", "linkAtomDistances")


class AlmlipImpl(MLPotentialImpl):
    """Adds the force of a potential to systems.

    Args:
        name: by which openmmml knows it.
        potential: a potential, or the folder of one.

    Raises:
        InputError: the folder holds no potential.
    """

    def __init__(self, name: str, potential: Potential | Path | str) -> None:
        self.name = name
        if not isinstance(potential, Potential):
            potential = Potential.load(potential)
        self.potential = potential

    def addForces(
        self,
        topology: Any,
        system: Any,
        atoms: Sequence[int] | None,
        forceGroup: int,
        charge: int | None = None,
        multiplicity: int | None = None,
        precision: str | None = None,
        returnEnergyType: str = "interaction_energy",
        **args: Any,
    ) -> None:
        """Adds the force of the potential; what ``createSystem`` and ``createMixedSystem`` call.

        Args:
            topology: with the elements.
            system: that it is added to.
            atoms: indices of those it concerns; all where not given.
            forceGroup: of the force.
            charge: of these atoms, e; with ``multiplicity`` as ``charge`` and ``spin`` of `potential_force`.
            multiplicity: 2S+1.
            precision: ``single`` or ``double``; that of the potential where not given.
            returnEnergyType: ``interaction_energy``, relative to reference energies, or ``energy``.
            args: of the embedding; nothing here depends on them.

        Raises:
            InputError: a precision or kind of energy that there is not, an argument that is all but spelt as one of
                these, or as `potential_force`.
        """
        for known, given in ((_PRECISIONS, precision), (_ENERGIES, returnEnergyType)):
            if given not in known:
                raise InputError(f"'{given}' is none of {', '.join(word for word in known if word is not None)}.")
        for unknown in sorted({*args} - {*_OF_EMBEDDINGS}):
            hint = "here it is 'multiplicity'." if unknown == "spin" else meant(unknown, _OURS, cutoff=0.6)
            if hint:
                raise InputError(f"there is no argument '{unknown}'; {hint}")
            warnings.warn(f"a potential of almlip-jax makes nothing of the argument '{unknown}'.", stacklevel=3)
        force = potential_force(
            self.potential,
            topology,
            atoms,
            charge=charge,
            spin=multiplicity,
            periodic=topology.getPeriodicBoxVectors() is not None or system.usesPeriodicBoundaryConditions(),
            precision=_PRECISIONS[precision],
            interaction=_ENERGIES[returnEnergyType],
        )
        force.setForceGroup(forceGroup)
        system.addForce(force)

    def getMLLongRange(self) -> bool | None:
        """Whether the potential reaches beyond its cutoff; a model of a user's that does has to be told of."""
        ensemble = self.potential.ensemble
        groups = ensemble.groups if isinstance(ensemble, MixedEnsemble) else (ensemble,)
        return None if any(group.model.long_range for group in groups) else False
