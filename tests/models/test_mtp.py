"""Moment tensor potentials: the formulas written out, files, derivatives, and the scales that they are trained in."""

from __future__ import annotations

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from jax.test_util import check_grads

from almlip_jax.models import MtpSettings, build_model
from almlip_jax.models.constants import learned_leaves
from almlip_jax.models.mtp.basis import basis
from almlip_jax.models.mtp.tables import Table, bilinear_rows, chosen_rows, quadratic_rows
from almlip_jax.structures.graph import Graph
from almlip_jax.structures.neighbors import largest_neighbor_count
from almlip_jax.structures.packing import BatchShape, pack, plan_batches, take_batch
from almlip_jax.structures.species import SpeciesTable

CUTOFF = 3.0
SPECIES = SpeciesTable((1, 6, 8))


@pytest.fixture(scope="module", autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def graph_of(atoms: Atoms, species: SpeciesTable, cutoff: float) -> Graph:
    neighbors = largest_neighbor_count([atoms], cutoff)
    packed = pack([atoms], species, cutoff, neighbors=neighbors, dtype=np.float64)
    return take_batch(packed.data, plan_batches(packed, np.arange(1), BatchShape(len(atoms), neighbors, 1))[0], 0)[0]


def written_out(level: int, settings: MtpSettings, radial: np.ndarray, atoms: Atoms, table: SpeciesTable) -> np.ndarray:
    """The basis functions [N, S] by the formulas, a pair after the other; the radial coefficients hold the scaling."""
    found, low, high = basis(level), settings.min_dist, settings.cutoff
    kinds, functions = table.index(atoms.numbers), []
    images = list(product(range(-2, 3), repeat=3)) if atoms.pbc.any() else [(0, 0, 0)]
    for i in range(len(atoms)):
        m = np.zeros(found.size)
        for j, image in product(range(len(atoms)), images):
            r = atoms.positions[j] + np.array(image) @ atoms.cell.array - atoms.positions[i]
            d = np.linalg.norm(r)
            if not 0 < d < high:
                continue
            s = (2 * d - (low + high)) / (high - low)
            f = (high - d) ** 2 * np.polynomial.chebyshev.chebval(s, radial[kinds[i], kinds[j]].T)
            for n, (mu, *along) in enumerate(found.moments):
                m[n] += f[mu] * np.prod((r / d) ** np.array(along))
        for a, b, factor, c in found.products:
            m[c] += factor * m[a] * m[b]
        functions.append(m[list(found.scalars)])
    return np.array(functions)


def crystal() -> Atoms:
    atoms = bulk("CO", "zincblende", a=3.7)
    atoms.rattle(0.1, seed=1)
    atoms.set_cell(atoms.cell.array + 0.1 * np.arange(9).reshape(3, 3) / 9, scale_atoms=True)
    return atoms


@pytest.mark.parametrize(("level", "make"), [(6, crystal), (14, lambda: molecule("CH3OH"))])
def test_energies_are_those_of_the_formulas(level, make):
    """Several species, the atoms' own images, and distances below the shortest one that the interval begins with."""
    settings, atoms = MtpSettings(level=level, radial_basis_size=5, cutoff=CUTOFF, min_dist=1.2), make()
    model, graph = build_model(settings, SPECIES), graph_of(atoms, SPECIES, CUTOFF)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.jit(model.init)(jax.random.key(1)))
    params["species"] = np.array([0.5, -1.5, 2.5])
    scaled = jax.jit(lambda p: model.standardise(p, model.survey(graph), 3.0))(params)
    found = jax.jit(lambda p: model.apply(p, model.geometry(graph), graph))(scaled)
    exact = jax.device_get(jax.jit(model.coefficients)(scaled))
    functions = written_out(level, settings, exact.scaling * np.asarray(exact.radial), atoms, SPECIES)
    wanted = functions @ exact.moment + np.asarray(exact.species)[SPECIES.index(atoms.numbers)]
    np.testing.assert_allclose(found.energy, wanted, rtol=1e-10)
    rows = np.asarray(jax.jit(lambda p: model.linear(p, model.geometry(graph), graph))(scaled))
    assert rows.shape == (len(atoms), len(basis(level).scalars) + 3)
    np.testing.assert_allclose(rows @ np.concatenate([scaled["moment"], scaled["species"]]), wanted, rtol=1e-10)


@pytest.mark.parametrize(("level", "functions", "scalars"), [(2, 1, 1), (6, 2, 5), (8, 2, 9), (14, 4, 52), (16, 4, 92)])
def test_as_many_parameters_as_the_formula_says(level, functions, scalars):
    model = build_model(MtpSettings(level=level, radial_basis_size=7), SPECIES)
    params = jax.eval_shape(model.init, jax.random.key(0))
    assert sum(leaf.size for leaf in learned_leaves(params)) == 3**2 * 7 * functions + scalars + 3


def test_forces_of_forces_are_derivatives():
    """What training and biases by uncertainty need: derivatives of forces by coefficients and by places."""
    settings = MtpSettings(level=8, radial_basis_size=4, cutoff=CUTOFF, min_dist=0.8)
    model, atoms = build_model(settings, SPECIES), molecule("CH3OH")
    graph = graph_of(atoms, SPECIES, CUTOFF)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.jit(model.init)(jax.random.key(2)))
    weights = np.random.default_rng(0).normal(size=graph.vectors.shape)

    def along(radial: jax.Array, vectors: jax.Array) -> jax.Array:
        def energy(vectors: jax.Array) -> jax.Array:
            moved = graph.replace(vectors=vectors)
            return jnp.sum(model.apply(params | {"radial": radial}, model.geometry(moved), moved).energy)

        return jnp.sum(weights * jax.grad(energy)(vectors))

    check_grads(jax.jit(along), (params["radial"], graph.vectors), order=1, modes=["rev"], rtol=1e-5)


def test_tables_of_rows_are_bilinear_maps():
    """With rows of no term, of few and of many, which are summed in pieces; derivatives of any order are such maps."""
    rng = np.random.default_rng(0)
    share = np.array([0, 0.05, 1, 0.3, 0.02, 1])[:, None, None]
    dense = rng.normal(size=(6, 9, 9)) * (rng.random((6, 9, 9)) < share)
    terms = tuple(tuple((i, j, float(row[i, j])) for i, j in np.argwhere(row).tolist()) for row in dense)
    assert {len(row) for row in terms} >= {0, 81}
    x, y, along = rng.normal(size=(3, 9, 2))
    table, rows = Table(terms, 9, 9), (2, -1, 0)

    def by_rows(x: jax.Array, y: jax.Array) -> jax.Array:
        found = bilinear_rows(table, x, y) + quadratic_rows(table, x)
        return jnp.sum(found**2) + jnp.sum(chosen_rows(rows, 9, x) ** 2)

    def by_sums(x: jax.Array, y: jax.Array) -> jax.Array:
        found = jnp.einsum("kij,ia,ja->ka", dense, x, y) + jnp.einsum("kij,ia,ja->ka", dense, x, x)
        return jnp.sum(found**2) + jnp.sum(x[2] ** 2 + x[0] ** 2)

    def derivatives(function):
        def slope(x, y):
            value, gradient = jax.value_and_grad(function, argnums=(0, 1))(x, y)
            return sum(jnp.sum(one * along) for one in gradient), (value, gradient)

        return jax.jit(jax.grad(slope, argnums=(0, 1), has_aux=True))(x, y)

    found, wanted = (jax.tree.leaves(derivatives(function)) for function in (by_rows, by_sums))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-10)


def test_basis_functions_that_training_meets_are_of_order_one():
    """Whatever distances are."""
    atoms = bulk("C", "diamond", a=7.2, cubic=True)
    atoms.rattle(0.1, seed=0)
    model = build_model(MtpSettings(level=8, cutoff=8.0, min_dist=2.6), SPECIES)
    graph = graph_of(atoms, SPECIES, 8.0)

    @jax.jit
    def features(key: jax.Array) -> jax.Array:
        params = model.standardise(model.init(key), model.survey(graph), 0.2)
        return model.apply(params, model.geometry(graph), graph).features

    for seed in range(3):
        sizes = np.sqrt(np.mean(np.asarray(features(jax.random.key(seed))[:, :9]) ** 2, axis=0))
        assert 0.05 < np.median(sizes) < 3 and np.all(sizes < 60)


def test_settings_that_mean_nothing_are_refused():
    for wrong in ({"level": 7}, {"level": 30}, {"min_dist": 5.0}, {"scaling": 0.0}, {"radial_basis_size": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            MtpSettings(**wrong)
