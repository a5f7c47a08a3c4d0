"""Integrators against theory: sampled distributions, reference implementations, exact limits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import CUTOFF, DEPTH, LENGTH, PARAMS, QUIET, WIDTH, dimer, explorer
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import Calculator
from ase.constraints import FixAtoms
from ase.md.verlet import VelocityVerlet as AseVerlet
from ase.neighborlist import neighbor_list

from almlip_jax.dynamics import Explorer, Status, WalkerGroup, begins_alike
from almlip_jax.dynamics.integrators import (
    AdversarialSettings,
    AndersenSettings,
    FireSettings,
    IntegratorSettings,
    LangevinSettings,
    NoseHooverSettings,
    NptSettings,
    NveSettings,
    SwapSettings,
    VelocityRescalingSettings,
    thermostats,
)
from almlip_jax.dynamics.integrators.adversarial import ascent_direction
from almlip_jax.dynamics.integrators.barostat import strained
from almlip_jax.dynamics.motion import Evaluation, Moment, Motion, kinetic_energy
from almlip_jax.ensembles import Prediction
from almlip_jax.errors import InputError
from almlip_jax.partial_import import import_part
from almlip_jax.structures.graph import Graph, Places, forces_and_virial, sum_over_atoms
from almlip_jax.units import GPA, KB

pytestmark = pytest.mark.usefixtures("optimised")

CLUSTER = Atoms("O6", [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1]])


def pair_energy(positions: np.ndarray, depth: float = DEPTH) -> tuple[float, np.ndarray, float]:
    """Energy, forces and Laplacian of the Morse cluster, in numpy."""
    vectors = positions[None] - positions[:, None]
    distance = np.linalg.norm(vectors, axis=-1) + np.eye(len(positions))
    decay = np.where(np.eye(len(positions), dtype=bool), 0, np.exp(-WIDTH * (distance - LENGTH)))
    off = 1 - np.eye(len(positions))
    energy = 0.5 * np.sum(depth * (1 - decay) ** 2 * off)
    slope = 2 * depth * WIDTH * (1 - decay) * decay * off
    curvature = 2 * depth * WIDTH**2 * decay * (2 * decay - 1) * off
    forces = np.sum(slope[..., None] * vectors / distance[..., None], axis=1)
    return energy, forces, float(np.sum(curvature + 2 * slope / distance))


class Morse(Calculator):
    implemented_properties = ["energy", "forces"]

    def calculate(self, atoms=None, properties=("energy",), system_changes=()):
        super().calculate(atoms, properties, system_changes)
        energy, forces, _ = pair_energy(self.atoms.positions)
        self.results = {"energy": energy, "forces": forces}


def test_the_trajectory_is_that_of_ase():
    with jax.enable_x64(True):
        runner = explorer(np.float64, integrator=NveSettings(), steps=60, chunk=60, trajectory_every=20)
        found = runner.run(PARAMS, [CLUSTER] * 3, QUIET, jax.random.key(3))
    whole = found.trajectories[1]
    atoms = whole[0].copy()
    atoms.calc = Morse()
    AseVerlet(atoms, 0.5 * units.fs).run(40)
    np.testing.assert_allclose(whole[2].positions, atoms.positions, atol=1e-9)
    np.testing.assert_allclose(whole[2].get_momenta(), atoms.get_momenta(), atol=1e-9)
    np.testing.assert_allclose(found.energy[-1, 1], pair_energy(whole[2].positions)[0], rtol=1e-12)


def test_the_chain_is_that_of_jax_md(monkeypatch):
    """With its Suzuki-Yoshida weights; those here are of fourth order."""
    (simulate,) = import_part("jax_md", "simulate")
    monkeypatch.setattr(thermostats, "_SUZUKI_YOSHIDA", np.array(simulate.SUZUKI_YOSHIDA_WEIGHTS[3]))
    with jax.enable_x64(True):
        momentum = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 3)))
        at = moment(kt=0.7, timestep=0.05, freedom=15, numbers={"time": 1.0})
        chain = thermostats.NoseHoover()
        motion = Motion(momentum, momentum, momentum, jnp.full((1, 6, 1), 2.0), None, None, None)
        motion = motion.set(extra=chain.init(motion, at))
        theirs = simulate.nose_hoover_chain(0.05, 5, 2, 3, 1.0)
        state, reference = theirs.initialize(15, kinetic_energy(motion)[0], 0.7), momentum[0]
        for _ in range(5):
            motion = chain._half(motion, at)
            state = state.set(kinetic_energy=jnp.sum(reference**2) / 4)
            reference, state = theirs.half_step(reference, state, 0.7)
        np.testing.assert_allclose(motion.momentum[0], reference, rtol=1e-7)


def moment(kt: float, timestep: float, freedom: int, numbers: dict[str, float], walkers: int = 1, atoms: int = 6):
    return Moment(
        kt=jnp.full(walkers, kt),
        pressure=jnp.zeros(walkers),
        timestep=jnp.asarray(timestep),
        mobile=jnp.ones((walkers, atoms), bool),
        free=jnp.ones(walkers, bool),
        freedom=jnp.full(walkers, float(freedom)),
        elastic=jnp.ones(walkers, bool),
        numbers={name: jnp.asarray(value) for name, value in numbers.items()},
    )


def test_a_ramp_heats_and_one_walker_s_bath_is_not_another_s():
    groups = (WalkerGroup(temperature=(100.0, 500.0), count=16), WalkerGroup(temperature=300.0, count=16))
    runner = explorer(walkers=groups, steps=2000, chunk=1000, trace_every=10, integrator=LangevinSettings(friction=0.3))
    found = runner.run(PARAMS, [CLUSTER] * 32, QUIET, jax.random.key(1))
    late, early = found.temperature[-20:], found.temperature[30:50]
    assert late[:, :16].mean() == pytest.approx(480, rel=0.08)
    assert early[:, :16].mean() == pytest.approx(180, rel=0.12)
    assert late[:, 16:].mean() == pytest.approx(300, rel=0.08)


def free(params: jax.Array, graph: Graph) -> Prediction:
    """No interaction: an ideal gas."""
    atoms, structures = graph.vectors.shape[0], graph.num_structures
    none = jnp.zeros_like(graph.vectors, shape=(2, atoms, 3))
    return Prediction(none[:, :structures, 0], none, none[:, :structures, :, None] * jnp.zeros(3), none[..., :1])


@pytest.mark.slow
@pytest.mark.parametrize("steps", [6000, 60_000])
def test_an_ideal_gas_has_its_volume(steps):
    """``<V> = (N + 1) kT / P`` within three standard errors, in the long run of one percent at most."""
    walkers, atoms, kelvin, pressure = 64, 12, 300.0, 0.5
    thermal = KB * kelvin / (pressure * GPA)
    length = ((atoms + 1) * thermal) ** (1 / 3)
    rng = np.random.default_rng(0)
    starts = [
        Atoms(f"O{atoms}", rng.uniform(0, length, (atoms, 3)), cell=[length] * 3, pbc=True) for _ in range(walkers)
    ]
    runner = explorer(
        evaluate=free,
        cutoff=0.6,
        skin=1.0,
        timestep=0.5,
        walkers=(WalkerGroup(temperature=kelvin, count=walkers, pressure=pressure),),
        steps=steps,
        chunk=3000,
        trace_every=20,
        trajectory_every=3000,
        integrator=NptSettings(friction=0.05, barostat_time=60, compressibility=1 / pressure),
    )
    found = runner.run(PARAMS, starts, QUIET, jax.random.key(1))
    volume = found.volume[100:]
    mean, error = volume.mean(), volume.mean(axis=0).std() / np.sqrt(walkers)
    expected = (atoms + 1) * thermal
    assert abs(mean - expected) < 3 * error
    assert error < 0.01 * expected and abs(mean / expected - 1) < (0.01 if steps > 10_000 else 0.03)
    assert volume.var() == pytest.approx((atoms + 1) * thermal**2, rel=0.15)


CRYSTAL = bulk("O", "fcc", a=2.0, cubic=True) * (2, 2, 2)
RELAXED = bulk("O", "fcc", a=1.8796, cubic=True) * (2, 2, 2)  # its lattice constant without pressure
CRYSTAL_CUTOFF = 2.4


def smooth_morse(params: jax.Array, graph: Graph) -> Prediction:
    """Morse pairs that vanish smoothly at the cutoff, so that volumes may change."""

    def member(depth: jax.Array) -> Prediction:
        def energies(vectors: jax.Array) -> jax.Array:
            distance = jnp.sqrt(jnp.sum(jnp.where(graph.edge_mask[..., None], vectors, 1.0) ** 2, axis=-1))
            fade = jnp.maximum(1 - (distance / CRYSTAL_CUTOFF) ** 2, 0) ** 3
            pair = 0.5 * depth * ((1 - jnp.exp(-WIDTH * (distance - 1.5))) ** 2 - 1) * fade
            return sum_over_atoms(jnp.sum(jnp.where(graph.edge_mask, pair, 0), axis=1), graph)

        energy, pull = jax.vjp(energies, graph.vectors)
        forces, virial = forces_and_virial(Places(pull(jnp.ones_like(energy))[0]), graph)
        return Prediction(energy=energy, forces=forces, virial=virial, features=forces)

    return jax.vmap(member)(params)


def configurational(frames: list[Atoms]) -> float:
    """Mean of ``|grad U|^2 / k`` over the mean Laplacian, K, of `smooth_morse` with the mean depth."""

    def energy(r: np.ndarray) -> np.ndarray:
        return DEPTH * ((1 - np.exp(-WIDTH * (r - 1.5))) ** 2 - 1) * np.maximum(1 - (r / CRYSTAL_CUTOFF) ** 2, 0) ** 3

    squares, curvatures = [], []
    for frame in frames:
        i, r, vector = neighbor_list("idD", frame, CRYSTAL_CUTOFF)
        h = 1e-4
        slope = (energy(r + h) - energy(r - h)) / (2 * h)
        curvature = (energy(r + h) - 2 * energy(r) + energy(r - h)) / h**2
        gradient = np.zeros((len(frame), 3))
        np.add.at(gradient, i, -(slope / r)[:, None] * vector)
        squares.append(np.sum(gradient**2))
        curvatures.append(np.sum(curvature + 2 * slope / r))
    return float(np.mean(squares) / np.mean(curvatures) / KB)


KELVIN = 400.0


def crystal_explorer(integrator: IntegratorSettings, steps: int) -> Explorer:
    """Eight hot crystals."""
    return explorer(
        np.float32,
        smooth_morse,
        CRYSTAL_CUTOFF,
        integrator=integrator,
        walkers=(WalkerGroup(temperature=KELVIN, count=8),),
        timestep=0.5,
        steps=steps,
        chunk=2000,
        trace_every=10,
        trajectory_every=200,
    )


@pytest.fixture(scope="module")
def equilibrated() -> list[Atoms]:
    """Canonical samples: a bath that is one for all atoms takes long to mix the modes of a crystal."""
    runner = crystal_explorer(LangevinSettings(friction=0.05), 2000)
    return runner.run(PARAMS, [RELAXED] * 8, QUIET, jax.random.key(0)).final


@pytest.mark.parametrize(
    ("integrator", "freedom", "steps"),
    [
        pytest.param(VelocityRescalingSettings(time=20), 93, 4000, marks=pytest.mark.slow),
        pytest.param(NoseHooverSettings(time=20), 93, 4000, marks=pytest.mark.slow),
        pytest.param(AndersenSettings(rate=0.02), 96, 8000, marks=pytest.mark.slow),
        (LangevinSettings(friction=0.02), 96, 4000),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_thermostats_sample_the_canonical_ensemble(integrator, freedom, steps, equilibrated):
    """A hot crystal stays canonical: kinetic and configurational temperature, and the spread of the kinetic one."""
    walkers, kelvin = len(equilibrated), KELVIN
    runner = crystal_explorer(integrator, steps)
    found = runner.run(PARAMS, equilibrated, QUIET, jax.random.key(1))
    kinetic = found.temperature[-((len(found.temperature) - 40) // 3 * 3) :]
    parts = kinetic.reshape(3, -1, walkers).mean(axis=1).ravel()
    assert abs(kinetic.mean() - kelvin) < 3 * parts.std() / np.sqrt(len(parts)) + 1
    assert kinetic.var() == pytest.approx(2 * kelvin**2 / freedom, rel=0.2)
    each = np.array([configurational(frames[2:]) for frames in found.trajectories])
    assert abs(each.mean() - kelvin) < 3 * each.std() / np.sqrt(walkers) + 4


@pytest.mark.slow
def test_cells_relax_and_fluctuate_around_the_same_volume():
    """FIRE on a strained crystal ends in the cubic cell; cold dynamics of the full cell stay there."""
    strain = np.array([[0.03, 0.02, 0], [0.02, -0.02, 0.01], [0, 0.01, 0.02]])
    start = CRYSTAL.copy()
    start.set_cell(CRYSTAL.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    start.rattle(0.05, seed=1)
    relax = explorer(
        np.float32,
        smooth_morse,
        CRYSTAL_CUTOFF,
        integrator=FireSettings(cell="full", largest_force=0.01, largest_stress=0.02),
        walkers=(WalkerGroup(temperature=1.0, count=2),),
        steps=1500,
        chunk=500,
    )
    found = relax.run(PARAMS, [start, CRYSTAL], QUIET, jax.random.key(0))
    assert set(found.status) == {Status.CONVERGED}
    relaxed = found.final[0]
    np.testing.assert_allclose(relaxed.cell.lengths(), found.final[1].cell.lengths(), rtol=2e-3)
    np.testing.assert_allclose(relaxed.cell.lengths(), RELAXED.cell.lengths(), rtol=2e-3)
    np.testing.assert_allclose(relaxed.cell.angles(), 90, atol=0.2)
    assert abs(found.pressure[found.step < found.end_step[0], 0][-1]) < 0.05 * GPA
    cold = explorer(
        np.float32,
        smooth_morse,
        CRYSTAL_CUTOFF,
        integrator=NptSettings(cell="full", friction=0.02, barostat_time=100, compressibility=0.01),
        walkers=(WalkerGroup(temperature=20.0, count=2),),
        steps=3000,
        chunk=1000,
    )
    cooled = cold.run(PARAMS, [relaxed, relaxed], QUIET, jax.random.key(1))
    assert set(cooled.status) == {Status.COMPLETED}
    assert cooled.volume[1000:].mean() == pytest.approx(relaxed.get_volume(), rel=5e-3)
    assert cooled.temperature[1000:].mean() == pytest.approx(20.0, rel=0.1)


CELLS_MOVE = [
    NptSettings(friction=0.05, barostat_time=60, compressibility=0.01),
    FireSettings(cell="isotropic", largest_force=0.02, largest_stress=0.05),
]


@pytest.mark.parametrize("settings", CELLS_MOVE, ids=lambda one: one.kind)
def test_only_what_is_periodic_in_three_directions_is_strained(settings):
    """A molecule without a cell, a crystal, and a slab in the cell of the crystal."""
    rng = np.random.default_rng(0)
    position, force = (jnp.asarray(rng.normal(size=(3, 4, 3)), jnp.float32) for _ in range(2))
    cell = jnp.asarray([np.zeros((3, 3)), 4 * np.eye(3), 4 * np.eye(3)], jnp.float32)
    virial = jnp.tile(jnp.eye(3, dtype=jnp.float32), (3, 1, 1))
    integrator, keys = settings.build(), jax.random.split(jax.random.key(0), 3)
    moved = []
    for pressure in (0.0, 0.5):
        at = moment(0.02, 0.5, 9.0, settings.numbers(), walkers=3, atoms=4)
        at = at.replace(pressure=jnp.full(3, pressure), elastic=jnp.array([False, True, False]))
        before = Motion(position, force, force, jnp.ones((3, 4, 1)), keys, cell, virial)
        before = before.set(extra=integrator.init(before, at))
        for _ in range(2):  # the first step of a relaxation has no velocity yet
            before = integrator.to_force(before, at, jnp.asarray(0))
        moved.append(before)
    one, other = moved
    for w, elastic in enumerate((False, True, False)):
        assert np.array_equal(one.cell[w], cell[w]) == (not elastic)
        assert np.array_equal(one.position[w], other.position[w]) == (not elastic)
        assert np.isfinite(one.position[w]).all() and np.isfinite(one.momentum[w]).all()
    if settings.kind == "fire":
        still = one.set(force=jnp.zeros_like(force))
        assert integrator.converged(still, at).tolist() == [True, False, True], "a stress is that of a crystal"


def test_cells_that_are_not_there_cannot_move():
    for settings in CELLS_MOVE:
        runner = explorer(np.float32, smooth_morse, CRYSTAL_CUTOFF, integrator=settings)
        with pytest.raises(InputError, match=f"'{settings.kind}' moves cells, but no start structure is periodic"):
            runner.run(PARAMS, [CLUSTER] * 3, QUIET, jax.random.key(0))


@pytest.mark.slow
@pytest.mark.parametrize("integrator", CELLS_MOVE, ids=lambda one: one.kind)
def test_molecules_beside_crystals_keep_their_cells(integrator):
    """The cell of the crystal moves; a molecule goes the same way whatever the pressure, and so does a slab."""
    molecule, crystal = CLUSTER.copy(), bulk("O", "fcc", a=2.0, cubic=True)
    slab = bulk("O", "fcc", a=1.9, cubic=True)
    slab.pbc[2] = False
    starts = [molecule, crystal, slab]
    groups = tuple(WalkerGroup(temperature=50.0, count=3, pressure=pressure) for pressure in (0.0, 20.0))
    runner = explorer(
        np.float32, smooth_morse, CRYSTAL_CUTOFF, integrator=integrator, walkers=groups, steps=100, chunk=100
    )
    # the same random numbers under both pressures
    found = runner.run(PARAMS, [*starts, *starts], QUIET, jax.random.key(0), numbers=[0, 1, 2, 0, 1, 2])
    assert set(found.status) <= {Status.COMPLETED, Status.CONVERGED}
    for one, other, start in zip(found.final[:3], found.final[3:], starts, strict=True):
        moved = start is crystal
        assert np.allclose(one.cell.array, start.cell.array, atol=1e-6) == (not moved)
        assert np.array_equal(one.positions, other.positions) == (not moved)


def test_a_strain_keeps_fractional_coordinates_and_phase_space():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        strain = 0.05 * rng.normal(size=(1, 3, 3))
        strain = jnp.asarray(strain + np.swapaxes(strain, 1, 2))
        position, momentum, cell = (jnp.asarray(rng.normal(size=(1, n, 3))) for n in (4, 4, 3))
        before = Motion(position, momentum, momentum, jnp.ones((1, 4, 1)), None, cell, cell)
        after = strained(before, strain)
        fractional = [np.linalg.solve(m.cell[0].T, m.position[0].T) for m in (before, after)]
        np.testing.assert_allclose(*fractional, atol=1e-7)
        np.testing.assert_allclose(np.sum(after.position * after.momentum), np.sum(position * momentum), atol=1e-7)
        growth = np.linalg.det(after.cell[0]) / np.linalg.det(cell[0])
        assert np.log(growth) == pytest.approx(float(np.trace(strain[0])), rel=1e-6)


def test_fire_finds_a_minimum():
    runner = explorer(integrator=FireSettings(largest_force=2e-3), steps=1000, chunk=250)
    squeezed = [Atoms("O6", factor * CLUSTER.positions) for factor in (0.9, 1.1, 1.3)]
    found = runner.run(PARAMS, squeezed, QUIET, jax.random.key(0))
    assert set(found.status) == {Status.CONVERGED}
    for frame, step in zip(found.final, found.end_step, strict=True):
        assert 10 < step < 1000
        assert np.linalg.norm(pair_energy(frame.positions)[1], axis=1).max() < 3e-3
    assert not found.temperature.any() or np.nanmax(found.temperature) == 0
    assert found.share_below == pytest.approx(1.0, abs=0.02)


def test_a_structure_whose_atoms_are_all_fixed_is_relaxed():
    at = moment(kt=1.0, timestep=0.1, freedom=1, numbers=FireSettings().numbers())
    at = at.replace(mobile=jnp.zeros((1, 6), bool))
    still = jnp.zeros((1, 6, 3))
    motion = Motion(still + 1, still, still, jnp.ones((1, 6, 1)), None, jnp.eye(3)[None], jnp.zeros((1, 3, 3)))
    fire = FireSettings().build()
    moved = fire.to_force(motion.set(extra=fire.init(motion, at)), at, 0)
    np.testing.assert_array_equal(moved.position, motion.position)
    assert fire.converged(moved, at).all()


def test_the_ascent_is_the_gradient_of_what_is_to_be_maximised():
    kt, depths = 0.05, np.array([3.0, 4.0, 5.5])
    positions = CLUSTER.positions + 0.05 * np.random.default_rng(0).normal(size=(6, 3))

    def objective(x: np.ndarray) -> float:
        energies = np.array([pair_energy(x, depth)[0] for depth in depths])
        return float(-energies.mean() / kt + np.log(energies.var()))

    with jax.enable_x64(True):
        both = [pair_energy(positions, depth)[:2] for depth in depths]
        evaluation = Evaluation(
            energy=None,
            forces=None,
            virial=None,
            member_energy=jnp.asarray([[e] for e, _ in both]),
            member_forces=jnp.asarray([[f] for _, f in both]),
        )
        found = np.asarray(ascent_direction(evaluation, moment(kt, 0.1, 15, {})))[0]
    for i, axis in ((0, 0), (3, 1), (5, 2)):
        step = np.zeros_like(positions)
        step[i, axis] = 1e-5
        slope = (objective(positions + step) - objective(positions - step)) / 2e-5
        assert found[i, axis] == pytest.approx(slope, rel=1e-6)


def test_adversarial_search_climbs_and_is_bounded_by_the_energy():
    groups = (WalkerGroup(temperature=300.0), WalkerGroup(temperature=3000.0), WalkerGroup(temperature=10_000.0))
    runner = explorer(walkers=groups, integrator=AdversarialSettings(rate=0.01), steps=300, chunk=300)
    found = runner.run(PARAMS, [dimer()] * 3, QUIET, jax.random.key(0))
    std = found.scores["energy_std"][-50:].mean(axis=0)
    # E = depth (1 - exp(..))^2 and sigma are proportional here: the maximum of -E/kT + 2 ln sigma is at E = 2 kT
    np.testing.assert_allclose(found.energy[-50:].mean(axis=0), 2 * KB * np.array([300, 3000, 10_000]), rtol=0.1)
    assert std[0] < std[1] < std[2]


def test_swaps_sample_the_arrangements_of_a_chain():
    """Frozen atoms A A B in a row: the middle is taken with its Boltzmann weight."""

    def unlike(params: jax.Array, graph: Graph) -> Prediction:
        def energies(vectors: jax.Array) -> jax.Array:
            near = jnp.sum(vectors**2, axis=-1) < 1.2**2
            other = graph.species[:, None] != graph.species[graph.neighbors]
            bonds = jnp.where(graph.edge_mask & near & other, 0.5, 0)
            return sum_over_atoms(jnp.sum(bonds, axis=1), graph)

        energy = params[:, None] * energies(graph.vectors)
        none = jnp.zeros((len(params), *graph.vectors.shape[:1], 3), energy.dtype)
        virial = jnp.zeros((*energy.shape, 3, 3), energy.dtype)
        return Prediction(energy=energy, forces=none, virial=virial, features=none)

    walkers, bond, kelvin = 64, 0.03, 300.0
    runner = explorer(
        evaluate=unlike,
        cutoff=1.5,
        walkers=(WalkerGroup(temperature=kelvin, count=walkers),),
        integrator=NveSettings(),
        swaps=SwapSettings(every=2),
        timestep=1e-6,
        steps=800,
        chunk=400,
        trajectory_every=8,
    )
    start = Atoms("OOH", [[0, 0, 0], [1, 0, 0], [2, 0, 0]])
    found = runner.run(bond * jnp.ones(2), [start] * walkers, QUIET, jax.random.key(0))
    middle = np.array([[abs(f.positions[2, 0] - 1) < 0.1 for f in one[5:]] for one in found.trajectories])
    weights = np.exp(-np.array([1, 2, 1]) * bond / (KB * kelvin))  # B at an end has one unlike bond, in the middle two
    expected = weights[1] / weights.sum()
    error = middle.mean(axis=1).std() / np.sqrt(walkers)
    assert abs(middle.mean() - expected) < 3 * error
    for one in found.trajectories[:4]:
        assert sorted(np.round(one[-1].positions[:, 0], 2)) == [0, 1, 2]


def test_atoms_under_a_constraint_do_not_move():
    held = CLUSTER.copy()
    held.set_constraint(FixAtoms([0, 3]))
    held.set_masses(2 * CLUSTER.get_masses())
    small = CLUSTER[:4]  # padded, its fixed atom counted from the end
    small.set_constraint(FixAtoms([-1]))
    runner = explorer(integrator=LangevinSettings(friction=0.05), steps=400, chunk=200, remove_drift=True)
    found = runner.run(PARAMS, [held, CLUSTER, small], QUIET, jax.random.key(0))
    np.testing.assert_allclose(found.final[0].positions[[0, 3]], CLUSTER.positions[[0, 3]], atol=1e-6)
    assert np.abs(found.final[0].positions - CLUSTER.positions)[[1, 2, 4, 5]].min() > 1e-4
    assert not found.final[0].get_momenta()[[0, 3]].any() and not found.final[2].get_momenta()[3].any()
    drifts = [np.abs(frame.get_momenta().sum(axis=0)).max() for frame in found.final]
    assert drifts[1] < 1e-4 and min(drifts[0], drifts[2]) > 0.1, "beside fixed atoms nothing drifts"
    for frame in (found.final[0], found.trajectories[0][-1]):  # so that ase counts their degrees of freedom
        assert frame.constraints[0].todict() == FixAtoms([0, 3]).todict()
        np.testing.assert_array_equal(frame.get_masses(), held.get_masses())
    temperature = found.trajectories[0][-1].get_temperature()
    np.testing.assert_allclose(temperature, found.temperature[-1, 0], rtol=1e-4)
    assert not found.final[1].constraints


def test_fixed_atoms_keep_every_digit_of_their_places():
    """Single precision holds 4e-6 Angstrom of 50; where a fixed atom seems to lie elsewhere nothing can start there."""
    held = CLUSTER.copy()
    held.positions += 50 + 1 / 3
    held.set_constraint(FixAtoms([0, 3]))
    found = explorer(integrator=LangevinSettings(friction=0.05), steps=40, trajectory_every=20).run(
        PARAMS, [held] * 3, QUIET, jax.random.key(0)
    )
    for frame in (found.final[0], found.trajectories[0][-1]):
        np.testing.assert_array_equal(frame.positions[[0, 3]], held.positions[[0, 3]])
        assert begins_alike(held, frame) and np.abs(frame.positions - held.positions)[1].max() > 1e-4


def test_drift_is_removed_where_asked():
    """Two atoms beside a fixed one keep the momentum that the fixed one gives them, and their temperature."""
    held = Atoms("O3", [[0, 0, 0], [0, 0, 1], [0, 0, 2]], constraint=FixAtoms([0]))
    runner = explorer(integrator=LangevinSettings(friction=0.05), steps=4000, chunk=1000, remove_drift=True)
    found = runner.run(PARAMS, [CLUSTER, CLUSTER, held], QUIET, jax.random.key(0))
    for frame in found.final[:2]:
        assert np.abs(frame.get_momenta().sum(axis=0)).max() < 1e-4
    assert np.abs(found.final[2].get_momenta().sum(axis=0)).max() > 0.1
    np.testing.assert_allclose(found.temperature[500:].mean(axis=0), 300, rtol=0.15)
    with pytest.raises(InputError, match="every start structure has fixed atoms, beside which nothing drifts"):
        runner.run(PARAMS, [held] * 3, QUIET, jax.random.key(0))
    runner.begin(PARAMS, [held] * 3, QUIET, jax.random.key(0), numbers=range(3))  # others may drift in other programs
    assert np.ptp(found.final[0].positions, axis=0).max() < CUTOFF
