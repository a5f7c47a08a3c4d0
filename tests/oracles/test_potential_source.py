"""A saved potential as a label source: labels are its predictions, bound to what it is, of states that it knows."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator

from almlip_jax.ensembles import EnsembleSettings, build_ensemble
from almlip_jax.errors import InputError, LabelError
from almlip_jax.models import Params, SharedDensitySettings
from almlip_jax.oracles import Labeller, LabelStore, LocalSettings, PotentialSourceSettings, structure_identity
from almlip_jax.potential import Potential
from almlip_jax.structures.species import SpeciesTable

MODEL = SharedDensitySettings(cutoff=3.0, radial=4, l_max=0, channels=4, hidden=(8,))
MEMBERS = EnsembleSettings(size=2)
SPECIES = SpeciesTable((1, 8))


def water(seed: int, charge: int = 0) -> Atoms:
    atoms = molecule("H2O")
    atoms.rattle(0.05, seed=seed)
    atoms.info["charge"] = charge
    return atoms


@cache
def drawing() -> Callable[[jax.Array], Params]:
    return jax.jit(build_ensemble(MODEL, MEMBERS, SPECIES).init)


def remembering(*frames: Atoms, seed: int = 0) -> Potential:
    """A potential with random parameters that remembers some structures."""
    for atoms in frames:
        atoms.calc = SinglePointCalculator(atoms, energy=-5.0, forces=np.zeros((len(atoms), 3)))
    params = drawing()(jax.random.key(seed))
    return Potential(MODEL, SPECIES, params, {1: -1.0, 8: -3.0}, members=MEMBERS, remembered=frames)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    remembering(water(1)).save(tmp_path / "potential")
    return tmp_path / "potential"


def test_labels_are_predictions(folder: Path) -> None:
    source, frames = PotentialSourceSettings(path=folder), [water(2), water(3)]
    found = [source.build()(atoms) for atoms in frames]
    wanted = Potential.load(folder).evaluate(frames)
    np.testing.assert_allclose([one.energy for one in found], wanted.energy, rtol=1e-6)
    for one, forces in zip(found, wanted.forces, strict=True):
        np.testing.assert_allclose(one.forces, forces, atol=1e-5)
        assert one.stress is None


def test_identity_is_the_potential_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    def identity(path: Path) -> str:
        return structure_identity(water(2), PotentialSourceSettings(path=path))

    shutil.copytree(folder, tmp_path / "elsewhere")
    assert identity(tmp_path / "elsewhere") == identity(folder)
    potential = Potential.load(folder)
    for name, other in (
        ("parameters", remembering(seed=1)),
        ("references", replace(potential, reference_energies={1: -1.5, 8: -3.0})),
    ):
        other.save(tmp_path / name)
        assert identity(tmp_path / name) != identity(folder), name
    remembering(water(4)).save(tmp_path / "memory")  # predicts the same
    assert identity(tmp_path / "memory") == identity(folder)
    next((tmp_path / "elsewhere").glob("remembered-*")).unlink()
    assert identity(tmp_path / "elsewhere") == identity(folder)


def test_what_it_has_not_learned_of_is_refused(folder: Path, tmp_path: Path) -> None:
    source = PotentialSourceSettings(path=folder)
    source.check(water(2))
    with pytest.raises(LabelError, match=r"does not know C"):
        source.check(molecule("CH4"))
    with pytest.raises(LabelError, match=r"learned of charge 0, spin 1, and the structure has charge 1"):
        source.check(water(2, charge=1))
    remembering(water(1, charge=1)).save(tmp_path / "cation")
    cation = PotentialSourceSettings(path=tmp_path / "cation")
    cation.check(water(2, charge=1))
    with pytest.raises(LabelError, match="learned of charge 1"):
        cation.check(water(2))
    remembering().save(tmp_path / "forgetful")
    with pytest.raises(LabelError, match="learned of charge 0"):
        PotentialSourceSettings(path=tmp_path / "forgetful").check(water(2, charge=1))
    PotentialSourceSettings(path=tmp_path / "forgetful", any_state=True).check(water(2, charge=1))
    replace(remembering(), metadata={"states_met": [[1, 1]]}).save(tmp_path / "of cations")
    PotentialSourceSettings(path=tmp_path / "of cations").check(water(2, charge=1))
    with pytest.raises(LabelError, match="learned of charge 1"):
        PotentialSourceSettings(path=tmp_path / "of cations").check(water(2))


def test_a_folder_that_holds_none_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not a potential: it has no potential\.json"):
        PotentialSourceSettings(path=tmp_path).version()
    other = tmp_path / "other"
    remembering(seed=1).save(other)
    (place,) = folder.glob("params-*")
    shutil.rmtree(place)
    shutil.copytree(next(other.glob("params-*")), place)
    with pytest.raises(InputError, match="not those that belong there"):
        PotentialSourceSettings(path=folder).build()


@pytest.mark.slow
def test_workers_label_with_it_and_the_store_knows_its_labels(folder: Path, tmp_path: Path) -> None:
    source, frames = PotentialSourceSettings(path=folder), [water(2), water(3)]
    wanted = Potential.load(folder).evaluate(frames)
    for cached in (False, True):
        with (
            LabelStore(tmp_path / "labels.db") as store,
            Labeller(source, store, LocalSettings(workers=1)) as labeller,
        ):
            results = labeller.label(frames, {"purpose": "test"})
            assert [one.error for one in results] == [None, None] and [one.cached for one in results] == [cached] * 2
            energies = [one.atoms.get_potential_energy() for one in results if one.atoms is not None]
            np.testing.assert_allclose(energies, wanted.energy, rtol=1e-6)
