"""Reference energies: what is known stays, the rest follows from a fit that wrong labels do not move."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from almlip_jax.errors import InputError
from almlip_jax.structures.io import write_structures
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.training import (
    TrainingSettings,
    doubts,
    find_references,
    given_references,
    is_isolated_atom,
    reference_energies,
    untold_charges,
    without_isolated_atoms,
)

SPECIES = SpeciesTable((1, 6, 8))
TRUE = {1: -13.6, 6: -1030.0, 8: -2040.0}


def labelled(formula: str, energy: float, **info: object) -> Atoms:
    atoms = Atoms(formula)
    atoms.positions[:, 0] = 3.0 * np.arange(len(atoms))
    atoms.info.update(info)
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.zeros((len(atoms), 3)))
    return atoms


@pytest.fixture
def mixed() -> list[Atoms]:
    """Molecules of many compositions, their energies 0.05 eV/atom from sums of those of their elements."""
    rng = np.random.default_rng(0)
    frames = []
    for _ in range(60):
        h, c, o = rng.integers(1, 5, 3)
        exact = h * TRUE[1] + c * TRUE[6] + o * TRUE[8]
        frames.append(labelled(f"H{h}C{c}O{o}", exact + 0.05 * (h + c + o) * rng.normal()))
    return frames


def test_one_wrong_energy_moves_nothing_and_is_named(mixed):
    clean = find_references(mixed, SPECIES)
    assert clean.doubtful == () and doubts(mixed, clean) is None
    for z, energy in TRUE.items():
        assert clean.energies[z] == pytest.approx(energy, abs=0.3)
    mixed[17].calc.results["energy"] += 1e6
    spoilt = find_references(mixed, SPECIES)
    for z, energy in clean.energies.items():
        assert spoilt.energies[z] == pytest.approx(energy, abs=0.05)
    assert spoilt.doubtful == (17,)
    assert f"structure 17 ({mixed[17].get_chemical_formula()})" in doubts(mixed, spoilt)


def test_what_charges_cost_is_fitted_beside_the_elements(mixed):
    """Thirteen electron-volts for a cation and three less for an anion; one wrong label moves nothing."""
    for n, atoms in enumerate(mixed):
        charge = (0, 1, 0, -1, 2)[n % 5]
        atoms.info["charge"] = charge
        atoms.calc.results["energy"] += 13.0 * max(charge, 0) - 3.0 * max(-charge, 0)
    mixed[8].calc.results["energy"] -= 1e4
    found = find_references(mixed, SPECIES, charges=True)
    for z, energy in TRUE.items():
        assert found.energies[z] == pytest.approx(energy, abs=0.3)
    assert found.costs == pytest.approx((13.0, -3.0), abs=1.0) and found.doubtful == (8,)
    assert find_references(mixed, SPECIES).costs == (0, 0)


def test_a_charge_that_all_have_costs_nothing(mixed):
    """Elements then hold it, as for a model that is not told."""
    for atoms in mixed:
        atoms.info["charge"] = 1
    assert find_references(mixed, SPECIES, charges=True) == find_references(mixed, SPECIES)


def test_charges_that_energies_show_are_named(mixed):
    """Unless elements alone give the energies as well: of neutral molecules, or of as many compositions as elements."""
    assert untold_charges(mixed) is None
    for atoms in mixed[::4]:
        atoms.info["charge"] = 1
    assert untold_charges(mixed) is None, "energies do not show it"
    for atoms in mixed[::4]:
        atoms.calc.results["energy"] += 12.0
    assert "charges from +0 to +1" in untold_charges(mixed) and "electronic_state" in untold_charges(mixed)
    few = [labelled("H2O", -2067.0), labelled("H3O", -2068.0, charge=1), labelled("O", -2040.0, charge=1)]
    assert untold_charges(few) is None


def test_one_composition_with_a_wrong_energy():
    """Nothing tells the elements apart: they share a common value."""
    frames = [labelled("H2O", -2067.0 + 0.01 * n) for n in range(9)]
    frames[4].calc.results["energy"] = -2067.0 * 27.2114
    found = find_references(frames, SpeciesTable((1, 8)))
    assert 2 * found.energies[1] + found.energies[8] == pytest.approx(-2066.96, abs=0.05)
    assert found.energies[1] == pytest.approx(-689.0, abs=0.1) and found.doubtful == (4,)


def test_isolated_atoms_are_what_they_are(mixed):
    """Known from frames or settings, they are exact; what binds the atoms is not in them."""
    alone = [labelled("H", -13.0, config_type="IsolatedAtom"), labelled("O", -2035.0, config_type="isolated_atom")]
    found = find_references([*alone, *mixed], SPECIES, isolated={8: -2036.0})
    assert found.energies[1] == -13.0 and found.energies[8] == -2036.0 and found.isolated == {1, 8}
    rest = [a.calc.results["energy"] - sum({1: -13.0, 8: -2036.0}.get(z, 0) for z in a.numbers) for a in mixed]
    carbons = [np.sum(a.numbers == 6) for a in mixed]
    assert found.energies[6] == pytest.approx(np.median(np.divide(rest, carbons)), abs=10)
    assert without_isolated_atoms([*alone, *mixed]) == mixed


def test_references_of_a_potential_stay(mixed):
    """Only what is new is fitted, to what the old ones leave."""
    kept = {1: -10.0, 8: -2040.0}
    alone = labelled("H", -13.0, config_type="IsolatedAtom")
    found = find_references([alone, *mixed], SPECIES, kept=kept)
    assert {z: found.energies[z] for z in kept} == kept and found.isolated == frozenset()
    assert reference_energies(mixed, SPECIES, {z: TRUE[z] for z in (1, 8)})[6] == pytest.approx(TRUE[6], abs=0.1)


def test_what_an_isolated_atom_is():
    assert is_isolated_atom(Atoms("H")) and not is_isolated_atom(Atoms("H", cell=[3, 3, 3], pbc=True))
    boxed = Atoms("H", cell=[20, 20, 20], pbc=True, info={"config_type": "IsolatedAtom"})
    assert is_isolated_atom(boxed)
    with pytest.raises(InputError, match="H2, not one atom"):
        is_isolated_atom(labelled("H2", 0.0, config_type="IsolatedAtom"))
    with pytest.raises(InputError, match=r"isolated H has the energies -13 and -12 eV"):
        find_references([labelled("H", -13.0), labelled("H", -12.0)], SpeciesTable((1,)))
    charged = labelled("H", 0.0, charge=1)
    assert find_references([labelled("H", -13.0), charged], SpeciesTable((1,))).energies == {1: -13.0}


def test_given_energies(tmp_path):
    assert given_references(TrainingSettings(reference_energies={"H": -13.6})) == {1: -13.6}
    write_structures(tmp_path / "atoms.extxyz", [labelled("H", -13.0), labelled("O", -2035.0)])
    assert given_references(TrainingSettings(reference_energies=tmp_path / "atoms.extxyz")) == {1: -13.0, 8: -2035.0}
    write_structures(tmp_path / "more.extxyz", [labelled("H", -13.0), labelled("H2", -27.0)])
    with pytest.raises(InputError, match=r"more\.extxyz, frame 1 is not one atom"):
        given_references(TrainingSettings(reference_energies=tmp_path / "more.extxyz"))
    with pytest.raises(ValueError, match="'Hx' is not a chemical symbol"):
        TrainingSettings(reference_energies={"Hx": 0.0})


def test_energies_that_do_not_count_in_the_training_still_tell_where_energies_lie(mixed):
    before = find_references(mixed, SPECIES).energies
    for atoms in mixed:
        atoms.info["energy_weight"] = 0.0
    assert find_references(mixed, SPECIES).energies == before
