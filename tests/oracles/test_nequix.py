"""Nequix as a label source: derivatives, conventions, refusals, and how often it compiles.

What needs the package (``pip install "almlip-jax[nequix]"``) is skipped without it; the weights are random.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111, molecule

from almlip_jax.errors import InputError, LabelError
from almlip_jax.oracles import NequixSettings, SourceSettings, structure_identity
from almlip_jax.oracles.base import LabelSource, obtain_label
from almlip_jax.oracles.sources.nequix import rooms

CONFIG = {
    "atomic_numbers": [1, 8, 14],
    "cutoff": 4.0,
    "hidden_irreps": "8x0e+4x1o+4x2e",
    "lmax": 2,
    "n_layers": 2,
    "radial_basis_size": 4,
    "radial_mlp_size": 8,
    "radial_mlp_layers": 2,
    "radial_polynomial_p": 6.0,
    "mlp_init_scale": 4.0,
    "index_weights": True,
    "layer_norm": True,
    "shift": 0.3,
    "scale": 1.5,
    "avg_n_neighbors": 20.0,
}


@pytest.fixture
def header(tmp_path: Path) -> NequixSettings:
    """A file that says what a model knows, without weights."""
    path = tmp_path / "model.nqx"
    path.write_bytes(json.dumps(CONFIG).encode() + b"\n")
    return NequixSettings(model=path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> NequixSettings:
    """A small model with random weights, made by the package itself."""
    model = pytest.importorskip("nequix.model")
    import jax

    before = jax.config.jax_default_matmul_precision
    names = set(CONFIG) - {"atomic_numbers"}
    made = model.Nequix(
        jax.random.key(3), n_species=3, atom_energies=[-1.0, -2.0, -5.0], **{name: CONFIG[name] for name in names}
    )
    path = tmp_path_factory.mktemp("nequix") / "random.nqx"
    model.save_model(str(path), made, CONFIG)
    jax.config.update("jax_default_matmul_precision", before)
    return NequixSettings(model=path)


@pytest.fixture(scope="module")
def label(weights: NequixSettings) -> LabelSource:
    return weights.build()


def silicon() -> Atoms:
    """A distorted crystal of eight atoms in a skewed cell."""
    crystal = bulk("Si", cubic=True)
    crystal.rattle(0.1, seed=1)
    crystal.set_cell(crystal.cell.array @ (np.eye(3) + 0.02 * np.arange(9).reshape(3, 3) / 8), scale_atoms=True)
    return crystal


def test_it_is_a_kind_of_label_source(header: NequixSettings) -> None:
    assert SourceSettings.parse({"kind": "nequix", "model": str(header.model)}) == header


def test_what_would_not_reach_it_is_refused(header: NequixSettings) -> None:
    header.check(molecule("H2O"))
    header.check(silicon())
    moments = silicon()
    moments.set_initial_magnetic_moments([1.0, -1.0] * 4)
    for atoms, why in [
        (molecule("CH4"), r"model\.nqx does not know C; "),
        (Atoms("OH", [[0, 0, 0], [0, 0, 1]], info={"charge": -1}), "charge -1 and multiplicity 1, which would not"),
        (Atoms("OH", [[0, 0, 0], [0, 0, 1]], info={"spin": 2}), "charge 0 and multiplicity 2, which would not"),
        (moments, "initial magnetic moments, which would not reach Nequix; remove them"),
    ]:
        with pytest.raises(LabelError, match=why):
            header.check(atoms)


def test_ions_are_labelled_where_their_charge_is_ignored(
    header: NequixSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ion = Atoms("OH", [[0, 0, 0], [0, 0, 1]], info={"charge": -1, "spin": 2})
    ignoring = header.model_copy(update={"ignore_charge": True})
    ignoring.check(ion)
    monkeypatch.setattr(importlib.metadata, "version", {"nequix": "1.0"}.__getitem__)
    assert "ignore_charge" not in header.identity()  # labels of before are found again
    assert structure_identity(silicon(), header) != structure_identity(silicon(), ignoring)


def test_labels_belong_to_the_weights_wherever_they_lie(
    header: NequixSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", {"nequix": "1.0"}.__getitem__)
    before = structure_identity(silicon(), header)
    copy, other = tmp_path / "elsewhere.nqx", tmp_path / "other.nqx"
    copy.write_bytes(header.model.read_bytes())
    other.write_bytes(header.model.read_bytes() + b"1")
    assert structure_identity(silicon(), NequixSettings(model=copy)) == before
    assert structure_identity(silicon(), NequixSettings(model=other)) != before
    assert header.bound_to() == header.version()
    monkeypatch.setattr(importlib.metadata, "version", {"nequix": "2.0"}.__getitem__)
    assert structure_identity(silicon(), header) != before


def test_weights_that_cannot_be_used_are_one_sentence(header: NequixSettings, tmp_path: Path) -> None:
    for name, content in [("text.nqx", b"not weights\n"), ("other.nqx", b'{"cutoff": 5.0}\n'), ("list.nqx", b"[1]\n")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name} does not hold the weights.*key 'model'"):
            NequixSettings(model=tmp_path / name).check(silicon())
    with pytest.raises(InputError, match="missing.nqx cannot be read.*key 'model'"):
        NequixSettings(model=tmp_path / "missing.nqx").check(silicon())


def test_missing_nequix_is_one_sentence(header: NequixSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    for ask in (header.version, header.build):
        with pytest.raises(InputError, match=r'pip install "almlip-jax\[nequix\]"'):
            ask()


def test_rooms_hold_what_they_are_for_and_are_few() -> None:
    sizes = [(atoms, edges) for atoms in range(1, 300) for edges in (0, 7 * atoms, 46 * atoms, 150 * atoms)]
    found = {size: rooms(*size) for size in sizes}
    for (atoms, edges), (nodes, room) in found.items():
        assert nodes > atoms and room >= edges  # one node at least belongs to no atom
        assert nodes <= max(12, 2 * (atoms + 1)) and room <= max(64, 1.5 * edges)
    assert len({room for _, room in found.values()}) < 2 * math.log2(150 * 300)
    crystals = {rooms(64, 2944 + change) for change in range(-120, 121)}  # 64 silicon atoms in dynamics
    assert len(crystals) == 1


def test_a_damaged_file_is_one_sentence(weights: NequixSettings, tmp_path: Path) -> None:
    half = tmp_path / "half.nqx"
    half.write_bytes(weights.model.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"half\.nqx cannot be read by the installed nequix"):
        NequixSettings(model=half).build()


def test_forces_and_stress_are_derivatives(label: LabelSource) -> None:
    crystal, step = silicon(), 1e-2
    found = label(crystal)
    assert found.forces.shape == (8, 3) and found.stress is not None
    np.testing.assert_allclose(found.forces.sum(axis=0), 0, atol=1e-4)

    def slope(change: Callable[[Atoms, float], None]) -> float:
        energies = []
        for sign in (1, -1):
            moved = crystal.copy()
            change(moved, sign * step)
            energies.append(label(moved).energy)
        return (energies[0] - energies[1]) / (2 * step)

    for atom, axis in [(0, 0), (3, 1), (7, 2)]:
        moving = slope(lambda atoms, by: atoms.positions.__setitem__((atom, axis), atoms.positions[atom, axis] + by))  # noqa: B023
        assert found.forces[atom, axis] == pytest.approx(-moving, abs=3e-3)
    for voigt, (i, j) in {0: (0, 0), 4: (0, 2)}.items():
        strain = np.zeros((3, 3))
        strain[i, j] = strain[j, i] = 1.0 if i == j else 0.5
        straining = slope(lambda a, by: a.set_cell(a.cell.array @ (np.eye(3) + by * strain), scale_atoms=True))  # noqa: B023
        assert found.stress[voigt] == pytest.approx(straining / crystal.get_volume(), abs=1e-4)


def test_labels_are_those_of_its_own_calculator(weights: NequixSettings, label: LabelSource) -> None:
    calculator = pytest.importorskip("nequix.calculator").NequixCalculator(
        model_path=str(weights.model), backend="jax", use_kernel=False
    )
    crystal = silicon()
    crystal.calc = calculator
    found = label(crystal)
    assert found.energy == pytest.approx(crystal.get_potential_energy(), abs=1e-4)
    np.testing.assert_allclose(found.forces, crystal.get_forces(), atol=1e-4)
    np.testing.assert_allclose(found.stress, crystal.get_stress(), atol=1e-6)


def test_it_sees_the_images_in_whatever_directions_there_are(label: LabelSource) -> None:
    slab = fcc111("Si", (2, 2, 2), a=4.0, vacuum=8.0)
    slab.rattle(0.05, seed=2)
    slab.pbc = True
    whole = label(slab)
    slab.pbc = (True, True, False)
    of_slab = label(slab)
    assert of_slab.energy == pytest.approx(whole.energy, abs=1e-4) and of_slab.stress is None
    np.testing.assert_allclose(of_slab.forces, whole.forces, atol=1e-4)
    slab.pbc = False
    assert abs(label(slab).energy - whole.energy) > 0.01  # the images do count
    water = molecule("H2O")
    boxed = Atoms(water.numbers, water.positions, cell=[20, 20, 20], pbc=True)
    assert label(water).energy == pytest.approx(label(boxed).energy, abs=1e-4)
    far = water.copy()
    far.positions += 50.0
    assert label(far).energy == pytest.approx(label(water).energy, abs=1e-3)
    lone = label(Atoms("O"))
    assert np.isfinite(lone.energy) and np.all(lone.forces == 0)


def test_structures_of_all_sizes_share_a_few_programs(
    weights: NequixSettings, count_compilations: Callable[[], AbstractContextManager[list[str]]]
) -> None:
    cells = [bulk("Si", cubic=True) for _ in range(12)]
    cells += [bulk("Si", cubic=True) * (2, 1, 1) for _ in range(6)]
    for seed, cell in enumerate(cells):
        cell.rattle(0.15, seed=seed)
        cell.set_cell(cell.cell.array * (1 + 0.003 * (seed % 5)), scale_atoms=True)
    cells += [molecule(name) for name in ("H2", "OH", "H2O", "H2O2")]
    cells[-3].set_initial_magnetic_moments(None)
    label = weights.build()
    from matscipy.neighbours import neighbour_list

    edges = {len(neighbour_list("i", cell, cutoff=4.0)) for cell in cells[:18]}
    assert len(edges) > 8  # each of these would be a program of its own
    with count_compilations() as compiled:
        labels = [obtain_label(label, weights, cell, "id") for cell in cells]
    assert [one.error for one in labels] == [None] * len(cells)
    assert len(compiled) <= 6
    with count_compilations() as compiled:
        again = [obtain_label(label, weights, cell, "id") for cell in reversed(cells)]
    assert not compiled
    for one, two in zip(labels, reversed(again), strict=True):  # nothing is remembered, whatever came before
        assert one.energy == two.energy
        np.testing.assert_array_equal(one.forces, two.forces)
