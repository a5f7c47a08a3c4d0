"""Labels as files hold them: virials, units, keys, energies of two kinds, weights; what cannot be right is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import voigt_6_to_full_3x3_stress

from almlip_jax.errors import InputError
from almlip_jax.structures.io import iterate_structures, read_structures, write_structures
from almlip_jax.structures.labels import FileReading, LabelKeys
from almlip_jax.structures.packing import pack
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.structures.weights import loss_weights
from almlip_jax.units import GPA

CELL = 'Lattice="3 0 0 0 3 0 0 0 3" pbc="T T T"'
ROWS = "Cu 0 0 0 0.1 0 0\nCu 1.5 1.5 1.5 -0.1 0 0\n"
STRESS = np.array([-1.0, -2.0, -3.0, 0.25, 0.5, 0.75]) / 27  # -virial / volume
VIRIAL = "1 -0.75 -0.5 -0.75 2 -0.25 -0.5 -0.25 3"


def frame(comment: str, cell: str = CELL, column: str = "forces") -> str:
    return f"2\n{cell} Properties=species:S:1:pos:R:3:{column}:R:3 {comment}\n{ROWS}"


def read(tmp_path: Path, *frames: str, **options: Any) -> list[Atoms]:
    path = tmp_path / "frames.xyz"
    path.write_text("".join(frames))
    return read_structures(path, require_labels=True, **options)


def copper(number: int, *, same_cell: bool, seed: int = 0) -> list[Atoms]:
    """Labelled copper at 0.1 Angstrom from its sites, in one cell or in cells strained by 4 %."""
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(number):
        atoms = bulk("Cu", cubic=True) * (2, 1, 1)
        if not same_cell:
            atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.04 * rng.normal(size=(3, 3))), scale_atoms=True)
        atoms.rattle(0.1, rng=rng)
        atoms.calc = EMT()
        results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(), "stress": atoms.get_stress()}
        atoms.calc = SinglePointCalculator(atoms, **results)
        frames.append(atoms)
    return frames


def scaled(frames: list[Atoms], factor: float) -> list[Atoms]:
    """The same with stresses in another unit."""
    found = []
    for atoms in frames:
        other = atoms.copy()
        other.calc = SinglePointCalculator(other, **atoms.calc.results | {"stress": atoms.get_stress() * factor})
        found.append(other)
    return found


# -------------------------------------------------------------------------------------------------------------- virials


@pytest.mark.parametrize("key", ["virial", "virials", "REF_virial", "REF_virials"])
def test_a_virial_is_minus_volume_times_stress(tmp_path: Path, key: str) -> None:
    atoms = read(tmp_path, frame(f'energy=-1 {key}="{VIRIAL}"'))[0]
    np.testing.assert_allclose(atoms.get_stress(), STRESS, rtol=1e-14)
    assert key not in atoms.info


def test_a_virial_has_a_key_of_its_own(tmp_path: Path) -> None:
    text = frame(f'energy=-1 dft_virial="{VIRIAL}"')
    np.testing.assert_allclose(read(tmp_path, text, virial_key="dft_virial")[0].get_stress(), STRESS, rtol=1e-14)
    voigt = frame('energy=-1 v="1 2 3 -0.25 -0.5 -0.75"')
    np.testing.assert_allclose(read(tmp_path, voigt, virial_key="v")[0].get_stress(), STRESS, rtol=1e-14)
    assert "stress" not in read(tmp_path, text)[0].calc.results
    for options in ({"stress_key": "REF_virial"}, {"virial_key": "dft_stress"}):
        with pytest.raises(InputError, match="by its name is a (virial|stress)"):
            read(tmp_path, text, **options)
    with pytest.raises(InputError, match="has 'other', which should hold the virial"):
        read(tmp_path, text, virial_key="other")


def test_stress_and_virial_must_agree(tmp_path: Path) -> None:
    def both(factor: float) -> str:
        full = " ".join(f"{value:.6f}" for value in factor * voigt_6_to_full_3x3_stress(STRESS).ravel())
        return frame(f'energy=-1 stress="{full}" virial="{VIRIAL}"')

    np.testing.assert_allclose(read(tmp_path, both(1.0))[0].get_stress(), STRESS, atol=1e-6)
    with pytest.raises(InputError, match="frame 1: 'virial' and the stress contradict each other: "):
        read(tmp_path, both(1.0), both(1.1))
    with pytest.raises(InputError, match=r"frame 0: .*contradict each other \(they agree except for the sign\)"):
        read(tmp_path, both(-1.0))


def test_only_crystals_have_a_stress(tmp_path: Path) -> None:
    """Calculators write infinite stresses for molecules, which say nothing; a crystal's must be numbers."""
    for word in ("inf", "nan"):
        text = f'energy=-1 stress="{" ".join([word] * 6)}"'
        atoms = read(tmp_path, frame(text, 'pbc="F F F"'))[0]
        assert set(atoms.calc.results) == {"energy", "forces"}
        with pytest.raises(InputError, match="frame 0: the stress is not finite; remove the stress"):
            read(tmp_path, frame(text))
    slab = read(tmp_path, frame(f'energy=-1 virial="{VIRIAL}"', CELL.replace("T T T", "T T F")))[0]
    assert "stress" not in slab.calc.results and "virial" in slab.info


def test_a_stress_of_six_numbers_is_in_voigt_order(tmp_path: Path) -> None:
    text = frame('energy=-1 stress="0.1 0.2 0.3 0.4 0.5 0.6" note="stress=1 2"')
    atoms = read(tmp_path, text)[0]
    np.testing.assert_array_equal(atoms.get_stress(), [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    with pytest.raises(InputError, match="frame 0 cannot be read .stress should be 9 numbers, or 6 in Voigt order"):
        read(tmp_path, frame('energy=-1 stress="1 2 3"'))


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"frame 0 cannot be read .energy is given twice, as -1 and -2.; correct it"):
        read(tmp_path, frame("energy=-1 energy=-2"))
    assert read(tmp_path, frame('energy=-1 energy=-1 note="energy=3 energy=4"'))[0].get_potential_energy() == -1


# ---------------------------------------------------------------------------------------------------------------- units


@pytest.mark.parametrize("same_cell", [True, False])
@pytest.mark.parametrize(("unit", "factor"), [("GPa", 1 / GPA), ("kbar", 10 / GPA)])
def test_stresses_in_another_unit_are_refused_or_converted(
    tmp_path: Path, unit: str, factor: float, same_cell: bool
) -> None:
    frames = copper(8, same_cell=same_cell)
    path = tmp_path / "frames.extxyz"
    write_structures(path, frames)
    read_structures(path)
    write_structures(path, scaled(frames, factor))
    with pytest.raises(InputError, match=f"the stresses of .*frames.extxyz .* look like numbers in {unit}"):
        read_structures(path)
    found = read_structures(path, keys=LabelKeys(stress_unit=unit))
    for one, expected in zip(found, frames, strict=True):
        np.testing.assert_allclose(one.get_stress(), expected.get_stress(), rtol=1e-12)
    raw = read_structures(path, keys=LabelKeys(stress_unit="eV/A^3"))  # the user's word
    np.testing.assert_allclose(raw[0].get_stress(), frames[0].get_stress() * factor)
    assert len(read_structures(path, ignore_labels=True)) == 8


def test_soft_matter_in_gpa_is_found_by_its_forces(tmp_path: Path) -> None:
    """Stresses of a few GPa look like those of shocked matter; in one cell they vary more than forces explain."""
    frames = copper(12, same_cell=True)
    mean = np.mean([atoms.get_stress() for atoms in frames], axis=0)
    for atoms in frames:
        atoms.calc.results["stress"] = atoms.get_stress() - mean  # at ambient pressure
    path = tmp_path / "frames.extxyz"
    write_structures(path, frames)
    read_structures(path)
    in_gpa = scaled(frames, 1 / GPA)
    assert np.median([np.abs(atoms.get_stress()).max() for atoms in in_gpa]) < 400 * GPA
    write_structures(path, in_gpa)
    with pytest.raises(InputError, match="vary far more than the forces .* look like numbers in GPa"):
        read_structures(path)


def test_extreme_pressures_are_believed(tmp_path: Path) -> None:
    """Shock waves at 300 GPa, one frame beyond, perfect crystals under strain: no forces, large stresses."""
    shocked = copper(9, same_cell=True)
    crystals = [bulk("Cu", a=3.0 * scale) for scale in np.linspace(0.85, 1.1, 9)]
    for number, atoms in enumerate(shocked):
        atoms.calc.results["stress"][:3] -= (330 if number % 3 else 700) * GPA
    for atoms in crystals:
        atoms.calc = EMT()
        results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(), "stress": atoms.get_stress()}
        atoms.calc = SinglePointCalculator(atoms, **results)
    for frames in (shocked, crystals, shocked[:1]):
        path = tmp_path / "frames.extxyz"
        write_structures(path, frames)
        assert len(read_structures(path)) == len(frames)


# ------------------------------------------------------------------------------------------------------------- energies


def test_the_free_energy_belongs_to_the_forces(tmp_path: Path) -> None:
    both, alone = "free_energy=-1.2 energy=-1.0", "free_energy=-1.2"
    for text in (both, alone):
        found = read(tmp_path, frame(text), frame(text))[0]
        assert found.calc.results["energy"] == -1.2 and "free_energy" not in found.calc.results
    found = read(tmp_path, frame(both), frame("energy=-1.0"), energy_key="energy")
    assert [atoms.get_potential_energy() for atoms in found] == [-1.0, -1.0]
    write_structures(tmp_path / "again.xyz", found)
    assert read_structures(tmp_path / "again.xyz")[0].get_potential_energy() == -1.0


def test_energies_of_two_kinds_do_not_mix(tmp_path: Path) -> None:
    both = frame("free_energy=-1.2 energy=-1.0")
    for other in (frame("energy=-1.0"), frame("REF_energy=-1.0")):
        for order in ([both, other], [other, both], [frame("free_energy=-1.2"), other]):
            with pytest.raises(
                InputError, match="frame . has a free_energy, .*frame . has only an energy; name the key"
            ):
                read(tmp_path, *order)
    equal = frame("free_energy=-1.0 energy=-1.0")  # no smearing
    assert len(read(tmp_path, equal, frame("energy=-1.0"))) == 2
    one, other = tmp_path / "one.xyz", tmp_path / "other.xyz"
    one.write_text(both)
    other.write_text(frame("energy=-1.0"))
    with pytest.raises(InputError, match="one.xyz, frame 0 has a free_energy, .*other.xyz, frame 0 has only"):
        read_structures([one, other])


def test_a_single_atom_has_no_forces(tmp_path: Path) -> None:
    path = tmp_path / "atom.xyz"
    path.write_text('1\nProperties=species:S:1:pos:R:3 REF_energy=-13.6 pbc="F F F"\nH 0 0 0\n')
    np.testing.assert_array_equal(read_structures(path, require_labels=True)[0].get_forces(), np.zeros((1, 3)))
    assert set(read_structures(path)[0].calc.results) == {"energy"}


def test_likely_keys_are_named(tmp_path: Path) -> None:
    text = frame("dft_energy=-1", column="dft_force")
    with pytest.raises(InputError, match=r"perhaps dft_energy, dft_force. with --energy-key and --forces-key, or keys"):
        read(tmp_path, text)
    with pytest.raises(InputError, match=r"frame 1 has no energy; .* .perhaps Energy. with --energy-key"):
        read(tmp_path, frame("energy=-1"), frame("Energy=-1"))
    found = read(tmp_path, text, **FileReading(keys={"energy": "dft_energy", "forces": "dft_force"}).arguments)
    assert found[0].get_potential_energy() == -1 and found[0].get_forces()[0, 0] == 0.1


@pytest.mark.parametrize(
    ("column", "told"),
    [("force", "dft_energy, force"), ("gradient", "gradient with its sign turned"), ("dEdR", "dft_energy, dEdR")],
)
def test_columns_that_may_be_forces_are_named(tmp_path: Path, column: str, told: str) -> None:
    with pytest.raises(InputError, match=rf"perhaps .*{told}\) with --energy-key and --forces-key"):
        read(tmp_path, frame("dft_energy=-1", column=column))


def test_gradients_are_no_forces() -> None:
    with pytest.raises(InputError, match="'gradient', which by its name holds gradients of the energy"):
        LabelKeys.named(forces="gradient")


def test_labels_that_are_ignored_are_not_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "frames.xyz"
    path.write_text(
        frame(f'REF_energy=nan weight=high virial="{VIRIAL}" stress="1 2 3 4 5 6 7 8 9"', column="REF_forces")
    )
    for found in (read_structures(path, ignore_labels=True)[0], next(iterate_structures(path, ignore_labels=True))):
        assert found.calc is None and set(found.arrays) == {"numbers", "positions"} and set(found.info) == {"weight"}
    with pytest.raises(InputError, match="frame 0: weight is 'high'"):
        next(iterate_structures(path))


# -------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("comment", "expected"),
    [
        ("", (1.0, 1.0, 1.0)),
        ("weight=2", (2.0, 2.0, 2.0)),
        ("config_weight=0.0", (0.0, 0.0, 0.0)),
        ("weight=2 energy_weight=0", (0.0, 2.0, 2.0)),
        ("config_weight=2 config_forces_weight=3 config_virials_weight=0.5", (2.0, 6.0, 1.0)),
        ("force_weight=3 stress_weight=0", (1.0, 3.0, 0.0)),
    ],
)
def test_weights_go_by_the_names_people_use(tmp_path: Path, comment: str, expected: tuple[float, float, float]) -> None:
    atoms = read(tmp_path, frame(f'energy=-1 virial="{VIRIAL}" {comment}'))[0]
    weights = loss_weights(atoms, "frame")
    assert tuple(weights[name] for name in ("energy", "forces", "stress")) == expected
    assert not any(key.startswith(("config", "force_")) for key in atoms.info)
    data = pack([atoms], SpeciesTable((29,)), 3.0, neighbors=64).data
    found = tuple(data.weights[name][0] for name in ("energy", "forces", "virial"))
    np.testing.assert_array_equal(found, np.float32(expected))


@pytest.mark.parametrize(
    ("comment", "message"),
    [
        ("weight=high", "weight is 'high', but a weight is a number of at least 0"),
        ("weight=nan", "weight is nan, but"),
        ("weight=inf", "weight is inf, but"),
        ("weight=-1", "weight is -1, but"),
        ('weight="1 2"', r"weight is array\(\[1, 2\]\), but"),
        ("weight=T", "weight is True, but"),
        ("config_energy_weight=-0.5", "config_energy_weight is -0.5, but"),
        ("weight=1 config_weight=2", "weight and config_weight contradict each other; keep weight"),
    ],
)
def test_weights_that_are_none_are_named(tmp_path: Path, comment: str, message: str) -> None:
    with pytest.raises(InputError, match=f"frames.xyz, frame 1: {message}"):
        read(tmp_path, frame("energy=-1"), frame(f"energy=-1 {comment}"))


def test_a_weight_that_is_none_is_refused_without_a_file_too() -> None:
    atoms = copper(1, same_cell=True)[0]
    atoms.info["weight"] = "high"
    with pytest.raises(InputError, match="structure 1: weight is 'high'"):
        pack([copper(1, same_cell=True)[0], atoms], SpeciesTable((29,)), 3.0, neighbors=64)


def test_stresses_count_where_they_are_given(tmp_path: Path) -> None:
    """Of a set with some stresses, some virials and some of neither, just those have a weight."""
    frames = [
        frame("energy=-1"),
        frame(f'energy=-1 virial="{VIRIAL}"'),
        frame('energy=-1 stress="0.1 0.2 0.3 0 0 0"'),
        frame(f'energy=-1 virial="{VIRIAL}"', CELL.replace("T T T", "T F F")),
    ]
    data = pack(read(tmp_path, *frames), SpeciesTable((29,)), 3.0, neighbors=64).data
    np.testing.assert_array_equal(data.weights["virial"][:4], [0, 1, 1, 0])
    np.testing.assert_allclose(data.labels["virial"][1], np.array(VIRIAL.split(), float).reshape(3, 3), rtol=1e-6)
    np.testing.assert_allclose(np.diag(data.labels["virial"][2]), [-2.7, -5.4, -8.1], rtol=1e-6)
    np.testing.assert_array_equal(data.weights["energy"][:4], np.ones(4))
