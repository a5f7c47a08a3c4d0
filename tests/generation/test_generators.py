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
    taken = one.take(starts)
    frames = list(one.generate(GenerationInputs(taken.starts, np.random.default_rng(seed), taken.numbers)))
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


def test_clusters_touch_and_hold_one_ion_at_most():
    metal = made([], kind="clusters", count=30, composition={"Cu": 9, "Au": 4}, contact=[0.9, 1.0])
    water, ion = molecule("H2O"), Atoms("OH3", [[0, 0, 0], [0.9, 0, 0.3], [-0.5, 0.8, 0.3], [-0.5, -0.8, 0.3]])
    ion.info.update(charge=1, spin=1)
    wet = made([water, ion], kind="clusters", count=40, pieces=[1, 4])
    for frame in metal:
        assert frame.get_chemical_formula() == "Au4Cu9" and not frame.pbc.any() and frame.info == {}
        assert _nearest(frame)[1:].max() <= 1.0 + 1e-9 and _nearest(frame).min() >= 0.9 - 1e-9
        np.testing.assert_allclose(frame.positions.mean(axis=0), 0, atol=1e-9)
    spread = np.mean([np.linalg.norm(frame.positions, axis=1).max() for frame in metal])
    assert spread < 5.5, "compact rather than branched"
    ions = [frame.info["charge"] for frame in wet]
    assert set(ions) == {0, 1}
    for frame in wet:
        assert np.sum(frame.numbers == 8) in (1, 2, 3, 4) and frame.info["spin"] == 1
        assert np.sum(frame.numbers == 1) == 2 * np.sum(frame.numbers == 8) + frame.info["charge"]
    lone = {np.sum(frame.numbers == 8): frame for frame in wet}[2]
    first, second = lone[: len(lone) - 3], lone[len(lone) - 3 :]
    reach = covalent_radii[first.numbers][:, None] + covalent_radii[second.numbers]
    between = np.linalg.norm(first.positions[:, None] - second.positions, axis=-1) / reach
    assert 1.6 - 1e-9 <= between.min() <= 2.4
    np.testing.assert_allclose(second.get_all_distances(), water.get_all_distances(), atol=1e-9)


def _nearest(frame: Atoms) -> np.ndarray:
    """Distance of each atom to the nearest other over the sum of their covalent radii."""
    radii = covalent_radii[frame.numbers]
    share = frame.get_all_distances() / (radii[:, None] + radii)
    np.fill_diagonal(share, np.inf)
    return share.min(axis=0)


def test_conformers_differ_and_keep_their_bonds():
    pytest.importorskip("rdkit")
    start = molecule("CH3CH2OH")
    start.info.update(charge=0, spin=1)
    frames = made_of([start, molecule("C6H6")], kind="conformers", count=20)
    ethanol = [frame for frame in frames if len(frame) == 9]
    assert len(frames) - len(ethanol) == 1, "benzene has one"
    assert 2 <= len(ethanol) <= 3, "anti, gauche and its mirror image"
    carbon, oxygen = np.flatnonzero(start.numbers == 6), int(np.flatnonzero(start.numbers == 8)[0])
    (hydroxyl,) = [n for n in np.flatnonzero(start.numbers == 1) if start.get_distance(n, oxygen) < 1.1]
    near = min(carbon, key=lambda n: start.get_distance(n, oxygen))
    far = next(n for n in carbon if n != near)
    turned = sorted(min(a, 360 - a) for a in (f.get_dihedral(far, near, oxygen, hydroxyl) for f in ethanol))
    assert turned[0] == pytest.approx(60, abs=10) and turned[-1] == pytest.approx(180, abs=10)
    for frame in ethanol:
        assert list(frame.numbers) == list(start.numbers) and frame.info == {"charge": 0, "spin": 1}
        assert frame.get_distance(near, oxygen) == pytest.approx(start.get_distance(near, oxygen), abs=0.05)
    named = made_of([], kind="conformers", count=12, smiles=["NCC(=O)O", "C[NH3+]"], least_rmsd=0.5)
    assert {frame.info["charge"] for frame in named} == {0, 1}
    assert GeneratorSettings.parse({"kind": "conformers", "smiles": ["CCO"]}).elements == {1, 6, 8}


def made_of(starts: list[Atoms], **settings: Any) -> list[Atoms]:
    """As `made`, of a kind that gives fewer structures where there are not as many."""
    one = GeneratorSettings.parse(settings)
    frames = list(one.generate(GenerationInputs(one.take(starts).starts, np.random.default_rng(0))))
    assert 0 < len(frames) <= one.count and all(apart(frame, one.closest) for frame in frames)
    return frames


@pytest.mark.parametrize(
    ("starts", "settings", "message"),
    [
        ([], {}, "give these, or smiles"),
        ([], {"smiles": ["foo"]}, "is not the SMILES"),
        ([], {"smiles": ["[CH3]"]}, "is a radical"),
        ([], {"smiles": ["[Fe]"]}, "no parameters for Fe"),
        ([SALT], {}, "periodic"),
        ([molecule("CH3")], {}, "multiplicity 2"),
        ([Atoms("OH2OH2", [[0, 0, 0], [0, 0, 1], [0, 1, 0], [3, 0, 0], [3, 0, 1], [3, 1, 0]])], {}, "several parts"),
    ],
)
def test_what_has_no_conformers_is_refused(starts, settings, message):
    pytest.importorskip("rdkit")
    with pytest.raises(InputError, match=message):
        GeneratorSettings.parse({"kind": "conformers", **settings}).take(starts)


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
        ([molecule("CO"), molecule("H2O")], {"kind": "vacancies"}, "start geometry 0 is not periodic, likewise 1"),
        ([SALT], {"kind": "vacancies", "missing": 5, "species": ["Na"]}, "has, when repeated, 4 atoms that may be"),
        ([SALT], {"kind": "surfaces", "layers": 30}, r"a slab \[1, 0, 0\] of 240 atoms, more than largest 200"),
        ([], {"kind": "random_search", "composition": {"C": 2}}, "give both, or these"),
        ([molecule("H2O")], {"kind": "random_search"}, "give a volume"),
        (
            [SALT.repeat(2)],
            {"kind": "rattled", "stdev": 2.0},
            "nearly always brings atoms of start geometry 0 closer than 0.6",
        ),
        ([], {"kind": "clusters"}, "give these, or a composition"),
        ([SALT], {"kind": "clusters"}, "start geometry 0 is periodic"),
        ([molecule("CH3")], {"kind": "clusters"}, "multiplicity 2"),
        (
            [Atoms("OH", [[0, 0, 0], [0, 0, 1]], info={"charge": -1})],
            {"kind": "clusters"},
            "no start geometry is neutral",
        ),
        ([], {"kind": "random_search", "composition": {"C": 9}, "volume": [1, 1.2]}, "which is too little for C9"),
        ([], {"kind": "random_search", "composition": {"C": 9}, "volume": [2, 2.2]}, "finds no places for 9 atoms"),
    ],
)
def test_what_cannot_be_made_is_refused(starts, settings, message):
    with pytest.raises(InputError, match=message):
        made(starts, **settings)


WATER = molecule("H2O")
SLAB = Atoms("Na", cell=[4, 4, 20], pbc=[True, True, False])
ION = Atoms("OH", [[0, 0, 0], [0, 0, 1]], info={"charge": -1})
LIKE = {
    "strained": {"salt"},
    "surfaces": {"salt"},
    "vacancies": {"salt"},
    "random_search": {"salt"},
    "clusters": {"water", "ion"},
    "rattled": {"water", "salt", "slab", "ion"},
}


@pytest.mark.parametrize("kind", [*LIKE, "conformers"])
def test_start_geometries_that_do_not_suit_are_left_out(kind):
    """What is made of the others is what would be made of them alone, and says where it is from."""
    if kind == "conformers":
        pytest.importorskip("rdkit")
    named = {"water": WATER, "salt": SALT, "slab": SLAB, "ion": ION}
    starts = [frame.copy() for frame in named.values()]
    for name, start in zip(named, starts, strict=True):
        start.info["system"] = name
    one = GeneratorSettings.parse({"kind": kind, "count": 8})
    taken = one.take(starts)
    own = LIKE.get(kind, {"water", "ion"})
    assert {start.info["system"] for start in taken.starts} == own
    assert [starts[number] for number in taken.numbers] == taken.starts
    alone = [start for start in starts if start.info["system"] in own]
    frames, same = (
        list(one.generate(GenerationInputs(some, np.random.default_rng(5)))) for some in (taken.starts, alone)
    )
    assert all(np.array_equal(a.positions, b.positions) for a, b in zip(frames, same, strict=True))
    assert {frame.info["system"] for frame in frames} <= own
    for frame in frames:
        assert set(frame.symbols) <= set(named[frame.info["system"]].symbols), "an ion among water is the ion's"
    if kind == "rattled":
        assert taken.left_out is None
        assert [frame.info["system"] for frame in frames] == [*named] * 2
    elif "salt" in own:
        assert f"'{kind}' leaves out 3 of 4 start geometries: start geometry 0 (water) is not" in taken.left_out
    else:
        assert f"'{kind}' leaves out 2 of 4 start geometries: start geometry 1 (salt) is periodic" in taken.left_out
        assert taken.left_out.endswith(", likewise 2 (slab).")


def test_systems_are_asked_for_by_name():
    starts = [WATER.copy(), SALT.copy(), SALT.copy(), bulk("Si")]
    for start, name in zip(starts, ("water", "salt", "salt", "silicon"), strict=True):
        start.info["system"] = name
    starts[2].pbc = False
    one = GeneratorSettings.parse({"kind": "strained", "systems": ["salt", "silicon"]})
    assert one.take(starts).numbers == [1, 3], "and of a system what suits"
    assert one.take(starts).left_out == (
        "'strained' leaves out 1 of 3 start geometries: start geometry 2 (salt) is not periodic in three directions "
        "(take 'rattled' for it)."
    )
    for name, why in (("water", r"nothing of system 'water': start geometry 0 \(water\)"), ("gold", "has none")):
        with pytest.raises(InputError, match=why):
            GeneratorSettings.parse({"kind": "strained", "systems": ["salt", name]}).take(starts)
    many = [starts[0], *[starts[1]] * 4, *[starts[3]] * 3]
    left_out = GeneratorSettings.parse({"kind": "clusters"}).take(many).left_out
    assert left_out.startswith("'clusters' leaves out 7 of 8 start geometries: start geometry 1 (salt) is periodic")
    assert left_out.endswith(", likewise 5 (silicon), 5 more."), "one of each system"


def test_charged_crystals_are_not_cut():
    charged = SALT.copy()
    charged.info["charge"] = 1
    for kind in ("vacancies", "surfaces", "random_search"):
        with pytest.raises(InputError, match=f"'{kind}' can make nothing of .* has charge \\+1"):
            made([charged], kind=kind)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "vacancies", "species": ["Xx"]}, "'Xx' is not a chemical element"),
        ({"kind": "surfaces", "indices": [[0, 0, 0]]}, "describe no surface"),
        ({"kind": "random_search", "units": [3, 1]}, "the smaller one comes first"),
        ({"kind": "clusters", "composition": {"Cu": 3}, "pieces": [2, 3]}, "leave them out"),
        ({"kind": "clusters", "relax": {"cell": "full"}}, "no cell that could be relaxed"),
        ({"kind": "clusters", "contact": [0.5, 0.8]}, "less than closest"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        GeneratorSettings.parse(settings)
