"""What a potential remembers, and what of it a later training sees again."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator

from almlip_jax.keys import numpy_generator
from almlip_jax.structures.extxyz_reading import read_extxyz
from almlip_jax.structures.remembered import as_text, remember
from almlip_jax.structures.replay import replay


def labelled(name: str | Atoms, seed: int, energy: float = -5.0, **info: object) -> Atoms:
    """A distorted structure with labels, energy in eV/atom."""
    atoms = molecule(name) if isinstance(name, str) else name.copy()
    atoms.rattle(0.05, seed=seed)
    atoms.info.update(info)
    forces = np.random.default_rng(seed).normal(size=(len(atoms), 3))
    atoms.calc = SinglePointCalculator(atoms, energy=energy * len(atoms) + 0.01 * seed, forces=forces)
    return atoms


def copy(atoms: Atoms, shift: float = 0.0, **info: object) -> Atoms:
    """The same structure with an energy that is shifted by some eV."""
    other = atoms.copy()
    other.info.update(info)
    other.calc = SinglePointCalculator(other, **{**atoms.calc.results, "energy": atoms.calc.results["energy"] + shift})
    return other


def counts(structures: tuple[Atoms, ...]) -> Counter[str]:
    return Counter(f"{a.get_chemical_formula()} {a.info.get('config_type', '')}".strip() for a in structures)


def test_every_composition_and_config_type_has_its_share():
    water = [labelled("H2O", n, config_type="gas") for n in range(200)]
    rare = [labelled("H2O", 300 + n, config_type="scan") for n in range(2)]
    methane = [labelled("CH4", n) for n in range(30)]
    drawn = remember([*water, *rare, *methane], 12, numpy_generator(0, "replay"))
    assert counts(drawn) == {"H2O gas": 5, "H2O scan": 2, "CH4": 5}
    assert counts(remember([*water, *rare, *methane], 3, numpy_generator(1, "replay"))) == dict.fromkeys(
        ("H2O gas", "H2O scan", "CH4"), 1
    )
    again = remember([*water, *rare, *methane], 12, numpy_generator(0, "replay"))
    assert as_text(drawn) == as_text(again) != as_text(remember([*water, *methane], 12, numpy_generator(1, "replay")))
    assert len(remember(rare, 64, numpy_generator(0, "replay"))) == 2
    assert remember(water, 0, numpy_generator(0, "replay")) == ()


def test_old_memories_do_not_drown_in_new_data():
    """Neither where there is much more new data of the same composition, nor of many others."""
    old = [labelled("H2O", n, config_type="old") for n in range(64)]
    same = [labelled("H2O", 100 + n, config_type="old") for n in range(500)]
    positions = {atoms.positions.tobytes() for atoms in old}
    drawn = remember(same, 64, numpy_generator(0, "replay"), old)
    assert [atoms.positions.tobytes() in positions for atoms in drawn] == [True] * 32 + [False] * 32
    kinds = [labelled("H2O", n, config_type=f"kind {n}") for n in range(100)]
    assert counts(remember(kinds, 64, numpy_generator(0, "replay"), old))["H2O old"] == 32
    assert len(remember(same[:5], 64, numpy_generator(0, "replay"), old)) == 64


def test_memories_hold_what_a_training_looks_at(tmp_path: Path):
    """Every digit of labels, weights, charge and spin; neither remarks nor what teaches nothing."""
    solid = labelled(
        bulk("C", cubic=True), 0, charge=1, spin=2, weight=0.25, config_type="a b", remark={"of": object()}
    )
    solid.calc.results["stress"] = np.arange(6) / 7.0
    solid.calc.results["magmoms"] = np.zeros(8)
    unlabelled, weightless = molecule("H2O"), labelled("H2O", 1, weight=0.0)
    drawn = remember([solid, unlabelled, weightless], 9, numpy_generator(0, "replay"))
    (tmp_path / "kept.extxyz").write_text(as_text(drawn))
    (back,) = read_extxyz(tmp_path / "kept.extxyz")
    assert back.info == {"charge": 1, "spin": 2, "weight": 0.25, "config_type": "a b"} and back.pbc.all()
    assert sorted(back.calc.results) == ["energy", "forces", "stress"]
    for name, value in back.calc.results.items():
        np.testing.assert_array_equal(value, solid.calc.results[name])
    np.testing.assert_array_equal(back.positions, solid.positions)
    np.testing.assert_array_equal(back.cell.array, solid.cell.array)


def test_what_the_data_hold_is_not_trained_on_twice():
    solid, water = labelled(bulk("C", cubic=True), 0), [labelled("H2O", n) for n in range(4)]
    moved = copy(solid)
    moved.positions += np.array([[1, 0, 0]] * 4 + [[0, -2, 1]] * 4) @ solid.cell.array + 4e-5
    rounded = copy(water[2])
    rounded.positions = np.round(rounded.positions, 4)
    found = replay([solid, *water], [moved, rounded, labelled("H2O", 9)])
    assert found.structures == (water[0], water[1], water[3]) and "3 structures that" in found.remark
    assert replay(water, [copy(atoms) for atoms in water]).structures == ()
    assert replay(water, [copy(atoms) for atoms in water]).remark is None
    squeezed = copy(solid)
    squeezed.set_cell(0.99 * solid.cell.array)
    assert replay([solid], [squeezed, copy(water[0])]).structures == (solid,)


def test_labels_that_the_data_contradict_are_left_out():
    water, methane = [labelled("H2O", n) for n in range(5)], labelled("CH4", 0)
    one_corrected = [copy(water[0]), copy(water[1]), copy(water[2], 0.5)]
    found = replay([*water, methane], one_corrected)
    assert found.structures == (water[3], water[4], methane)
    assert "3 structures" in found.remark and "1 with other labels than in the data" in found.remark
    cations = [labelled("H2O", 10 + n, charge=1, spin=2) for n in range(3)]
    found = replay([*water, methane], cations)
    assert found.structures == (methane,) and "5 of a composition with another charge or spin" in found.remark


def test_states_that_a_potential_sees_do_not_contradict_each_other():
    """Even at the same places, and at energies that would be those of another label source."""
    water = [labelled("H2O", n) for n in range(3)]
    cations = [copy(atoms, 60.0, charge=1, spin=2) for atoms in water[:2]]
    assert replay(water, cations, sees_state=True).structures == tuple(water)
    assert replay([*water, *cations], cations, sees_state=True).structures == tuple(water)
    assert replay(water, cations).structures == ()


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (
            [copy(labelled("H2O", n), 0.05) for n in range(2)],
            "of 2 structures that the data share .* 2 have other labels",
        ),
        ([labelled("H2O", 50 + n, energy=-600.0) for n in range(2)], "energies of H2O .* 595 eV/atom from those of"),
    ],
)
def test_nothing_of_another_label_source_is_trained_on(data, sentence):
    found = replay([*(labelled("H2O", n) for n in range(4)), labelled("CH4", 0)], data)
    assert found.structures == ()
    assert re.search(f"{sentence}.*not trained on again, so that nothing holds", found.remark)


def test_a_potential_that_remembers_nothing_is_told():
    found = replay([], [labelled("H2O", 0)])
    assert found.structures == () and "remembers no structures" in found.remark and "lower" in found.remark
    assert "or by projection with fewer training.projection.iterations" in found.remark


def test_many_new_structures_do_not_outweigh_the_remembered_ones():
    """A third of a pass are remembered ones, where they can be; each comes a whole number of times."""
    methane = [labelled("CH4", n) for n in range(10)]
    assert replay(methane, [labelled("H2O", n) for n in range(30)]).copies == 2
    found = replay(methane, [labelled("H2O", n) for n in range(100)], [labelled("H2O", 200)])
    assert found.copies == 5 and "5 times in each pass" in found.remark
    assert replay(methane, [labelled("H2O", 0)]).copies == 1
