"""Generated structures: what they are, that they are sane, and what is refused before anything is paid."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.constraints import FixAtoms
from ase.data import covalent_radii
from pydantic import ValidationError

from almlip_jax.errors import InputError
from almlip_jax.generation import GenerationInputs, GeneratorSettings
from almlip_jax.generation.base import apart

SALT = bulk("NaCl", "rocksalt", a=5.64, cubic=True)


def made(starts: list[Atoms], seed: int = 0, **settings: Any) -> list[Atoms]:
    one = GeneratorSettings.parse(settings)
    one.check(starts)
    frames = list(one.generate(GenerationInputs(starts, np.random.default_rng(seed))))
    assert len(frames) == one.count and all(apart(frame, one.closest) for frame in frames)
    return frames


def test_rattled_moves_what_is_free():
    start = SALT.copy()
    start.set_constraint(FixAtoms([0, 3]))
    start.info.update(charge=1, spin=2, remark="x")
    frames = made([start], kind="rattled", count=200, stdev=0.1)
    moved = np.array([frame.positions - start.positions for frame in frames])
    assert np.all(moved[:, [0, 3]] == 0)
    assert np.std(moved[:, [1, 2, 4]]) == pytest.approx(0.1, rel=0.1)
    assert all(frame.info == {"charge": 1, "spin": 2} and frame.constraints for frame in frames)


@pytest.mark.parametrize("shape", ["full", "isotropic"])
def test_strained_carries_atoms_along(shape):
    frames = made([SALT], kind="strained", count=300, strain=0.04, shape=shape)
    strains = np.array([np.linalg.solve(SALT.cell.array, frame.cell.array) - np.eye(3) for frame in frames])
    np.testing.assert_allclose(strains, np.swapaxes(strains, 1, 2), atol=1e-12)
    assert 0.035 < np.abs(strains).max() <= 0.04 + 1e-12
    assert np.std(strains[:, 0, 0]) == pytest.approx(0.04 / np.sqrt(3), rel=0.15)
    assert (np.abs(strains[:, 0, 1]).max() > 0.03) == (shape == "full")
    for frame in frames[:5]:
        np.testing.assert_allclose(frame.get_scaled_positions(), SALT.get_scaled_positions(), atol=1e-12)


def test_vacancies_take_atoms_out():
    start = SALT.copy()
    frames = made([start], kind="vacancies", count=40, repeat=[2, 1, 1], missing=3, species=["Na"])
    missing = [16 - len(frame) for frame in frames]
    assert set(missing) == {1, 2, 3}
    for frame in frames:
        assert np.sum(frame.numbers == 17) == 8 and np.allclose(frame.cell.lengths(), [11.28, 5.64, 5.64])
    sites = start.repeat((2, 1, 1)).positions
    assert all(np.min(np.linalg.norm(sites - at, axis=1)) < 1e-9 for at in frames[0].positions)


def test_surfaces_are_cut_where_asked():
    frames = made([SALT], kind="surfaces", count=6, indices=[[1, 0, 0], [1, 1, 0]], layers=2, vacuum=7.0)
    for number, frame in enumerate(frames):
        assert frame.pbc.tolist() == [True, True, False]
        heights = frame.positions[:, 2]
        assert heights.min() == pytest.approx(7) and frame.cell[2, 2] - heights.max() == pytest.approx(7)
        thickness = 2 * 5.64 if number % 2 == 0 else 2 * 5.64 / np.sqrt(2)
        assert 0.4 * thickness < np.ptp(heights) <= thickness + 1e-9
        assert np.sum(frame.numbers == 11) == np.sum(frame.numbers == 17)
    (closed,) = made([SALT], kind="surfaces", count=1, layers=1, periodic_normal=True)
    assert closed.pbc.all()


def test_random_search_draws_cells_of_the_volume_asked_for():
    frames = made([], kind="random_search", count=30, composition={"Si": 1, "O": 2}, units=[1, 3], volume=[14, 20])
    sizes = {len(frame) for frame in frames}
    assert sizes == {3, 6, 9}
    for frame in frames:
        assert frame.pbc.all() and 14 <= frame.get_volume() / len(frame) <= 20
        assert np.sum(frame.numbers == 8) == 2 * np.sum(frame.numbers == 14)
        cell = frame.cell.cellpar()
        assert np.all((cell[3:] >= 60 - 1e-9) & (cell[3:] <= 120 + 1e-9)) and cell[:3].max() < 2.01 * cell[:3].min()
    like = made([bulk("Si")], kind="random_search", count=10)
    assert all(frame.get_chemical_formula() == "Si2" for frame in like)
    volumes = [frame.get_volume() / bulk("Si").get_volume() for frame in like]
    assert min(volumes) >= 0.8 and max(volumes) <= 1.3


def test_the_same_random_numbers_give_the_same_structures():
    for kind in ("strained", "surfaces", "random_search"):
        one, same, other = (made([SALT], seed, kind=kind, count=2) for seed in (1, 1, 2))
        assert all(np.array_equal(a.positions, b.positions) for a, b in zip(one, same, strict=True))
        assert not np.allclose(one[0].cell.array, other[0].cell.array) or not np.allclose(
            one[0].positions, other[0].positions
        )


def test_atoms_and_their_images_are_told_apart():
    near = 0.6 * 2 * covalent_radii[6]
    assert apart(Atoms("C2", positions=[[0, 0, 0], [0, 0, near + 0.01]]), 0.6)
    assert not apart(Atoms("C2", positions=[[0, 0, 0], [0, 0, near - 0.01]]), 0.6)
    thin = Atoms("C", cell=[9, 9, near - 0.01], pbc=True)
    assert not apart(thin, 0.6) and apart(Atoms("C", cell=thin.cell, pbc=[True, True, False]), 0.6)
    across = Atoms("C2", positions=[[0, 0, 0.1], [0, 0, 8.9]], cell=[9, 9, 9], pbc=True)
    assert not apart(across, 0.6)
    skewed = Atoms("C", cell=[[3, 0, 0], [6.5, 0.6, 0], [0, 0, 9]], pbc=True)  # second less twice the first: 0.78
    assert not apart(skewed, 0.6) and apart(skewed, 0.5)


@pytest.mark.parametrize(
    ("starts", "settings", "message"),
    [
        ([molecule("H2O")], {"kind": "strained"}, "start geometry 0 is not periodic in three directions"),
        ([SALT, molecule("H2O")], {"kind": "vacancies"}, "start geometry 1 is not periodic"),
        ([SALT], {"kind": "vacancies", "missing": 5, "species": ["Na"]}, "which has 4 of them"),
        ([SALT], {"kind": "surfaces", "layers": 30}, r"the slab \[1, 0, 0\] .* has 240 atoms, more than largest 200"),
        ([], {"kind": "random_search", "composition": {"C": 2}}, "give both, or these"),
        ([molecule("H2O")], {"kind": "random_search"}, "give a volume"),
        (
            [SALT.repeat(2)],
            {"kind": "rattled", "stdev": 2.0},
            "nearly always brings atoms of start geometry 0 closer than 0.6",
        ),
        ([], {"kind": "random_search", "composition": {"C": 9}, "volume": [1, 1.2]}, "which is too little for C9"),
        ([], {"kind": "random_search", "composition": {"C": 9}, "volume": [2, 2.2]}, "finds no places for 9 atoms"),
    ],
)
def test_what_cannot_be_made_is_refused(starts, settings, message):
    with pytest.raises(InputError, match=message):
        made(starts, **settings)


def test_charged_crystals_are_not_cut():
    charged = SALT.copy()
    charged.info["charge"] = 1
    for kind in ("vacancies", "surfaces", "random_search"):
        with pytest.raises(InputError, match=f"'{kind}' makes pieces of crystals, .* has charge \\+1"):
            made([charged], kind=kind)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "vacancies", "species": ["Xx"]}, "'Xx' is no element"),
        ({"kind": "surfaces", "indices": [[0, 0, 0]]}, "those of no surface"),
        ({"kind": "random_search", "units": [3, 1]}, "the smaller one comes first"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        GeneratorSettings.parse(settings)
