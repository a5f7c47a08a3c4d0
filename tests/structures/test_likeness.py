"""Structures that are the same but for how they are written down, and those that are not."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111, molecule

from almlip_jax.structures import likeness
from almlip_jax.structures.likeness import Likeness


def rattled(atoms: Atoms, seed: int, stdev: float = 0.1) -> Atoms:
    atoms = atoms.copy()
    atoms.rattle(stdev, seed=seed)
    return atoms


STRUCTURES = {
    "molecule": rattled(molecule("CH3CH2OH"), 0),
    "crystal": rattled(bulk("NaCl", "rocksalt", a=5.5, cubic=True), 1),
    "slab": rattled(fcc111("Cu", (2, 2, 3), vacuum=6.0), 2),
    "dimer": Atoms("Ar2", positions=[[0, 0, 0], [0, 0, 8.0]]),
}


def turned(atoms: Atoms, rng: np.random.Generator) -> Atoms:
    """Turned with its cell, mirrored, shifted, atoms in another order, each in any periodic image."""
    other = atoms[rng.permutation(len(atoms))]
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    images = rng.integers(-2, 3, (len(other), 3)) * other.pbc
    other.positions = (other.positions + images @ other.cell.array) @ rotation.T + rng.normal(size=3) * 3
    other.set_cell(other.cell.array @ rotation.T)
    return other


@pytest.mark.parametrize("name", STRUCTURES)
def test_what_differs_in_its_description_alone_is_the_same(name: str) -> None:
    rng, atoms = np.random.default_rng(3), STRUCTURES[name]
    known = Likeness([rattled(atoms, seed) for seed in range(40, 60)] + [atoms])
    for _ in range(5):
        other = turned(atoms, rng)
        assert other in known
        other.positions = np.round(other.positions, 6)
        assert other in known, "positions of a file"
        moved = other.copy()
        moved.positions[0, 2] += 1e-3
        assert moved not in known
    assert rattled(atoms, 61) not in known and atoms in known
    assert atoms not in Likeness([]) and Atoms("X2", positions=atoms.positions[:2]) not in known


def test_a_glance_rules_out_what_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools are large, and next to nothing in them is a test structure: all numbers are for what nearly is one."""
    known = {name: Likeness([rattled(atoms, seed) for seed in range(40)]) for name, atoms in STRUCTURES.items()}
    others = [(name, rattled(atoms, seed)) for name, atoms in STRUCTURES.items() for seed in range(40, 80)]
    looked, all_numbers = list[Atoms](), likeness._invariants
    monkeypatch.setattr(likeness, "_invariants", lambda frame: looked.append(frame) or all_numbers(frame))
    assert not any(frame in known[name] for name, frame in others) and len(looked) < len(others) / 10
    assert all(rattled(atoms, 7) in known[name] for name, atoms in STRUCTURES.items())


def test_other_elements_charges_and_distances_are_not() -> None:
    molecules = Likeness([STRUCTURES["molecule"], STRUCTURES["dimer"]])
    charged, isotope = STRUCTURES["molecule"].copy(), STRUCTURES["molecule"].copy()
    charged.info["charge"] = 1
    swapped = isotope.numbers.copy()
    swapped[[0, 2]] = swapped[[2, 0]]
    isotope.numbers = swapped
    farther = Atoms("Ar2", positions=[[0, 0, 0], [0, 0, 8.01]])
    assert all(other not in molecules for other in (charged, isotope, farther))
    axes = bulk("NaCl", "rocksalt", a=5.5, cubic=True)
    axes.set_cell(axes.cell.array * [[1.0], [1.02], [1.05]], scale_atoms=True)
    known = Likeness([axes])
    other = axes.copy()
    other.set_cell(axes.cell.array[[2, 0, 1]])
    assert other in known, "lattice vectors in another order"
    other.set_cell(axes.cell.array * 1.001, scale_atoms=True)
    assert other not in known
