"""Isolated atoms among the labels that a campaign begins with: their energies count, they are not trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator

from almlip_jax.campaign.preparation import frames_and_atoms, labelled_frames, pool_frames
from almlip_jax.campaign.settings import PoolExploration, SystemSettings
from almlip_jax.structures.io import write_structures


def test_their_energies_are_kept_apart(tmp_path: Path) -> None:
    """Also where the system is an ion, and in a box; a pool has no such candidates."""
    alone = Atoms("O", cell=[15, 15, 15], pbc=True, info={"config_type": "IsolatedAtom"})
    frames = [Atoms("H"), molecule("H2O"), alone, molecule("H2O")]
    for n, atoms in enumerate(frames):
        atoms.rattle(0.01, seed=n)
        atoms.calc = SinglePointCalculator(atoms, energy=-10.0 * n - 5.0, forces=np.zeros((len(atoms), 3)))
    write_structures(tmp_path / "labelled.extxyz", frames)
    ion = SystemSettings(charge=1)
    kept, energies = frames_and_atoms(tmp_path / "labelled.extxyz", ion)
    assert [len(atoms) for atoms in kept] == [3, 3] and energies == {1: -5.0, 8: -25.0}
    assert [atoms.info["charge"] for atoms in labelled_frames(tmp_path / "labelled.extxyz", ion)] == [1, 1]
    pool = pool_frames(PoolExploration(files=tmp_path / "labelled.extxyz"), ion, [])
    assert [len(atoms) for atoms in pool] == [3, 3] and [atoms.info["pool_index"] for atoms in pool] == [0, 1]
