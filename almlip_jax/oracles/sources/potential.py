"""A saved potential as a label source: a teacher, or a stand-in for what it was trained on."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from almlip_jax.errors import InputError, LabelError
from almlip_jax.oracles.base import LabelSource, Results, SourceSettings
from almlip_jax.saved_potential import SavedPotential
from almlip_jax.structures.electronic_state import electronic_state
from almlip_jax.structures.labels import ElementTypes
from almlip_jax.targets import has_target, targets

_DEVICES_FLAG = "--xla_force_host_platform_device_count"
_NEUTRAL = (0, 1)


class PotentialSourceSettings(SourceSettings):
    """The committee mean of a potential that `almlip train` or a campaign has saved, on CPUs.

    Labels belong to the potential: a digest of its parameters, architecture and reference energies is part of their
    identity, wherever its folder is.  It labels the elements, charges and multiplicities that it has learned of.
    """

    kind: Literal["potential"] = "potential"

    version_binds: ClassVar[bool] = True

    path: Path
    """Folder of the potential, or an ``.mtp`` file of MLIP-2."""

    types: ElementTypes | None = None
    """Element of each type of an ``.mtp`` file, from type 0 on, as ``[Si, O]``."""

    any_state: bool = False
    """Whether structures of any charge and multiplicity are labelled, all alike, by a potential that tells none apart
    and remembers no structure that would say which it has learned of."""

    def gives(self, target: str) -> bool:
        """What its model gives."""
        from almlip_jax.models import ModelSettings  # jax, which workers of other sources do without

        return target in ModelSettings.parse(dict(self._saved.model)).further

    def identity(self) -> dict[str, Any]:
        """The kind alone: what the potential is stands in its `version`, and where it is changes no label."""
        return {"kind": self.kind}

    def version(self) -> str:
        """The digest of what it predicts."""
        return self._saved.digest()

    @property
    def _saved(self) -> SavedPotential:
        return SavedPotential.read(self.path, self.types)

    def check(self, atoms: Atoms) -> None:
        """Refuses elements, charges and multiplicities that the potential has not learned of."""
        saved = self._saved
        strange = sorted(set(atoms.numbers.tolist()) - saved.numbers)
        if strange:
            raise LabelError(
                f"the potential {self.path} does not know {', '.join(chemical_symbols[z] for z in strange)}"
            )
        state, known = electronic_state(atoms), self._states(atoms)
        if known and state not in known:
            of = " and ".join(f"charge {charge}, spin {spin}" for charge, spin in sorted(known))
            raise LabelError(
                f"the potential {self.path} has learned of {of}, and the structure has charge {state[0]}, spin "
                f"{state[1]}; give it others in info, or take another label source"
            )

    def _states(self, atoms: Atoms) -> frozenset[tuple[int, int]]:
        """Electronic states that the potential labels of a composition; none where all are allowed."""
        saved = self._saved
        if saved.states is not None:
            return saved.states
        if self.any_state:
            return frozenset()
        kept = saved.remembered
        held = {} if kept is None else _remembered_states(kept)
        remembered = held.get(atoms.get_chemical_formula()) or frozenset().union(*held.values())
        return remembered or saved.states_met or frozenset({_NEUTRAL})

    def build(self) -> LabelSource:
        """A function that labels with the potential, each structure alone."""
        saved, double = self._saved, self._saved.precision == "float64"
        if "jax" not in sys.modules:  # in a process of its own
            _prepare(double)
        import jax

        from almlip_jax.potential import Potential
        from almlip_jax.potential.fitted import params_digest

        with jax.enable_x64(double):
            potential = Potential.load(self.path, self.types)
        if not saved.holds(params_digest(potential.params)):
            raise InputError(f"the parameters in {self.path} are not those that belong there; restore a copy of it.")
        given = targets(potential.ensemble.targets)

        def label(atoms: Atoms) -> Results:
            self.check(atoms)
            with jax.enable_x64(double):
                found = potential.evaluate([atoms])
            further = {one.label: np.asarray(found.further[one.name][0]) for one in given if has_target(atoms, one)}
            stress = found.stress[0] if atoms.pbc.all() else None
            return Results(float(found.energy[0]), found.forces[0], stress, further)

        return label


def _prepare(double: bool) -> None:
    """Leaves accelerators to the program that asks for labels, and has jax use as many cores as a worker may."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(_DEVICES_FLAG)]
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_NUM_CPU_DEVICES"] = os.environ.get("OMP_NUM_THREADS", "1")
    os.environ["XLA_FLAGS"] = " ".join([*flags, "--xla_cpu_multi_thread_eigen=false"])
    from almlip_jax.compilation import prepare_jax

    prepare_jax("float64" if double else "float32")


@lru_cache(maxsize=16)
def _remembered_states(file: Path) -> Mapping[str, frozenset[tuple[int, int]]]:
    """Charges and multiplicities of each composition in a file of remembered structures, whose name has their hash."""
    from almlip_jax.structures.io import read_structures

    met = Counter((atoms.get_chemical_formula(), electronic_state(atoms)) for atoms in read_structures(file))
    formulas = {formula for formula, _ in met}
    return {formula: frozenset(state for other, state in met if other == formula) for formula in formulas}
