"""Biases against finite differences, closed forms, and the free energies they are made to find.

The committee is analytic: members are exponential pair potentials over all near images, so that energies, forces and
virials are consistent to the last digit. Three walkers stand side by side: one open, one periodic in a skewed cell with
its atoms on both sides of the boundary, one a slab, with padding atoms in two of them.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from analytic import PARAMS, QUIET, context, dimer, explorer, nothing_seen
from ase import Atoms
from pydantic import TypeAdapter, ValidationError

from almlip_jax.dynamics.biases import (
    Bias,
    BiasSettings,
    BoundedUncertaintyBias,
    Metadynamics,
    Ramp,
    Restraint,
    Sphere,
    Steered,
    UncertaintyBias,
    UserVariable,
    Wall,
    build_bias,
    combine,
    free_energy,
)
from almlip_jax.dynamics.biases.variables import (
    Angle,
    Coordination,
    Dihedral,
    Distance,
    DistanceDifference,
    nearest_image,
)
from almlip_jax.dynamics.seen import RunContext, Seen
from almlip_jax.errors import InputError

WALKERS, ATOMS = 3, 6
DEPTHS = np.array([0.9, 1.0, 1.2, 1.25])
DECAYS = np.array([1.1, 1.0, 0.9, 1.0])
IMAGES = np.array(list(itertools.product((-1, 0, 1), repeat=3)), np.int32)


def member_energy(positions, cell, pbc, mask):
    """Energies [M] of one walker, over all images next to it."""
    shifts = jnp.asarray(IMAGES) * pbc
    once = jnp.all((jnp.asarray(IMAGES) == 0) | pbc, axis=1)
    gaps = positions[:, None, None] - positions[None, :, None] + shifts @ cell
    other = ~jnp.eye(len(mask), dtype=bool)[..., None] & once & (mask[:, None] & mask)[..., None]
    length = jnp.sqrt(jnp.sum(jnp.where(other[..., None], gaps, 1.0) ** 2, axis=-1))
    return jnp.stack(
        [jnp.sum(jnp.where(other, 0.5 * d * jnp.exp(-a * length), 0)) for d, a in zip(DEPTHS, DECAYS, strict=True)]
    )


def blank(positions, **more) -> Seen:
    """A step that shows nothing but positions, and what is given."""
    walkers, atoms, _ = positions.shape
    return jax.tree.map(jnp.asarray, replace(nothing_seen(walkers, atoms), positions=positions, **more))


def begun(walkers: int, atoms: int, dtype=np.float32) -> RunContext:
    return context(np.ones(walkers), np.ones(walkers), atoms, dtype)


def three(dtype) -> RunContext:
    return begun(WALKERS, ATOMS, dtype)


def inputs(positions, cells, pbc, mask) -> Seen:
    """What a step would show at some positions."""
    walkers = len(positions)

    def strained(strain, position, cell, *rest):
        map_ = jnp.eye(3) + strain
        return member_energy(position @ map_, cell @ map_, *rest)

    args = (positions, cells, pbc, mask)
    gradient = jax.vmap(jax.jacobian(member_energy))(*args)
    strain_gradient = jax.vmap(partial(jax.jacobian(strained), jnp.zeros((3, 3))))(*args)
    return Seen(
        positions,
        cells,
        pbc,
        mask,
        masses=jnp.where(mask, jnp.arange(1.0, mask.shape[1] + 1), 1.0),
        kt=jnp.linspace(0.02, 0.03, walkers),
        step=jnp.asarray(7),
        progress=jnp.asarray(0.3),
        strength=jnp.linspace(1.0, 0.8, walkers),
        member_energy=jax.vmap(member_energy)(*args).T,
        member_forces=-jnp.moveaxis(gradient, 1, 0),
        member_virial=-jnp.moveaxis(strain_gradient, 1, 0),
    )


def scene(seed: int = 0):
    """Positions, cells, pbc and mask of the three walkers."""
    rng = np.random.default_rng(seed)
    chain = np.array([[0, 0, 0], [1.1, 0.4, 0], [1.6, 1.5, 0.5], [2.6, 1.7, 1.3], [3.0, 2.9, 1.6], [3.9, 3.2, 2.6]])
    positions = chain + 0.15 * rng.standard_normal((WALKERS, ATOMS, 3))
    cells = np.array(
        [
            [[5.0, 0, 0], [0, 0.5, 0], [1.0, 0, 3.0]],
            [[6.1, 0, 0], [1.5, 6.4, 0], [0.8, -0.9, 6.6]],
            [[7.0, 0.5, 0], [0, 6.5, 0], [2.0, 1.0, 9.0]],
        ]
    )
    pbc = np.array([[False] * 3, [True] * 3, [True, True, False]])
    positions[1, [1, 4]] += [cells[1, 0] - cells[1, 2], -cells[1, 1]]  # each atom in another image
    positions[2, 2] += cells[2, 1]
    mask = np.ones((WALKERS, ATOMS), bool)
    mask[0, 5] = mask[2, 5] = False
    positions[~mask] = 7.0
    return positions, cells, pbc, mask


def fractional(positions, cell):
    """A user's variable that feels the cell as well."""
    return jnp.sum(jnp.cos(2 * jnp.pi * (positions[0] - positions[2]) @ jnp.linalg.inv(cell)))


DISTANCE = Distance((0,), (1,))
ANGLE = Angle(((0,), (1,), (2, 3)))
DIHEDRAL = Dihedral(((0,), (1,), (2,), (3,)))
CONTACTS = Coordination((0, 1, 2), (2, 3, 4), 1.7)
USER = UserVariable(fractional, "fractional")
BIASES: dict[str, Bias] = {
    "distance": Restraint(DISTANCE, 3.0, (1.5, 1.0, 1.2)),
    "groups": Restraint(Distance((0, 1), (3, 4)), 1.3, 2.0),
    "distance_difference": Restraint(DistanceDifference(((0,), (1,)), ((2,), (3,))), 2.0, 0.7),
    "angle": Restraint(ANGLE, 1.1, 1.4),
    "dihedral": Restraint(DIHEDRAL, 0.9, 3.0),
    "coordination": Restraint(CONTACTS, 0.7, 1.0),
    "user": Restraint(USER, 0.5, 0.1),
    "steered": Steered(ANGLE, 2.0, 1.0, 2.0),
    "upper": Wall(DISTANCE, "upper", 0.6, 4.0),
    "lower": Wall(CONTACTS, "lower", 9.0, 0.1, 3.0),
    "sphere": Sphere(1.4, 2.0),
    "metadynamics": Metadynamics((DIHEDRAL, DISTANCE), 12, False, 0.1, (0.6, 0.2), 3),
    "shared": Metadynamics((DISTANCE,), 20, True, 0.1, (0.2,), 3, 8.0),
    "tau": UncertaintyBias(tau=1.7),
    "automatic": UncertaintyBias(relative=0.3, window=50),
    "bounded": BoundedUncertaintyBias(0.4, 0.3),
    "ramp": Ramp(Restraint(DISTANCE, 3.0, 2.0), 0.5, 2.0),
    "sum": combine([Sphere(1.4, 2.0), combine([Wall(ANGLE, "lower", 3.0, 1.0)])]),
}


def states(dtype=np.float64):
    """States in which every bias acts."""
    rng = np.random.default_rng(3)
    found = {name: bias.init(three(dtype)) for name, bias in BIASES.items()}
    for name, low, high in (("metadynamics", [-3.1, 0.7], [3.1, 1.7]), ("shared", [0.7], [1.7])):
        hills = found[name]
        found[name] = replace(
            hills,
            centres=jnp.asarray(rng.uniform(low, high, hills.centres.shape)),
            heights=jnp.asarray(rng.uniform(0.05, 0.1, hills.heights.shape)),
        )
    found["automatic"] = replace(found["automatic"], tau=jnp.asarray([0.9, 1.3, 2.0]))
    return found


@jax.jit
@partial(jax.vmap, in_axes=(None, 0, 0, None, None))
def everything(state, positions, cells, pbc, mask):
    """What every bias sees and does, for several copies of the walkers."""
    at = inputs(positions, cells, pbc, mask)
    return at, {name: bias.apply(state[name], at)[0] for name, bias in BIASES.items()}


STEP = 1e-5


@pytest.fixture(scope="module")
def checked():
    """All biases at the scene, at each coordinate and strain moved either way, and with walker 1 elsewhere."""
    positions, cells, pbc, mask = scene()
    moves = np.concatenate([np.eye(ATOMS * 3).reshape(-1, ATOMS, 3), np.zeros((9, ATOMS, 3))])
    unit = np.eye(9).reshape(9, 3, 3)
    strains = np.concatenate([np.zeros((ATOMS * 3, 3, 3)), (unit + unit.swapaxes(1, 2)) / 2])
    signed = STEP * np.array([1, -1])[:, None, None, None]
    moves = (signed * moves).reshape(-1, 1, ATOMS, 3)
    maps = np.eye(3) + (signed * strains).reshape(-1, 1, 3, 3)
    elsewhere = positions.copy()
    elsewhere[1] = scene(1)[0][1]
    copies = np.concatenate([positions[None], elsewhere[None], (positions + moves) @ maps])
    all_cells = np.concatenate([cells[None], cells[None], cells @ maps])
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, everything(states(), copies, all_cells, pbc, mask))


@pytest.fixture
def at(checked) -> Seen:
    """What a step shows at the scene, in float32."""
    first = jax.tree.map(lambda leaf: leaf[0], checked[0])
    return jax.tree.map(jnp.asarray, replace(first, pbc=scene()[2], atom_mask=scene()[3]))


@pytest.mark.parametrize("name", BIASES)
def test_forces_and_virials_are_derivatives_of_the_energy(checked, name):
    """Central differences of the same state: tau and hills are constants."""
    found, mask = checked[1][name], scene()[3]
    ahead, behind = found.energy[2:].reshape(2, -1, WALKERS)
    slope = (ahead - behind) / (2 * STEP)
    forces = -slope[: 3 * ATOMS].T.reshape(WALKERS, ATOMS, 3)
    virial = -slope[3 * ATOMS :].T.reshape(WALKERS, 3, 3)
    np.testing.assert_allclose(found.forces[0][mask], forces[mask], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(found.virial[0], virial, rtol=1e-6, atol=1e-8)
    assert np.abs(found.forces[0]).max(axis=(1, 2)).min() > 1e-3, "a walker feels nothing: nothing is tested"
    assert (found.forces[0][~mask] == 0).all()
    assert np.abs(found.forces[0].sum(axis=1)).max() < 1e-10


@pytest.mark.parametrize("name", BIASES)
def test_walkers_do_not_mix(checked, name):
    found = checked[1][name]
    for values in (found.energy, found.forces, found.virial):
        np.testing.assert_array_equal(values[0][[0, 2]], values[1][[0, 2]])
    assert (found.forces[0, 1] != found.forces[1, 1]).any()


def test_energies_are_the_formulas(checked):
    """With numbers from numpy and ASE, for the restraints and the committee."""
    positions, cells, pbc, mask = scene()
    strength, energies = checked[0].strength[0], checked[0].member_energy[0]
    found = {name: force.energy[0] / strength for name, force in checked[1].items()}
    molecules = [Atoms("H6", positions[w], cell=cells[w], pbc=pbc[w]) for w in range(WALKERS)]
    for w, molecule in enumerate(molecules):
        distance = molecule.get_distance(0, 1, mic=bool(w))
        assert found["distance"][w] == pytest.approx(1.5 * (distance - (1.5, 1.0, 1.2)[w]) ** 2)
        other = molecule.get_distance(2, 3, mic=bool(w))
        assert found["distance_difference"][w] == pytest.approx((distance - other - 0.7) ** 2)
        dihedral = np.radians(molecule.get_dihedral(0, 1, 2, 3, mic=bool(w)))
        gap = (dihedral - 3.0 + np.pi) % (2 * np.pi) - np.pi
        assert found["dihedral"][w] == pytest.approx(0.45 * gap**2)
        lengths = [molecule.get_distance(i, j, mic=bool(w)) for i in (0, 1, 2) for j in (2, 3, 4) if i != j]
        ratio = np.array(lengths) / 1.7
        contacts = np.sum((1 - ratio**6) / (1 - ratio**12))
        assert found["coordination"][w] == pytest.approx(0.35 * (contacts - 1) ** 2)
        real = molecule[mask[w]]
        arms = real.positions - np.average(real.positions, axis=0, weights=np.arange(1, len(real) + 1))
        beyond = np.maximum(np.linalg.norm(arms, axis=1) - 1.4, 0)
        assert found["sphere"][w] == pytest.approx(np.sum(beyond**2))
    np.testing.assert_allclose(found["tau"], -1.7 * energies.std(axis=0), rtol=1e-9)
    np.testing.assert_allclose(found["automatic"], [-0.9, -1.3, -2.0] * energies.std(axis=0), rtol=1e-9)
    atoms = mask.sum(axis=1)
    np.testing.assert_allclose(found["bounded"], 0.4 * (np.exp(-energies.var(axis=0) / (atoms * 0.3**2)) - 1))
    assert (found["bounded"] < 0).all() and (found["bounded"] >= -0.4).all()
    lengths = np.array([molecule.get_distance(0, 1, mic=bool(w)) for w, molecule in enumerate(molecules)])
    np.testing.assert_allclose(found["ramp"], (0.5 + 1.5 * 0.3) * 1.5 * (lengths - 2) ** 2)


def test_the_nearest_image_is_the_nearest():
    """Against 125 images in skewed cells, slabs and wires; directions that are not periodic may hold anything."""
    rng = np.random.default_rng(0)
    images = np.array(list(itertools.product(range(-2, 3), repeat=3)))
    with jax.enable_x64(True):
        nearest = jax.jit(nearest_image)
        for pbc in np.array([[1, 1, 1], [1, 0, 1], [0, 0, 1], [0, 0, 0]], bool):
            cell = rng.normal(size=(3, 3)) + 4 * np.eye(3) + 2 * np.eye(3, k=1)
            rows = np.where(pbc[:, None], cell, 0)
            vectors = rng.uniform(-12, 12, (50, 3))
            found = nearest(vectors, np.where(pbc[:, None], cell, 1e30), pbc)
            shift = (vectors - found) @ np.linalg.pinv(rows)
            np.testing.assert_allclose(shift, np.round(shift), atol=1e-9)
            np.testing.assert_allclose(shift @ rows, vectors - found, atol=1e-9)
            every = np.linalg.norm(found[:, None] + images @ rows, axis=-1)
            np.testing.assert_allclose(every.min(axis=1), np.linalg.norm(found, axis=1))


def test_points_on_a_line_and_on_each_other_leave_gradients_finite():
    line = np.array([[0.0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 3]])
    straight = Angle(((0,), (1,), (2,)))
    variables = (straight, Coordination((0, 2), (1,), 1.0), DIHEDRAL, Distance((0, 2), (1,)))

    @jax.jit
    def values(positions):
        nothing = jnp.zeros((3, 3)), jnp.zeros(3, bool)
        return [jax.value_and_grad(variable)(positions, *nothing) for variable in variables]

    found = values(line)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    assert found[0][0] == pytest.approx(np.pi) and found[1][0] == pytest.approx(1.0)  # n / m of each of two pairs


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_states_keep_their_shapes_and_types(dtype):
    """So that every bias can go round a compiled loop."""

    def shapes(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)

    with jax.enable_x64(dtype == np.float64):
        args = [values.astype(dtype) if values.dtype != bool else values for values in scene()]
        seen = jax.eval_shape(inputs, *args)
        first = {name: bias.init(three(dtype)) for name, bias in BIASES.items()}

        def step(state, at):
            return {name: bias.apply(state[name], at) for name, bias in BIASES.items()}

        for name, (force, after) in jax.eval_shape(step, first, seen).items():
            assert shapes(after) == shapes(first[name])
            assert {leaf.dtype for leaf in jax.tree.leaves(force)} == {np.dtype(dtype)}


def test_no_bias_is_nothing(at):
    force, after = combine([]).apply(combine([]).init(three(np.float32)), at)
    assert after == () and not any(np.any(leaf) for leaf in jax.tree.leaves(force))


def test_strength_zero_switches_off_even_what_is_not_a_number(at):
    at = replace(
        at,
        positions=at.positions.at[1].set(jnp.nan),
        member_energy=at.member_energy.at[:, 1].set(jnp.nan),
        strength=jnp.asarray([1.0, 0.0, 0.0]),
        step=jnp.asarray(3),
    )
    names = ("distance", "sphere", "tau", "shared", "steered")
    bias = combine([BIASES[name] for name in names])
    force, after = jax.jit(bias.apply)(bias.init(three(np.float32)), at)
    assert np.isfinite(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(force)])).all()
    assert np.any(force.forces[0]) and not np.any(force.forces[1:]) and not np.any(force.virial[1:])
    assert list(after[3].count) == [1] and after[4].work[0] != 0 and not np.any(after[4].work[1:])


def test_other_numbers_need_no_other_program(at, count_compilations):
    run = jax.jit(lambda bias, state, at: bias.apply(state, at), static_argnums=0)

    def biased(k, centre, tau, pace):
        return combine(
            [Restraint(DISTANCE, k, centre), UncertaintyBias(tau=tau), Metadynamics((ANGLE,), 4, True, k, (k,), pace)]
        )

    one, other = biased(1.0, 2.0, 0.1, 3), biased(2.0, (1.0, 1.5, 2.0), 0.2, 5)
    first = run(one, one.init(three(np.float32)), at)[0]
    state = other.init(three(np.float32))
    with count_compilations() as compiled:
        second = run(other, state, at)[0]
    assert not compiled and np.all(first.energy != second.energy)
    assert combine([UncertaintyBias()]) != combine([UncertaintyBias(tau=1.0)])


def test_automatic_tau_reaches_the_ratio_of_mean_forces():
    """Random members and forces over 1500 steps; mean norms are over real atoms alone."""
    walkers, atoms, steps = 2, 5, 1500
    mask = np.array([[True] * 5, [True] * 3 + [False] * 2])
    bias = UncertaintyBias(relative=0.3, window=100)
    at = blank(np.zeros((walkers, atoms, 3)), atom_mask=mask, member_virial=np.zeros((4, walkers, 3, 3)))

    def mean_norm(vectors):
        return jnp.linalg.norm(vectors, axis=-1).sum(axis=1) / mask.sum(axis=1)

    def step(state, key):
        keys = jax.random.split(key, 3)
        forces = jax.random.normal(keys[0], (walkers, atoms, 3)) * jnp.asarray([1.0, 5.0])[:, None, None]
        members = forces + 0.2 * jax.random.normal(keys[1], (4, walkers, atoms, 3))
        members = jnp.where(mask[..., None], members, 0)
        energy = jax.random.normal(keys[2], (4, walkers))
        force, after = bias.apply(state, replace(at, member_energy=energy, member_forces=members))
        return after, (mean_norm(force.forces), mean_norm(jnp.mean(members, axis=0)), force.energy)

    keys = jax.random.split(jax.random.key(0), steps)
    pulls, pushes, energy = jax.lax.scan(step, bias.init(begun(walkers, atoms)), keys)[1]
    assert not np.any(energy[0]), "no tau is known in the first step"
    ratio = pulls[200:].mean(axis=0) / pushes[200:].mean(axis=0)
    np.testing.assert_allclose(ratio, 0.3, rtol=0.03)


def test_a_committee_that_agrees_has_no_bias(at):
    members = (at.member_energy, at.member_forces, at.member_virial)
    names = ("member_energy", "member_forces", "member_virial")
    at = replace(at, **{name: jnp.repeat(leaf[:1], 4, axis=0) for name, leaf in zip(names, members, strict=True)})

    @jax.jit
    def run(at):
        found = {}
        for name in ("tau", "automatic", "bounded"):
            state = BIASES[name].init(three(np.float32))
            for _ in range(2):
                force, state = BIASES[name].apply(state, at)
            found[name] = force, state
        return found

    for force, after in run(at).values():
        assert np.abs(force.forces).max() < 1e-6 and np.abs(force.energy).max() < 1e-5
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


def pulled(bias, distances, steps):
    """Final states of walkers that are two atoms at distances [steps, W], under x64."""
    walkers = distances.shape[1]
    at = blank(np.zeros((walkers, 2, 3)), strength=np.linspace(1.0, 0.5, walkers))

    def step(state, now):
        index, distance = now
        moved = replace(at, positions=at.positions.at[:, 1, 0].set(distance), progress=index / steps, step=index)
        return bias.apply(state, moved)[1], None

    return jax.lax.scan(step, bias.init(begun(walkers, 2, np.float64)), (jnp.arange(1, steps + 1), distances))[0]


def test_steered_work():
    """Of a walker that stays where it is, and of one that follows the centre at a constant lag."""
    stiffness, start, end, steps, lag = 3.0, 1.0, 2.5, 50, 0.2
    with jax.enable_x64(True):
        centres = start + (end - start) * np.arange(1, steps + 1) / steps
        distances = jnp.asarray(np.stack([np.full(steps, 1.7), centres - lag], axis=1))
        state = pulled(Steered(DISTANCE, stiffness, start, end), distances, steps)
    still = stiffness / 2 * ((1.7 - end) ** 2 - (1.7 - start) ** 2)
    move = (end - start) / steps
    follows = stiffness * move * (lag - move / 2) * steps
    np.testing.assert_allclose(state.work, [still, 0.5 * follows], rtol=1e-9)
    np.testing.assert_allclose(state.centre, end)


@pytest.mark.parametrize("shared", [False, True])
def test_hills_do_not_exceed_their_room(shared):
    """Three walkers, a hill each every second step, room for five: the sixth and all after are only counted."""
    with jax.enable_x64(True):
        distances = jnp.asarray(np.linspace(1.0, 2.0, 48).reshape(16, 3))
        bias = Metadynamics((DISTANCE,), 5, shared, 0.1, (0.05,), 2)
        early, late = (pulled(bias, distances[:steps], steps) for steps in (10, 16))
        left = np.asarray(distances)[1::2]
    if shared:
        assert list(late.count) == [5] and list(late.missed) == [3 * 8 - 5]
        np.testing.assert_allclose(late.centres[0, :, 0], left.ravel()[:5])
    else:
        assert list(late.count) == [5] * 3 and list(late.missed) == [3] * 3
        np.testing.assert_allclose(late.centres[..., 0], left[:5].T)
    np.testing.assert_array_equal(early.centres, late.centres)
    np.testing.assert_allclose(late.heights, 0.1)


def test_well_tempered_heights():
    """At a fixed place V_k+1 = V_k + h exp(-V_k / (kT (gamma - 1))), and the estimate is -gamma / (gamma - 1) V."""
    with jax.enable_x64(True):
        bias = Metadynamics((DISTANCE,), 9, False, 0.1, (0.1,), 1, 4.0)
        state = pulled(bias, jnp.full((9, 1), 1.3), 9)
    total = 0.0
    for height in np.asarray(state.heights[0]):
        assert height == pytest.approx(0.1 * np.exp(-total / (0.02 * 3)))
        total += height
    estimate = free_energy(state, [np.array([1.3, 1.4, 9.0])])
    np.testing.assert_allclose(estimate[0], 4 / 3 * total * np.array([0, 1 - np.exp(-0.5), 1]))


def test_hills_of_periodic_variables_reach_around():
    with jax.enable_x64(True):
        state = Metadynamics((DIHEDRAL, DISTANCE), 3, False, 0.1, (0.3, 0.2), 1).init(begun(2, 4, np.float64))
        state = replace(
            state,
            centres=state.centres.at[1, 0].set(jnp.asarray([np.pi - 0.1, 1.0])),
            heights=state.heights.at[1, 0].set(0.2),
            count=jnp.asarray([0, 1]),
        )
    axis = np.array([-np.pi + 0.1, np.pi - 0.3, 0.0])
    found = free_energy(state, [axis, [1.0, 1.2]])
    height = 0.2 * np.outer([np.exp(-0.5 * (0.2 / 0.3) ** 2)] * 2 + [0], [1, np.exp(-0.5)])
    assert found.shape == (2, 3, 2) and not found[0].any()
    np.testing.assert_allclose(found[1], height.max() - height, atol=1e-9)


@pytest.mark.slow
def test_metadynamics_finds_the_free_energy_of_a_double_well():
    """Overdamped Langevin dynamics over 9 and 7 kT between two wells; eight walkers share well-tempered hills.

    Where F is below 9 kT the estimate is within 0.4 kT in the root mean square, and its barriers are within 0.6 kT.
    Without the factor gamma / (gamma - 1), 6/5, they would be short by 1.5 and 1.2 kT.
    """
    walkers, kt, mobility = 8, 0.025, 0.04

    def potential(x):
        return 0.2 * (x**2 - 1) ** 2 + 0.025 * x

    coordinate = UserVariable(lambda positions, cell: positions[0, 0], "x")
    bias = Metadynamics((coordinate,), 1000, True, 0.01, (0.15,), 800, 6.0)
    at = blank(np.zeros((walkers, 1, 3)), kt=np.full(walkers, kt))

    @jax.jit
    def run(key):
        def step(carry, now):
            x, state = carry
            index, key = now
            force, state = bias.apply(state, replace(at, positions=at.positions.at[:, 0, 0].set(x), step=index))
            pull = force.forces[:, 0, 0] - jax.vmap(jax.grad(potential))(x)
            x = x + mobility * pull + jnp.sqrt(2 * mobility * kt) * jax.random.normal(key, x.shape)
            return (x, state), None

        steps = 100000
        start = jnp.full(walkers, -1.0), bias.init(begun(walkers, 1))
        (_, state), _ = jax.lax.scan(step, start, (jnp.arange(steps), jax.random.split(key, steps)))
        return state

    state = run(jax.random.key(0))
    axis = np.linspace(-1.5, 1.5, 121)
    exact = potential(axis) - potential(axis).min()
    found = free_energy(state, [axis])[0]
    near = exact < 9 * kt
    error = (found - found[near].mean()) - (exact - exact[near].mean())
    assert np.sqrt(np.mean(error[near] ** 2)) < 0.4 * kt
    between = np.abs(axis) < 0.4
    for well in (axis < -0.5, axis > 0.5):
        barriers = [one[between].max() - one[well].min() for one in (found, exact)]
        assert barriers[0] == pytest.approx(barriers[1], abs=0.6 * kt)
    assert int(state.count[0]) == 8 * 124 and not state.missed[0]


USER_MODULE = '''
import jax.numpy as jnp

def height(atom, above):
    """Height of an atom over the mean of some others."""
    def cv(positions, cell):
        return positions[atom, 2] - jnp.mean(positions[jnp.array(above), 2])
    return cv
'''


def test_settings_build_biases(at, with_module):
    with_module("my_variables", USER_MODULE)
    mine = {"kind": "user", "function": "my_variables:height", "parameters": {"atom": 2, "above": [0, 1]}}
    adapter = TypeAdapter(tuple[BiasSettings, ...])
    settings = adapter.validate_python(
        [
            {"kind": "restraint", "variable": mine, "stiffness": 2.0, "centre": 1.0},
            {"kind": "wall", "variable": {"kind": "distance", "points": [0, [3, 4]]}, "side": "upper",
             "position": 2.0, "stiffness": 1.0, "ramp": [0, 1]},
            {"kind": "metadynamics", "variables": [{"kind": "dihedral", "points": [0, 1, 2, 3]}], "widths": [0.3],
             "height": 0.02, "pace": 50, "hills": 20},
            {"kind": "uncertainty"},
            {"kind": "bounded_uncertainty", "height": 1.0, "width": 0.1},
            {"kind": "sphere", "radius": 4.0},
            {"kind": "steered", "variable": {"kind": "angle", "points": [0, 1, 2]}, "stiffness": 1.0, "start": 1.0,
             "end": [2.0, 2.5, 3.0]},
        ]
    )  # fmt: skip
    assert adapter.validate_json(adapter.dump_json(settings)) == settings
    bias = build_bias(settings)
    assert bias == build_bias(settings) and hash(bias) == hash(build_bias(settings))
    assert bias.parts[1] == Ramp(Wall(Distance((0,), (3, 4)), "upper", 9.0, 9.0), 0, 0)
    state = bias.init(three(np.float32))
    energy = bias.parts[0].apply(state[0], at)[0].energy
    heights = at.positions[:, 2, 2] - at.positions[:, :2, 2].mean(axis=1)
    np.testing.assert_allclose(energy, at.strength * (heights - 1) ** 2, rtol=1e-5)
    assert list(state[6].end) == [2.0, 2.5, 3.0]


def test_the_page_shows_settings_that_work():
    page = (Path(__file__).parents[2] / "docs" / "biases.md").read_text()
    settings = TypeAdapter(tuple[BiasSettings, ...]).validate_python(yaml.safe_load(page.split("```")[1][5:])["biases"])
    assert len(build_bias(settings).init(begun(4, 15))) == 3


BAD = [
    ({"kind": "wall", "variable": {"kind": "dihedral", "points": [0, 1, 2, 3]}, "side": "upper", "position": 1.0,
      "stiffness": 1.0}, "both sides"),
    ({"kind": "restraint", "variable": {"kind": "distance", "points": [1, 1]}, "stiffness": 1.0, "centre": 1.0},
     "the same"),
    ({"kind": "restraint", "variable": {"kind": "distance", "points": [-1, 1]}, "stiffness": 1.0, "centre": 1.0},
     "greater than or equal to 0"),
    ({"kind": "metadynamics", "variables": [{"kind": "distance", "points": [0, 1]}], "widths": [0.1, 0.2],
      "height": 0.1, "pace": 10}, "one each"),
    ({"kind": "restraint", "variable": {"kind": "coordination", "first": [0], "second": [0], "r0": 1.0},
      "stiffness": 1.0, "centre": 1.0}, "no pair"),
    ({"kind": "uncertainty", "taus": 1.0}, "did you mean 'tau'"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(BiasSettings).validate_python(settings)


def test_what_does_not_suit_the_walkers_is_one_sentence(at):
    held = BiasSettings.parse({"kind": "restraint", "variable": {"kind": "distance", "points": [0, [1, 2]]},
                               "stiffness": 5.0, "centre": 3.0})  # fmt: skip
    with pytest.raises(InputError, match=r"biases.0 looks at atom 2, and walker 1 has 2 atoms"):
        explorer(biases=(held,)).begin(PARAMS, [Atoms("OH2"), dimer(), Atoms("OH2")], QUIET, jax.random.key(0))
    with pytest.raises(InputError, match="atom 4"):
        Restraint(Distance((0,), (4,)), 1.0, 1.0).init(begun(2, 4))
    with pytest.raises(InputError, match="3 values for 2 walkers"):
        Restraint(DISTANCE, 1.0, (1.0, 2.0, 3.0)).init(begun(2, 4))
    with pytest.raises(InputError, match=r"scalar, not shape \(3,\)"):
        Restraint(UserVariable(lambda positions, cell: positions[0], "mine"), 1.0, 1.0).apply(
            Restraint(DISTANCE, 1.0, 1.0).init(three(np.float32)), at
        )
