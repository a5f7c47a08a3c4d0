"""Heads: member forces as derivatives, what variances mean, and the law by which they add up."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from scipy.spatial.transform import Rotation

from almlip_jax.ensembles import Ensemble, EvidentialBelief, Heads, Noise, Prediction, committee_statistics
from almlip_jax.ensembles.likelihoods import Evidential, MeanVariance
from almlip_jax.models import Params, SharedDensitySettings, build_model
from almlip_jax.structures.graph import Graph
from almlip_jax.structures.packing import BatchShape, pack, plan_batches, take_batch
from almlip_jax.structures.species import SpeciesTable

SETTINGS = SharedDensitySettings(cutoff=3.5, radial=4, l_max=1, channels=4, hidden=(8,))
SPECIES = SpeciesTable((1, 8))
SHAPE = BatchShape(atoms=8, neighbors=6, structures=3)
KINDS = {
    "shallow": Heads(3),
    "mean_variance": Heads(1, MeanVariance()),
    "evidential": Heads(1, Evidential()),
    "shallow_noisy": Heads(3, MeanVariance()),
}


@pytest.fixture(scope="module", autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def ensemble(request) -> Ensemble:
    return Ensemble(build_model(SETTINGS, SPECIES), 2, heads=request.param)


@pytest.fixture(scope="module")
def params(ensemble):
    return jax.device_get(standardised(ensemble, 1.3))


# of equal ensembles compiled once; a survey is that of the model, whatever heads there are
_init = jax.jit(lambda ensemble, key: ensemble.init(key), static_argnums=0)
_survey = jax.jit(lambda model, graph: Ensemble(model, 1).survey(graph), static_argnums=0)
_standardise = jax.jit(lambda ensemble, *given: ensemble.standardise(*given), static_argnums=0)


def standardised(ensemble: Ensemble, scale: float) -> Params:
    """Fresh parameters for water and a scale of energies."""
    fresh = jax.tree.map(lambda x: np.asarray(x, np.float64), _init(ensemble, jax.random.key(1)))
    return _standardise(ensemble, fresh, _survey(ensemble.model, graph_of([water(0)])), scale)


def water(seed: int) -> Atoms:
    atoms = molecule("H2O")
    atoms.rattle(0.1, seed=seed)
    return atoms


def graph_of(structures: list[Atoms], species: SpeciesTable = SPECIES) -> Graph:
    packed = pack(structures, species, SETTINGS.cutoff, neighbors=SHAPE.neighbors, dtype=np.float64)
    return take_batch(packed.data, plan_batches(packed, np.arange(len(structures)), SHAPE)[0], 0)[0]


_predict_on_device = jax.jit(lambda ensemble, params, graph: ensemble.predict(params, graph), static_argnums=0)
_energies_on_device = jax.jit(lambda ensemble, params, graph: ensemble.energies(params, graph), static_argnums=0)


# on the host, where taking a part of an array compiles nothing
def _predict(ensemble: Ensemble, params: Params, graph: Graph) -> Prediction:
    return jax.device_get(_predict_on_device(ensemble, params, graph))


def _energies(ensemble: Ensemble, params: Params, graph: Graph) -> np.ndarray:
    return jax.device_get(_energies_on_device(ensemble, params, graph))


def test_each_member_is_the_gradient_of_its_own_energy(ensemble, params):
    found, h = _predict(ensemble, params, graph_of([water(0)])), 1e-4
    assert found.energy.shape == (ensemble.members, 3) and found.features.shape[0] == ensemble.size
    np.testing.assert_allclose(found.energy, _energies(ensemble, params, graph_of([water(0)])), rtol=1e-12)
    for atom, axis in [(0, 2), (2, 1)]:
        energies = []
        for step in (1, -1, 2, -2):
            moved = water(0)
            moved.positions[atom, axis] += step * h
            energies.append(_energies(ensemble, params, graph_of([moved]))[:, 0])
        slope = (8 * (energies[0] - energies[1]) - (energies[2] - energies[3])) / (12 * h)
        np.testing.assert_allclose(found.forces[:, atom, axis], -slope, rtol=1e-6, atol=1e-8)
    assert np.min(np.std(found.forces[:, :3], axis=0)) > 0


def test_a_head_is_the_model_with_another_last_layer(ensemble, params):
    """The same energies from a plain ensemble whose last layer holds the sum of both."""
    if ensemble.heads.count == 1:
        pytest.skip("one head")
    graph = graph_of([water(0), water(1)])
    found = _predict(ensemble, params, graph)
    plain = Ensemble(ensemble.model, ensemble.size)
    for head in range(ensemble.heads.count):
        model = dict(params["model"])
        model["last"] = model["last"] + params["heads"]["last"][:, head]
        alone = _predict(plain, model, graph)
        np.testing.assert_allclose(found.energy[head :: ensemble.heads.count], alone.energy, rtol=1e-11)
        np.testing.assert_allclose(found.forces[head :: ensemble.heads.count], alone.forces, atol=1e-11)
        np.testing.assert_allclose(found.virial[head :: ensemble.heads.count], alone.virial, atol=1e-11)


def test_variances_add_over_atoms_and_do_not_turn(ensemble, params):
    if ensemble.heads.likelihood.silent:
        pytest.skip("members that say nothing")
    one = _predict(ensemble, params, graph_of([water(0)])).noise
    two, turned = water(0) + water(0), water(0)
    two.positions[3:] += [0, 0, 40.0]
    turned.positions = turned.positions @ Rotation.random(random_state=1).as_matrix().T
    pair, after = (_predict(ensemble, params, graph_of([atoms])).noise for atoms in (two, turned))
    np.testing.assert_allclose(pair.energy.variance[:, 0], 2 * one.energy.variance[:, 0], rtol=1e-11)
    np.testing.assert_allclose(pair.energy.epistemic[:, 0], 2 * one.energy.epistemic[:, 0], rtol=1e-11)
    np.testing.assert_allclose(pair.forces.variance[:, 3:6], one.forces.variance[:, :3], rtol=1e-11)
    np.testing.assert_allclose(after.forces.variance[:, :3], one.forces.variance[:, :3], rtol=1e-9)
    assert np.all(one.forces.variance > 0) and np.all(np.isfinite(jax.tree.leaves(one)[0]))


def test_evidential_parameters_are_those_of_a_distribution():
    ensemble = Ensemble(build_model(SETTINGS, SPECIES), 2, heads=KINDS["evidential"])
    params = standardised(ensemble, 1.0)
    params["heads"]["noise"] *= 1e3  # far away: as extreme as they come
    noise = _predict(ensemble, params, graph_of([water(0), water(1)])).noise
    for belief in (noise.energy, noise.forces, noise.virial):
        assert np.all(belief.shape > 1) and np.all(belief.evidence > 0)
        beta = belief.variance * (belief.shape - 1)
        np.testing.assert_allclose(belief.epistemic, beta / (belief.evidence * (belief.shape - 1)), rtol=1e-12)


def test_committee_adds_variances_up():
    """Total variance: that of the members, plus the mean of what each says of its prediction, plus the mean noise."""
    rng, graph = np.random.default_rng(0), graph_of([water(0), water(1)])
    atoms, slots = len(graph.species), graph.num_structures
    belief = [
        EvidentialBelief(*(jnp.asarray(rng.uniform(0.5, 2.0, size=(2, n))) for _ in range(3)))
        for n in (slots, atoms, slots)
    ]
    prediction = Prediction(
        energy=jnp.asarray(rng.normal(size=(4, slots))),
        forces=jnp.asarray(rng.normal(size=(4, atoms, 3))),
        virial=jnp.zeros((4, slots, 3, 3)),
        features=jnp.zeros((2, atoms, 1)),
        noise=Noise(*belief),
    )
    found = committee_statistics(prediction, graph)
    energy = np.var(prediction.energy, axis=0) + np.mean(belief[0].variance / belief[0].evidence, axis=0)
    np.testing.assert_allclose(found.scores["energy_epistemic"], np.sqrt(energy), rtol=1e-12)
    np.testing.assert_allclose(
        found.scores["energy_total"], np.sqrt(energy + np.mean(belief[0].variance, axis=0)), rtol=1e-12
    )
    forces = np.sum(np.var(prediction.forces, axis=0), axis=-1)
    forces = forces + 3 * np.mean(belief[1].variance / belief[1].evidence, axis=0)
    total = np.sqrt(forces + 3 * np.mean(belief[1].variance, axis=0))[:6]
    np.testing.assert_allclose(found.atom_scores["force_epistemic"][:6], np.sqrt(forces[:6]), rtol=1e-12)
    np.testing.assert_allclose(found.atom_scores["force_total"][:6], total, rtol=1e-12)
    np.testing.assert_allclose(found.scores["force_total_max"][:2], [total[:3].max(), total[3:].max()], rtol=1e-12)
    np.testing.assert_allclose(found.scores["force_total_mean"][:2], [total[:3].mean(), total[3:].mean()], rtol=1e-12)
    silent = committee_statistics(replace(prediction, noise=None), graph)
    np.testing.assert_array_equal(silent.atom_scores["force_total"], silent.atom_scores["force_std"])
    np.testing.assert_array_equal(silent.scores["energy_epistemic"], silent.scores["energy_std"])
    np.testing.assert_array_equal(silent.scores["force_epistemic_max"], silent.scores["force_std_max"])


def test_more_species_change_nothing_for_the_old_ones(ensemble, params):
    table = SpeciesTable((1, 6, 8))
    larger = Ensemble(build_model(SETTINGS, table), 2, heads=ensemble.heads)
    fresh = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.jit(larger.init)(jax.random.key(9)))
    grown = ensemble.with_species(params, fresh, table)
    before = _predict(ensemble, params, graph_of([water(0)]))
    after = _predict(larger, grown, graph_of([water(0)], table))
    np.testing.assert_allclose(after.forces, before.forces, atol=1e-12)
    for a, b in zip(jax.tree.leaves(after.noise), jax.tree.leaves(before.noise), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11)
