"""What is particular to the MACE-type model: its messages, its orders of summation, all of its shapes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from scipy.spatial.transform import Rotation

from almlip_jax.ensembles import Ensemble, Prediction
from almlip_jax.models import AtomicOutput, MaceSettings, build_model
from almlip_jax.models import mace as module
from almlip_jax.models.constants import with_constants
from almlip_jax.models.convolution import edge_functions, paths_between
from almlip_jax.models.mace import edge_basis, messages_of_sums
from almlip_jax.structures.graph import Graph
from almlip_jax.structures.packing import BatchShape, pack, plan_batches, take_batch
from almlip_jax.structures.species import SpeciesTable

CUTOFF = 3.0
SPECIES = SpeciesTable((1, 8))
TINY = MaceSettings(cutoff=CUTOFF, radial=2, channels=2, l_max=1, hidden_l_max=1, read_out=(3,))
# every degree, correlation order and number of layers, and every option, occurs once
SHAPES = {
    "two_body": {"correlation": 1, "layers": 1, "l_max": 0, "hidden_l_max": 0},
    "scalars": {"correlation": 2, "layers": 2, "l_max": 3, "hidden_l_max": 0},
    "tensors": {"correlation": 2, "layers": 2, "l_max": 2, "hidden_l_max": 2, "radial_basis": "gaussian"},
    "beyond_the_edges": {"correlation": 3, "layers": 2, "l_max": 1, "hidden_l_max": 2},
    "deep": {"correlation": 1, "layers": 3, "radial_hidden": (3,)},
    "five_body": {"correlation": 4, "layers": 1, "species_channels": 1},
}


@pytest.fixture(scope="module", autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def changed(**settings) -> MaceSettings:
    return TINY.model_copy(update=settings)


def peroxide(turn: np.ndarray | None = None) -> Atoms:
    atoms = molecule("H2O2")
    atoms.rattle(0.1, seed=1)
    if turn is not None:
        atoms.positions = atoms.positions @ turn.T
    return atoms


def graph_of(atoms: Atoms) -> Graph:
    packed = pack([atoms], SPECIES, CUTOFF, neighbors=4, dtype=np.float64)
    plan, _ = plan_batches(packed, np.arange(1), BatchShape(5, 4, 2))
    return take_batch(packed.data, plan, 0)[0]


def prepared(settings: MaceSettings) -> tuple[Ensemble, dict]:
    ensemble = Ensemble(build_model(settings, SPECIES), 1)
    fresh = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.jit(ensemble.init)(jax.random.key(0)))
    return ensemble, jax.jit(ensemble.standardise)(fresh, jax.jit(ensemble.survey)(graph_of(peroxide())), 1.0)


QUICK = ("beyond_the_edges", "five_body")


@pytest.mark.parametrize(
    "shape",
    [pytest.param(shape, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, shape in SHAPES.items()],
)
def test_every_shape_turns_with_the_molecule_and_has_its_gradient(shape):
    ensemble, params = prepared(changed(**shape))
    run = jax.jit(ensemble.predict)
    turn = -Rotation.random(random_state=5).as_matrix()
    a, b = (run(params, graph_of(atoms)) for atoms in (peroxide(), peroxide(turn)))
    np.testing.assert_allclose(b.energy, a.energy, rtol=1e-11)
    np.testing.assert_allclose(b.forces[:, :4], a.forces[:, :4] @ turn.T, atol=1e-11)
    np.testing.assert_allclose(b.features[:, :4], a.features[:, :4], atol=1e-11)
    assert np.max(np.abs(a.forces)) > 1e-4 and np.all(np.isfinite(a.forces)) and np.all(a.forces[:, 4:] == 0)
    energies = []
    for step in (1e-4, -1e-4):
        moved = peroxide()
        moved.positions[1, 2] += step
        energies.append(run(params, graph_of(moved)).energy[0, 0])
    np.testing.assert_allclose(a.forces[0, 1, 2], -(energies[0] - energies[1]) / 2e-4, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("ratio", [4.0, 0.25])
@pytest.mark.parametrize("hidden", [(), (3,)], ids=["linear", "hidden"])
def test_new_species_enter_in_the_size_that_they_have_in_a_fresh_model(ratio: float, hidden: tuple[int, ...]):
    """Densities do, and products of messages are no larger, whatever the scale of what was known before."""
    few, many = SpeciesTable((29,)), SpeciesTable((7, 29))
    models = [build_model(changed(radial_hidden=hidden), table) for table in (few, many)]
    shapes = [jax.eval_shape(model.init, jax.random.key(0)) for model in models]
    old, fresh = (jax.tree.map(lambda x: jnp.full(x.shape, 0.5), shape) for shape in shapes)
    scale = jnp.array([0.1, 0.3])
    old, fresh = with_constants(old, message_scale=scale), with_constants(fresh, message_scale=ratio * scale)
    grown = models[0].with_species(old, fresh, many)
    names = {name for name in grown if name.startswith("weights_")}
    assert names == {"weights_0_2", "weights_0_3", "weights_1_2", "weights_1_3"}
    for name in names:
        scaled = hidden or name.startswith("weights_1")
        power = (2 if name.endswith("2") else 1) * bool(scaled)
        np.testing.assert_allclose(grown[name][0], 0.5 * min(ratio, 1.0) ** power, err_msg=name)
        np.testing.assert_array_equal(grown[name][1], 0.5)  # of what was known
    if not hidden:  # rows of neighbours of each species
        for degree in range(2):
            new, known = np.split(np.asarray(grown[f"first_{degree}"]), 2)
            np.testing.assert_allclose(scale[degree] * new, 0.5 * ratio * scale[degree])
            np.testing.assert_array_equal(known, 0.5)


@pytest.mark.slow
def test_sums_first_or_edges_first_is_the_same(monkeypatch):
    """Energies, forces, and the gradient of a loss of forces with respect to every parameter."""
    graph, found = graph_of(peroxide()), []

    def loss(params, ensemble: Ensemble) -> tuple[jax.Array, Prediction]:
        prediction = ensemble.predict(params, graph)
        return jnp.sum(prediction.forces**2) + jnp.sum(prediction.energy**2), prediction

    for slots in (0, 100):
        monkeypatch.setattr(module, "_MANY_SLOTS", slots)
        ensemble, params = prepared(changed(correlation=2))
        assert (ensemble.model.geometry(graph).basis is None) == (slots == 100)
        # a new function each time, as what was compiled for the other order must not serve here
        found.append(jax.jit(jax.grad(lambda p, e=ensemble: loss(p, e), has_aux=True))(params))
    flat = [jax.tree.leaves(one) for one in found]
    for one, other in zip(*flat, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


def test_messages_of_sums_are_sums_of_tensor_products():
    """Edge by edge, with the tensor products of e3nn."""
    graph, channels, count, rng = graph_of(peroxide()), 2, 2, np.random.default_rng(0)
    shape = {"cutoff": CUTOFF, "cutoff_power": 4, "basis": "bessel", "count": count}
    edges = jax.device_get(jax.jit(partial(edge_functions, paths=paths_between(2, 0, 2), **shape))(graph))
    basis = edge_basis(np.concatenate(edges.coupled, axis=1), edges.radial.swapaxes(1, 2))
    features = tuple(rng.normal(size=(2 * degree + 1, 5, channels)) for degree in range(3))
    paths = paths_between(2, 2, 2)
    weights = rng.normal(size=(len(paths), count, channels))
    found = jax.jit(messages_of_sums)(features, weights, basis, graph)
    wanted = [np.zeros(block.shape) for block in found]
    parity, graph = ("e", "o", "e"), jax.device_get(graph)

    @partial(jax.jit, static_argnums=0)
    def message(path, vector, values):
        harmonics = e3nn.spherical_harmonics(path.edge, e3nn.IrrepsArray("1o", vector), True, "component")
        own = e3nn.IrrepsArray(f"{path.neighbor}{parity[path.neighbor]}", values)
        return e3nn.tensor_product(harmonics, own, filter_ir_out=[f"{path.out}{parity[path.out]}"]).array

    for i, k in np.argwhere(graph.edge_mask):
        j, vector = int(graph.neighbors[i, k]), graph.vectors[i, k]
        of_edge = np.einsum("b,pbc->pc", edges.radial[i, k], weights)
        for n, path in enumerate(paths):
            for c in range(channels):
                out = message(path, vector, features[path.neighbor][:, j, c])
                wanted[n][:, i, c] += of_edge[n, c] * np.asarray(out)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-11)


def test_correlation_is_the_number_of_neighbors_a_function_involves():
    """With one layer, the energy of n neighbours is a sum over pairs of them exactly if the correlation order is 2."""
    directions = np.array([[0.9, 0, 0], [0, 1.0, 0.2], [-0.3, 0.4, -0.9]])

    def energy(ensemble: Ensemble, params, chosen: list[int]) -> float:
        atoms = Atoms("O" + "H" * len(chosen), [[0.0, 0, 0], *directions[chosen]])
        graph = graph_of(atoms)
        geometry = ensemble.model.geometry(graph)
        # linear in the features of the central atom: the read-out is another matter
        single = jax.tree.map(lambda x: x[0], params)
        flat = single | {"read_out_0": {"kernel": 1e-6 * jnp.ones((2, 3)), "bias": jnp.zeros(3)}}
        return float(ensemble.model.apply(flat, geometry, graph).features[0, 0])

    for order, exact in [(2, True), (3, False)]:
        ensemble, params = prepared(changed(correlation=order, layers=1))
        values = {
            chosen: energy(ensemble, params, list(chosen))
            for chosen in [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
        }
        pairs = sum(values[c] for c in values if len(c) == 2) - sum(values[c] for c in values if len(c) == 1)
        difference = abs(values[0, 1, 2] - pairs - values[()]) / max(abs(v) for v in values.values())
        assert (difference < 1e-5) == exact


def test_isolated_atom_and_all_elements():
    table = SpeciesTable(tuple(range(1, 104)))
    model = build_model(changed(species_channels=4, correlation=2), table)
    params = jax.jit(model.init)(jax.random.key(0))
    lone = replace(graph_of(Atoms("O", [[0.0, 0, 0]])), species=jnp.full(5, 102))

    def evaluate(vectors: jax.Array) -> tuple[jax.Array, AtomicOutput]:
        output = model.apply(params, model.geometry(replace(lone, vectors=vectors)), lone)
        return jnp.sum(output.energy), output

    gradient, output = jax.jit(jax.grad(evaluate, has_aux=True))(lone.vectors)
    assert np.all(np.isfinite(output.energy)) and np.all(np.isfinite(output.features))
    assert np.all(np.asarray(gradient) == 0)


def test_equal_settings_make_equal_models():
    assert build_model(TINY, SPECIES) == build_model(MaceSettings.model_validate(TINY.model_dump()), SPECIES)
