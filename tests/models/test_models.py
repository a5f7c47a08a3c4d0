"""Physics of every model: symmetries, forces and virial as derivatives, smoothness, extensivity."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.geometry import wrap_positions
from scipy.spatial.transform import Rotation

from almlip_jax.ensembles import Ensemble, Prediction
from almlip_jax.errors import InputError
from almlip_jax.features import last_layer_gradient
from almlip_jax.models import (
    Anchored,
    MaceSettings,
    Model,
    MtpSettings,
    NequipSettings,
    Params,
    SharedDensitySettings,
    build_model,
)
from almlip_jax.models.around import Around
from almlip_jax.models.charge_energy import charge_energy_of, with_charge_energy
from almlip_jax.models.constants import as_variables
from almlip_jax.models.electronic import scaled_states, state_features, survey_states
from almlip_jax.models.radial import polynomial_cutoff
from almlip_jax.models.species_code import exact_code
from almlip_jax.structures.graph import Graph
from almlip_jax.structures.neighbors import largest_neighbor_count
from almlip_jax.structures.packing import BatchShape, pack, plan_batches, take_batch
from almlip_jax.structures.species import SpeciesTable

SETTINGS = SharedDensitySettings(cutoff=3.5, radial=4, l_max=2, channels=4, hidden=(8, 8))
# every option at once: message passing, a second product, charge and spin, and more species than are told apart one by
# one
EVERYTHING = SETTINGS.model_copy(
    update={
        "layers": 1,
        "products": 2,
        "message_channels": 2,
        "species_channels": 2,
        "coupled_l_max": 1,
        "coupled_channels": 3,
        "electronic_state": True,
    }
)
MACE = MaceSettings(cutoff=3.5, radial=4, channels=3, l_max=2, read_out=(8,), repulsion=True, electronic_state=True)
NEQUIP = NequipSettings(
    cutoff=3.5,
    radial=4,
    channels=3,
    layers=2,
    read_out=(8,),
    radial_hidden=(4,),
    radial_basis="gaussian",
    electronic_state=True,
)
MTP = MtpSettings(cutoff=3.5, level=8, radial_basis_size=4, min_dist=0.8)
MODELS = {"plain": SETTINGS, "everything": EVERYTHING, "mace": MACE, "nequip": NEQUIP, "mtp": MTP}
LAST = {"mtp": ("moment", "species")}  # parameters of the last layer, elsewhere ``last``
SPECIES = SpeciesTable((1, 6, 8))
SHAPE = BatchShape(atoms=32, neighbors=72, structures=4)  # one for nearly all tests, so that little is compiled


@pytest.fixture(scope="module", autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def ensemble(request) -> Ensemble:
    return Ensemble(build_model(request.param, SPECIES), 2)


@pytest.fixture(scope="module")
def params(ensemble: Ensemble):
    fresh = in_float64(jax.jit(ensemble.init)(jax.random.key(1)))
    survey = jax.jit(ensemble.survey)(packed_graph([ethanol(), crystal()]))
    return jax.device_get(jax.jit(ensemble.standardise)(fresh, survey, 1.0))


@pytest.fixture(scope="module")
def anchored() -> tuple[Model, Params]:
    """A model with every option, and fresh parameters of it."""
    model = build_model(EVERYTHING, SPECIES, isolated=(6, 8))
    return model, jax.device_get(jax.jit(model.init)(jax.random.key(0)))


def in_float64(params: Params) -> Params:
    """On the host, where this compiles nothing."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def ethanol(charge: int = 1, spin: int = 2) -> Atoms:
    """A radical cation, to those models that see it."""
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.1, seed=1)
    atoms.info = {"charge": charge, "spin": spin}
    return atoms


def crystal() -> Atoms:
    """Triclinic, and smaller than the cutoff: edges to an atom's own images."""
    atoms = bulk("C", "diamond", a=3.6)
    atoms.rattle(0.05, seed=2)
    atoms.set_cell(atoms.cell.array + 0.1 * np.arange(9).reshape(3, 3) / 9, scale_atoms=True)
    return atoms


def test_surveys_add_up(ensemble):
    """Constants set from batches are those of one graph with all structures."""
    survey = jax.jit(ensemble.survey)
    both = survey(packed_graph([ethanol(), crystal()]))
    parts = [survey(packed_graph([atoms])) for atoms in (ethanol(), crystal())]
    for whole, *pieces in zip(*map(jax.tree.leaves, (both, *parts)), strict=True):
        np.testing.assert_allclose(whole, sum(pieces), rtol=1e-5)


# one compiled function for all tests, told apart by shapes
_predict_on_device = jax.jit(lambda ensemble, params, graph: ensemble.predict(params, graph), static_argnums=0)


def _predict(ensemble: Ensemble, params: Params, graph: Graph) -> Prediction:
    """On the host, where taking a part of an array compiles nothing."""
    return jax.device_get(_predict_on_device(ensemble, params, graph))


def derivative(energies: list[np.ndarray], h: float) -> np.ndarray:
    """Fourth-order central difference from values at +h, -h, +2h, -2h."""
    return (8 * (energies[0] - energies[1]) - (energies[2] - energies[3])) / (12 * h)


def packed_graph(structures: list[Atoms], shape: BatchShape = SHAPE, species: SpeciesTable = SPECIES) -> Graph:
    packed = pack(structures, species, SETTINGS.cutoff, neighbors=shape.neighbors, dtype=np.float64)
    plan, steps = plan_batches(packed, np.arange(len(structures)), shape)
    assert steps == 1
    return take_batch(packed.data, plan, 0)[0]


def predict(ensemble: Ensemble, params, structures: list[Atoms], shape: BatchShape = SHAPE) -> Prediction:
    """Without padding."""
    padded = _predict(ensemble, params, packed_graph(structures, shape))
    atoms, number = sum(len(a) for a in structures), len(structures)
    return Prediction(
        energy=padded.energy[:, :number],
        forces=padded.forces[:, :atoms],
        virial=padded.virial[:, :number],
        features=padded.features[:, :atoms],
    )


@pytest.mark.parametrize("make", [ethanol, crystal])
@pytest.mark.parametrize("mirror", [1.0, -1.0])
def test_rotation_and_reflection(ensemble, params, make, mirror):
    atoms = make()
    turn = mirror * Rotation.random(random_state=3).as_matrix()
    turned = atoms.copy()
    turned.set_cell(atoms.cell.array @ turn.T)
    turned.positions = atoms.positions @ turn.T
    a, b = predict(ensemble, params, [atoms]), predict(ensemble, params, [turned])
    np.testing.assert_allclose(b.energy, a.energy, rtol=1e-11)
    np.testing.assert_allclose(b.forces, a.forces @ turn.T, atol=1e-10)
    np.testing.assert_allclose(b.virial, turn @ a.virial @ turn.T, atol=1e-9)
    np.testing.assert_allclose(b.features, a.features, atol=1e-10)


def test_permutation_translation_and_wrapping(ensemble, params):
    order = np.random.default_rng(0).permutation(9)
    atoms = ethanol()
    moved = atoms[order]
    moved.positions += [1.3, -0.2, 5.0]
    a, b = predict(ensemble, params, [atoms]), predict(ensemble, params, [moved])
    np.testing.assert_allclose(b.energy, a.energy, rtol=1e-12)
    np.testing.assert_allclose(b.forces, a.forces[:, order], atol=1e-11)
    solid = crystal()
    wrapped = solid.copy()
    wrapped.positions = wrap_positions(solid.positions + [7.0, 3.0, -2.0], solid.cell)
    c, d = predict(ensemble, params, [solid]), predict(ensemble, params, [wrapped])
    np.testing.assert_allclose(d.energy, c.energy, rtol=1e-12)
    np.testing.assert_allclose(d.virial, c.virial, atol=1e-10)


@pytest.mark.parametrize("make", [ethanol, crystal])
def test_forces_are_minus_the_gradient(ensemble, params, make):
    atoms, h = make(), 1e-4
    forces = predict(ensemble, params, [atoms]).forces
    for atom, axis in [(0, 0), (1, 2), (len(atoms) - 1, 1)]:
        energies = []
        for steps in (1, -1, 2, -2):
            moved = atoms.copy()
            moved.positions[atom, axis] += steps * h
            energies.append(predict(ensemble, params, [moved]).energy[:, 0])
        np.testing.assert_allclose(forces[:, atom, axis], -derivative(energies, h), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(np.sum(forces, axis=1), 0, atol=1e-10)


def test_virial_is_minus_the_strain_derivative(ensemble, params):
    atoms, h = crystal(), 1e-4
    virial = predict(ensemble, params, [atoms]).virial
    for i, j in [(0, 0), (1, 2), (0, 1)]:
        energies = []
        for steps in (1, -1, 2, -2):
            strain = np.eye(3)
            strain[i, j] += steps * h / 2
            strain[j, i] += steps * h / 2
            strained = atoms.copy()
            strained.set_cell(atoms.cell.array @ strain, scale_atoms=True)
            energies.append(predict(ensemble, params, [strained]).energy[:, 0])
        np.testing.assert_allclose(virial[:, 0, i, j], -derivative(energies, h), rtol=1e-6, atol=1e-6)


def test_single_precision_stays_where_double_is_allowed(ensemble, params):
    """Parameters and positions decide on the type of all that is predicted, not the mode of jax."""

    def single(tree):
        return jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, tree)

    found = jax.eval_shape(ensemble.predict, single(params), single(packed_graph([ethanol()])))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(np.float32)}


def test_batching_and_padding_change_nothing(ensemble, params):
    structures = [ethanol(), crystal(), molecule("H2O"), ethanol()]
    alone = [predict(ensemble, params, [a]) for a in structures]
    neighbors = largest_neighbor_count(structures, SETTINGS.cutoff)
    for shape in (SHAPE, BatchShape(sum(len(a) for a in structures), neighbors, len(structures))):
        together = _predict(ensemble, params, packed_graph(structures, shape))
        start = 0
        for n, (atoms, one) in enumerate(zip(structures, alone, strict=True)):
            np.testing.assert_allclose(together.energy[:, n], one.energy[:, 0], rtol=1e-12)
            np.testing.assert_allclose(together.virial[:, n], one.virial[:, 0], atol=1e-11)
            rows = slice(start, start + len(atoms))
            np.testing.assert_allclose(together.forces[:, rows], one.forces, atol=1e-12)
            start += len(atoms)
        assert np.all(np.isfinite(together.forces)) and np.all(together.forces[:, start:] == 0)


def test_members_equal_single_models(ensemble, params):
    single = Ensemble(ensemble.model, 1)
    whole = predict(ensemble, params, [ethanol()])
    for m in range(2):
        one = predict(single, jax.tree.map(lambda x, m=m: x[m : m + 1], params), [ethanol()])
        np.testing.assert_allclose(one.energy[0], whole.energy[m], rtol=1e-13)
        np.testing.assert_allclose(one.forces[0], whole.forces[m], atol=1e-13)


def test_more_species_change_nothing_for_the_old_ones(ensemble, params):
    """Elements before, between and after the old ones; what a new one does is open, but it does something."""
    table = SpeciesTable((1, 3, 6, 7, 8, 9))
    larger = Ensemble(build_model(settings_of(ensemble), table), 2)
    fresh = in_float64(jax.jit(larger.init)(jax.random.key(9)))
    grown = jax.jit(jax.vmap(lambda old, new: ensemble.model.with_species(old, new, table)))(params, fresh)
    for structure in (ethanol(), crystal()):
        before = _predict(ensemble, params, packed_graph([structure]))
        after = _predict(larger, grown, packed_graph([structure], species=table))
        np.testing.assert_allclose(after.energy[:, 0], before.energy[:, 0], rtol=1e-12)
        np.testing.assert_allclose(after.forces, before.forces, atol=1e-12)
    changed = ethanol()
    for z in (3, 7, 9):
        changed.numbers[2] = z
        other = _predict(larger, grown, packed_graph([changed], species=table))
        assert np.max(np.abs(other.forces - before.forces)) > 1e-3 and np.all(np.isfinite(other.forces))
    with pytest.raises(InputError, match="H, C"):
        ensemble.model.with_species(params, fresh, SpeciesTable((3, 8)))


def settings_of(ensemble: Ensemble):
    model = ensemble.model
    while isinstance(model, Around):
        model = model.inner
    return model.settings


def test_species_told_apart_one_by_one_do_not_grow_into_an_embedding():
    few, many = SpeciesTable((1, 8)), SpeciesTable((1, 6, 8))
    narrow = SETTINGS.model_copy(update={"species_channels": 2})
    model, larger = build_model(narrow, few), build_model(narrow, many)
    key = jax.random.key(0)
    with pytest.raises(InputError, match="species_channels"):
        model.with_species(jax.eval_shape(model.init, key), jax.eval_shape(larger.init, key), many)


def test_extensive(ensemble, params):
    solid = crystal()
    one, eight = predict(ensemble, params, [solid]), predict(ensemble, params, [solid * (2, 2, 2)])
    np.testing.assert_allclose(eight.energy, 8 * one.energy, rtol=1e-11)
    np.testing.assert_allclose(eight.virial, 8 * one.virial, atol=1e-9)
    far = ethanol() + ethanol()
    far.positions[9:] += [50.0, 0, 0]
    far.info = {"charge": 2, "spin": 3}
    np.testing.assert_allclose(
        predict(ensemble, params, [far]).energy, 2 * predict(ensemble, params, [ethanol()]).energy, rtol=1e-12
    )


def test_charge_and_spin_are_seen_and_neutral_singlets_are_as_without(ensemble, params):
    """Whatever the parameters that tell of them: to the last bit."""
    states = [(0, 1), (1, 2), (-1, 2)]
    graph = packed_graph([*(ethanol(*state) for state in states), molecule("H2O")])
    told = _predict(ensemble, params, graph)

    def without(path, leaf):
        return jnp.zeros_like(leaf) if "state_vectors" in jax.tree_util.keystr(path) else leaf

    untold = _predict(ensemble, jax.tree_util.tree_map_with_path(without, params), graph)
    for n, rows in ((0, slice(0, 9)), (3, slice(27, 30))):
        np.testing.assert_array_equal(told.energy[:, n], untold.energy[:, n])
        np.testing.assert_array_equal(told.forces[:, rows], untold.forces[:, rows])
    assert np.ptp(untold.energy[:, :3], axis=1).max() < 1e-12
    energies = np.abs(np.diff(told.energy[:, [0, 1, 2, 0]], axis=1)).min()
    forces = np.abs(told.forces[:, 9:18] - told.forces[:, :9]).max()
    assert ensemble.sees_state == bool(energies > 1e-4) == bool(forces > 1e-4)


def test_what_a_charge_costs_is_a_constant_of_its_sign(ensemble, params):
    """Also of two charges at once; no force, no virial and no energy of a neutral structure changes by a bit."""
    states = [(0, 2), (1, 2), (2, 1), (-1, 2)]
    graph = packed_graph([ethanol(*state) for state in states[:3]])
    negative = packed_graph([ethanol(*states[3]), crystal()])
    costly = with_charge_energy(params, np.array([9.5, -1.25]))
    before, after = (_predict(ensemble, one, graph) for one in (params, costly))
    of_anion = _predict(ensemble, costly, negative).energy - _predict(ensemble, params, negative).energy
    seen = float(ensemble.sees_state)
    np.testing.assert_allclose((after.energy - before.energy)[:, :3], [[0, 9.5 * seen, 19 * seen]] * 2, atol=1e-12)
    np.testing.assert_allclose(of_anion[:, :2], [[-1.25 * seen, 0]] * 2, atol=1e-12)
    np.testing.assert_array_equal(after.energy[:, 0], before.energy[:, 0])
    np.testing.assert_array_equal(after.forces, before.forces)
    np.testing.assert_array_equal(after.virial, before.virial)
    np.testing.assert_array_equal(charge_energy_of(costly), [9.5 * seen, -1.25 * seen])


def test_what_an_atom_is_told_is_its_share(anchored):
    """Inversely proportional to the size of the structure, and learned for each species."""
    s, params = EVERYTHING, dict(anchored[1])
    small, large = molecule("H2O"), molecule("H2O") + molecule("CH4")
    for atoms in (small, large):
        atoms.info["charge"] = -2
    graph = packed_graph([small, large])
    params["state_weights"] = np.zeros_like(params["state_weights"])
    vectors = params["state_vectors"].reshape(3, 3, -1)[:, 1]  # of negative charge

    class Told(nn.Module):
        @nn.compact
        def __call__(self, graph):
            return state_features(self, graph, exact_code(graph, SPECIES, jnp.float64), s.hidden[0])

    own = {name: params[name] for name in ("state_weights", "state_vectors")}
    own |= {"constants": {"state_scale": params["constants"]["state_scale"]}}
    told = jax.jit(Told().apply)(as_variables(own), graph)
    wanted = np.asarray(vectors)[np.asarray(graph.species[:11])] * np.where(np.arange(11) < 3, 2 / 3, 2 / 8)[:, None]
    np.testing.assert_allclose(told[:11], wanted, rtol=1e-6)
    found = jax.jit(lambda own, graph: scaled_states(own, survey_states(graph)))(own, graph)
    scaled = found["constants"]["state_scale"]
    np.testing.assert_allclose(scaled, [1, 1 / np.sqrt((3 * (2 / 3) ** 2 + 8 * (2 / 8) ** 2) / 11), 1], rtol=1e-6)


def test_neutral_isolated_atoms_have_their_energies_whatever_their_spin(anchored):
    model, params = anchored[0], in_float64(anchored[1])
    states = {"O": [(0, 3), (0, 1), (1, 4)], "H": [(0, 2)]}
    atoms = [Atoms(symbol, info={"charge": q, "spin": s}) for symbol, all_of in states.items() for q, s in all_of]
    graph = packed_graph(atoms, BatchShape(4, 1, 4))
    output = jax.jit(lambda params, graph: model.apply(params, model.geometry(graph), graph))(params, graph)
    np.testing.assert_allclose(output.energy[:2], 0, atol=1e-12)
    np.testing.assert_allclose(output.features[:2], 0, atol=1e-12)
    assert np.all(np.abs(output.energy[2:]) > 1e-4)


def test_smooth_at_the_cutoff(ensemble, params):
    """An atom that crosses the cutoff changes energy, force and curvature continuously.

    That of a moment tensor potential changes the first two, as its formula says.
    """
    order = 2 if settings_of(ensemble) == MTP else 3
    h = 10.0 ** (order - 5)

    def energy(distance: float) -> np.ndarray:
        atoms = Atoms("OH2", [[0, 0, 0], [0.96, 0, 0], [0, 0, distance]])
        return np.asarray(predict(ensemble, params, [atoms]).energy[:, 0])

    outside = energy(SETTINGS.cutoff + 1)
    values = np.array([energy(SETTINGS.cutoff - n * h) - outside for n in range(4)])
    values = values[:, np.argmax(np.abs(values[3]))]  # the other member's leading term may vanish by chance
    assert abs(values[0]) < 1e-13
    # a function that vanishes with its first two derivatives falls at least with the third power of the distance
    assert abs(values[1]) < 1e-6
    assert abs(values[2] / values[1]) > 0.87 * 2**order and abs(values[3] / values[2]) > 0.9 * 1.5**order


def test_many_body(ensemble, params):
    """Chirality apart, four-body changes are seen: equal pair distances and angles sums do not give equal energies."""
    square = Atoms("OH3", [[0, 0, 0], [1, 0, 0], [0, 1, 0], [-1, 0, 0]])
    bent = Atoms("OH3", [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, -1, 0]])
    line = Atoms("OH3", [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    a, b, c = (predict(ensemble, params, [x]).energy[0, 0] for x in (square, bent, line))
    np.testing.assert_allclose(a, b, rtol=1e-12)
    assert abs(a - c) > 1e-6 * np.abs(a)  # a million times more than rounding allows between the first two


def test_messages_carry_beyond_the_cutoff(ensemble, params):
    """Without message passing an atom feels nothing beyond the cutoff; with a layer of it, twice as far."""
    far = 1.5 * SETTINGS.cutoff
    line = Atoms("OCH", [[0, 0, 0], [0.5 * far, 0, 0], [far, 0, 0]])
    bent = Atoms("OCH", [[0, 0, 0], [0.5 * far, 0, 0], [0.5 * far, 0.5 * far, 0]])
    assert np.linalg.norm(bent.positions[2] - bent.positions[0]) > SETTINGS.cutoff
    a, b = (predict(ensemble, params, [atoms]).features[:, 0] for atoms in (line, bent))
    if not ensemble.model.local:
        assert np.max(np.abs(a - b)) > 1e-5
    else:
        np.testing.assert_allclose(a, b, atol=1e-13)


def test_rows_of_the_last_layer_are_gradients_of_energies(ensemble, params):
    """Of atoms anchored to isolated ones or not, and of structures; by species, or directions of their embedding."""
    graph, model = packed_graph([ethanol(), crystal()]), Anchored(ensemble.model, (1, 8))
    rng = np.random.default_rng(0)
    weights, one = rng.normal(size=SHAPE.atoms), jax.tree.map(lambda x: x[0], params)
    one = one | {"constants": one["constants"] | {"binding": jnp.asarray([-2.0, -7.0, -3.0])}}

    names = LAST.get(settings_of(ensemble).kind, ("last",))

    @jax.jit
    def both(one: Params) -> tuple[jax.Array, jax.Array]:
        geometry = model.geometry(graph)
        gradient = jax.grad(lambda p: weights @ model.apply(p, geometry, graph).energy)(one)
        return jnp.concatenate([gradient[name].ravel() for name in names]), weights @ model.linear(one, geometry, graph)

    gradient, found = both(one)
    np.testing.assert_allclose(found, gradient, rtol=1e-9, atol=1e-12)
    assert np.abs(gradient).max() > 1e-3
    change = {name: rng.normal(size=params[name].shape) for name in names}
    before = _predict(ensemble, params, graph)
    after = _predict(ensemble, params | {name: params[name] + change[name] for name in names}, graph)
    gradients = jax.jit(lambda found: last_layer_gradient(found, graph, 3, per_atom=False))(before)
    rows = np.asarray(gradients).reshape(SHAPE.structures, 2, -1) * np.sqrt(2)
    scale = np.asarray(jax.jit(jax.vmap(ensemble.model.last_scale))(params))
    moved = np.concatenate([change[name].reshape(2, -1) for name in names], axis=1)
    found = scale[:, None] * np.einsum("sld,ld->ls", rows, moved)
    np.testing.assert_allclose(found, after.energy - before.energy, rtol=1e-9, atol=1e-11)


def test_sizes_fill_in_what_is_not_given():
    small = SharedDensitySettings(size="small", channels=12)
    assert (small.channels, small.l_max) == (12, 2)
    assert SharedDensitySettings() == SharedDensitySettings(size="medium")
    assert SharedDensitySettings.model_validate(small.model_dump(mode="json")) == small


def test_only_coupled_channels_take_part_in_products():
    def shapes(coupled: int | None) -> dict:
        model = build_model(SETTINGS.model_copy(update={"coupled_channels": coupled}), SPECIES)
        return jax.tree.map(jnp.shape, jax.eval_shape(model.init, jax.random.key(0)))

    found = shapes(3)
    assert found["couple_0"] == (3 * 3, 3)  # three pairs of degrees give a scalar
    assert found["dense_0"]["kernel"][0] == 4 * (1 + 3) + 3 * (3 + 3)  # h_0, <h, h>; <r, h>, <r, r>
    assert shapes(None) == shapes(4) == shapes(5)


def test_cutoff_function():
    cut = jax.jit(jax.grad(jax.grad(lambda x: polynomial_cutoff(x, 4.0, 3))))(3.9999999)
    assert abs(cut) < 1e-6
    assert float(polynomial_cutoff(jnp.asarray(0.0), 4.0)) == 1.0


@pytest.mark.parametrize("power", [2, 3, 6, 20])
def test_the_cutoff_has_all_its_digits_close_to_its_end(power):
    """What ends at it may be large, as the repulsion of nuclei; terms of the published form cancel all but a few."""
    exact = np.linspace(0.5, 3.99, 200).astype(np.float32)
    u = exact.astype(np.float64) / 4
    p = power
    published = 1 - u**p * ((p + 1) * (p + 2) / 2 - p * (p + 2) * u + p * (p + 1) / 2 * u**2)
    found = np.asarray(jax.jit(lambda x: polynomial_cutoff(x, 4.0, power))(exact))
    np.testing.assert_allclose(found, published, rtol=2e-6)
    slope = -power * (power + 1) * (power + 2) / 2 * u ** (power - 1) * (1 - u) ** 2 / 4
    found = np.asarray(jax.jit(jax.vmap(jax.grad(lambda x: polynomial_cutoff(x, 4.0, power))))(exact))
    np.testing.assert_allclose(found, slope, rtol=2e-5, atol=1e-6)
