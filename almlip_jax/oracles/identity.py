"""The identity of a label: a hash of everything that decides its value, and of nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import numpy as np
from ase import Atoms

from almlip_jax.oracles.base import SourceSettings
from almlip_jax.structures.electronic_state import initial_moments, multiplicity, total_charge


def structure_identity(atoms: Atoms, oracle: SourceSettings) -> str:
    """The identity of the label of a structure, 64 hex digits (SHA-256).

    Hashed are the species, positions and cell in float64 (Angstrom, every bit counts), pbc, charge, spin, initial
    magnetic moments and `SourceSettings.particulars` where there are any, and the label source with its settings and
    version.  Time limits and sanity bounds are not part of it.

    Raises:
        InputError: the charge or spin of the structure is not a whole number, or the label source is not installed.
    """
    return identifier(oracle)(atoms)


def identifier(oracle: SourceSettings) -> Callable[[Atoms], str]:
    """`structure_identity` for many structures: looks the version of the label source up only once."""
    source = json.dumps([oracle.identity(), oracle.version()], sort_keys=True).encode()

    def identity(atoms: Atoms) -> str:
        digest = hashlib.sha256(source)
        digest.update(np.array([len(atoms), total_charge(atoms), multiplicity(atoms)], "<i8").tobytes())
        digest.update(np.asarray(atoms.numbers, "<i8").tobytes())
        # Adding zero turns -0.0, which is the same place, into 0.0.
        digest.update((np.asarray(atoms.positions, "<f8") + 0.0).tobytes())
        digest.update((np.asarray(atoms.cell.array, "<f8") + 0.0).tobytes())
        digest.update(np.asarray(atoms.pbc, "u1").tobytes())
        # What most labels do not have adds nothing, so that their identities stay those of earlier versions.
        if (moments := initial_moments(atoms)) is not None:
            digest.update(b"magmoms" + (moments.astype("<f8") + 0.0).tobytes())
        if particulars := oracle.particulars(atoms):
            digest.update(json.dumps(particulars, sort_keys=True).encode())
        return digest.hexdigest()

    return identity
