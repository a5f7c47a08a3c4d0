"""The compiled exploration against theory, against a slow loop, and in trouble.

The committee is analytic: members are Morse potentials of slightly different depth, so that energy, forces and spread
are known functions of the positions.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import (
    CUTOFF,
    DEPTH,
    LENGTH,
    PARAMS,
    QUIET,
    SPECIES,
    WIDTH,
    context,
    dimer,
    explorer,
    morse,
    observed,
    settings,
)
from ase import Atoms
from ase.constraints import FixAtoms
from scipy import stats

from almlip_jax.dynamics import Cause, ExplorationSettings, Explorer, Knowledge, SanitySettings, Status, WalkerGroup
from almlip_jax.dynamics.gates import AdaptiveGate, Decision, RunningMeanGate
from almlip_jax.dynamics.integrators import LangevinSettings, NveSettings, SwapSettings
from almlip_jax.dynamics.sanity import (
    SanityLimits,
    parts_of_tree,
    spanning_tree,
    spanning_tree_of_edges,
    unphysical_cause,
)
from almlip_jax.dynamics.seen import MOST_STEPS
from almlip_jax.ensembles import Prediction
from almlip_jax.errors import InputError
from almlip_jax.structures.graph import Graph
from almlip_jax.structures.walkers import Room, walker_neighbors
from almlip_jax.units import KB


@pytest.fixture(scope="module")
def shared() -> Explorer:
    """Three walkers at 300 K, 200 steps; compiled once for many tests."""
    return explorer()


def test_nve_conserves_energy_to_second_order():
    drifts = []
    with jax.enable_x64(True):
        for timestep in (0.5, 0.25):
            steps = int(100 / timestep)
            runner = explorer(
                np.float64, integrator=NveSettings(), timestep=timestep, steps=steps, chunk=steps, trajectory_every=1
            )
            found = runner.run(PARAMS, [dimer(1.05)] * 3, QUIET, jax.random.key(0))
            total = []
            for frame, temperature in zip(found.trajectories[0], found.temperature[:, 0], strict=True):
                distance = frame.get_distance(0, 1)
                kinetic = 1.5 * KB * temperature  # two atoms, centre of mass at rest
                total.append(DEPTH * (1 - np.exp(-WIDTH * (distance - LENGTH))) ** 2 + kinetic)
            drifts.append(np.ptp(total))
    assert drifts[0] < 5e-3
    assert 3.0 < drifts[0] / drifts[1] < 5.0


def test_langevin_samples_the_canonical_ensemble():
    """Kinetic energies follow chi-squared, and a stiff bond's length has the harmonic variance kT / k."""
    runner = explorer(
        walkers=(WalkerGroup(temperature=150.0, count=64),),
        steps=4000,
        chunk=2000,
        trace_every=40,
        trajectory_every=40,
        integrator=LangevinSettings(friction=0.1),
    )
    found = runner.run(PARAMS, [dimer()] * 64, QUIET, jax.random.key(3))
    temperature = found.temperature[20:]
    # 6 degrees of freedom: the distribution of 6 T / T0 is chi-squared with 6 degrees of freedom
    sample = 6 * temperature[::4].ravel() / 150.0
    error = temperature.mean(axis=0).std() / np.sqrt(64)
    assert abs(temperature.mean() - 150.0) < 3 * error + 0.5
    assert stats.kstest(sample, stats.chi2(6).cdf).pvalue > 1e-3
    lengths = np.array([[f.get_distance(0, 1) for f in one[20:]] for one in found.trajectories])
    stiffness = 2 * DEPTH * WIDTH**2
    variance = lengths.var(axis=1).mean()
    spread = lengths.var(axis=1).std() / np.sqrt(64)
    # the anharmonic correction of a Morse bond at this temperature is about one percent
    assert abs(variance - KB * 150 / stiffness) < 3 * spread + 0.02 * variance


def test_the_gate_stops_at_the_exact_step(shared):
    """Equal to looking at every step by hand: the stop is the first step whose score exceeds the threshold."""
    key = jax.random.key(7)
    free = shared.run(PARAMS, [dimer()] * 3, QUIET, key)
    score = free.scores["force_std_max"]
    stop = float(np.quantile(score.max(axis=0), 0.4))
    record = 0.6 * stop
    gated = shared.run(PARAMS, [dimer()] * 3, (record, stop), key)
    for w in range(3):
        above = np.flatnonzero(score[:, w] > stop)
        if len(above):
            assert gated.status[w] is Status.STOPPED and gated.end_step[w] == above[0] + 1
            ended = above[0] + 1
        else:
            assert gated.status[w] is Status.COMPLETED and gated.end_step[w] == -1
            ended = 200
        np.testing.assert_array_equal(gated.scores["force_std_max"][:ended, w], score[:ended, w])
        assert np.isnan(gated.scores["force_std_max"][ended:, w]).all()
        # recorded: every frame above that is far enough from the last one, and the frame that stopped the walker
        expected, last = [], -(10**9)
        for step in range(1, ended + 1):
            value = score[step - 1, w]
            if value > stop or (value > record and step - last >= gated_every()):
                expected.append(step)
                last = step
        assert [f.info["step"] for f in gated.recorded if f.info["walker"] == w] == expected
    assert any(s is Status.STOPPED for s in gated.status)
    below = sum((score[: (gated.end_step[w] if gated.end_step[w] > 0 else 200), w] <= record).sum() for w in range(3))
    assert gated.share_below == pytest.approx(below / 600)


def gated_every() -> int:
    return settings().record_every


def test_recorded_frames_have_the_scores_they_say(shared):
    found = shared.run(PARAMS, [dimer()] * 3, (0.05, 1e4), jax.random.key(1))
    assert len(found.recorded) > 5
    for frame in found.recorded:
        distance = frame.get_distance(0, 1)
        pull = 2 * WIDTH * (1 - np.exp(-WIDTH * (distance - LENGTH))) * np.exp(-WIDTH * (distance - LENGTH))
        spread = abs(pull) * float(np.std(PARAMS))
        assert frame.info["force_std_max"] == pytest.approx(spread, rel=2e-3, abs=1e-4)
        np.testing.assert_allclose(frame.arrays["force_std"], spread, rtol=2e-3, atol=1e-4)
        assert frame.info["charge"] == -1 and frame.info["force_std_max"] > 0.05


def test_frames_are_recorded_after_a_billion_steps(shared):
    """Where the counters of steps come near their ends, in 32 bits."""
    session = shared.begin(PARAMS, [dimer()] * 3, (1e-4, 1e4), jax.random.key(1))
    late, longest = jnp.asarray(1_500_000_000, jnp.int32), jnp.asarray(MOST_STEPS, jnp.int32)
    state, setup = replace(session.state, step=late), replace(session.setup, steps=longest)
    state, _ = session._run_chunk(session.params, state, setup)
    assert np.all(np.asarray(state.recorder.offered) > 1)


def test_chunks_change_nothing(shared):
    key, starts = jax.random.key(2), [dimer()] * 3
    whole = shared.run(PARAMS, starts, (0.3, 2.0), key)
    pieces = explorer(chunk=50).run(PARAMS, starts, (0.3, 2.0), key)
    np.testing.assert_array_equal(whole.scores["force_std_max"], pieces.scores["force_std_max"])
    assert [f.info["step"] for f in whole.recorded] == [f.info["step"] for f in pieces.recorded]
    for a, b in zip(whole.final, pieces.final, strict=True):
        np.testing.assert_array_equal(a.positions, b.positions)


def test_walkers_of_other_size_and_fate_do_not_matter():
    """A walker gives the same trajectory beside larger ones and beside one that explodes."""
    water = Atoms("OH2", [[0, 0, 0], [0.95, 0, 0], [0, 0.95, 0]])
    key = jax.random.key(4)
    beside_water = explorer().run(PARAMS, [dimer(), water, dimer(0.2)], QUIET, key)
    alone = explorer().run(PARAMS, [dimer(), dimer(), dimer()], QUIET, key)
    np.testing.assert_allclose(
        beside_water.scores["force_std_max"][:, 0], alone.scores["force_std_max"][:, 0], rtol=1e-3, atol=1e-4
    )
    assert beside_water.final[1].positions.shape == (3, 3)


def test_unphysical_frames_are_never_recorded():
    strict = SanitySettings(closest_contact=0.7, max_force=1e4, max_temperature=1e6, bond_factor=2.0)
    runner = explorer(sanity=strict, steps=400, chunk=200)
    apart = Atoms("OH", [[0, 0, 0], [0, 0, 1.85]])
    fly = apart.copy()
    found = runner.run(PARAMS, [dimer(0.42), fly, dimer()], (1e-4, 1e4), jax.random.key(5))
    assert found.status[0] is Status.UNPHYSICAL and found.cause[0] is Cause.CLOSE_CONTACT
    for frame in found.recorded:
        assert frame.get_distance(0, 1) > 0.7 * (0.31 + 0.66) and np.isfinite(frame.positions).all()
    assert not [f for f in found.recorded if f.info["walker"] == 0]
    assert np.isfinite(found.final[0].positions).all()


def test_not_a_number_ends_a_walker_and_no_other(shared):
    broken = dimer()
    broken.positions[1] = broken.positions[0]
    found = shared.run(PARAMS, [dimer(), broken, dimer()], QUIET, jax.random.key(0))
    assert found.status[1] is Status.UNPHYSICAL
    assert found.status[0] is found.status[2] is Status.COMPLETED


def test_a_full_buffer_ends_a_walker():
    found = explorer(buffer=3, record_every=5).run(PARAMS, [dimer()] * 3, (1e-6, 1e4), jax.random.key(0))
    assert all(s is Status.BUFFER_FULL for s in found.status)
    assert [f.info["step"] for f in found.recorded if f.info["walker"] == 1] == [1, 6, 11]
    assert list(found.end_step) == [16, 16, 16]


def test_nothing_compiles_in_the_next_run(shared, count_compilations):
    shared.run(PARAMS, [dimer()] * 3, (0.3, 2.0), jax.random.key(0))
    with count_compilations() as compiled:
        shared.run(1.1 * np.asarray(PARAMS), [dimer(1.1)] * 3, (0.2, 1.0), jax.random.key(9))
    assert not compiled


def test_other_numbers_in_another_explorer_need_no_other_program(count_compilations):
    """Whatever is a number in the settings of what lives in the loop: thresholds, windows, times, strengths."""

    def found(window, persistence, friction, centre, least, limit, **more):
        bond = {"kind": "distance", "points": [0, 1]}
        options = settings(steps=60, **more).model_dump(mode="json") | {
            "gate": {"kind": "adaptive", "window": window, "excess": 0.1 * least, "persistence": persistence,
                     "release": least},
            "integrator": {"kind": "langevin", "friction": friction},
            "biases": [{"kind": "restraint", "variable": bond, "stiffness": 1.0, "centre": centre},
                       {"kind": "uncertainty", "relative": least, "window": window}],
            "admission": {"kind": "farthest", "least_distance": least},
            "sanity": {"max_force": limit, "max_temperature": limit},
            "swaps": {"every": window},
        }  # fmt: skip
        rows = 0.01 * np.random.default_rng(0).normal(size=(20, 18)).astype(np.float32)
        options = ExplorationSettings.model_validate(options)
        knowledge = Knowledge(context=options.admission.context(rows, 0))
        runner = Explorer(morse, SPECIES, CUTOFF, options)
        starts = [dimer()] * 3
        return runner.run(PARAMS, starts, (0.01 * least, limit), jax.random.key(0), knowledge=knowledge)

    one = found(10, 2, 0.01, 1.0, 0.2, 1e3)
    with count_compilations() as compiled:
        other = found(20, 3, 0.02, 1.05, 0.4, 2e3, record_every=7, timestep=0.4)
    assert not compiled
    assert np.all(one.energy[-1] != other.energy[-1])


def test_one_evaluation_a_step():
    """The ensemble is called once to start with and once in each step, and nowhere else; what is traced is shared.

    Devices that share the walkers out call it for their own.
    """
    traced, called = [], []

    def counted(params: jax.Array, graph: Graph) -> Prediction:
        traced.append(graph.vectors.shape)
        jax.debug.callback(lambda: called.append(1))
        return morse(params, graph)

    run = Explorer(counted, SPECIES, CUTOFF, settings()).run(PARAMS, [dimer()] * 3, QUIET, jax.random.key(0))
    jax.effects_barrier()
    shares = -(-6 // traced[0][0])
    assert len(traced) == 1 and len(called) == shares * (1 + run.steps)


def test_walkers_in_blocks_move_as_all_at_once(monkeypatch):
    """Two blocks, of which the second is not full."""
    starts = [dimer(length) for length in (1.0, 1.05, 0.95)]
    options = settings(steps=40, chunk=20, trajectory_every=20)
    with jax.enable_x64(True):

        def run():
            runner = Explorer(lambda *given: morse(*given), SPECIES, CUTOFF, options, dtype=np.float64)
            return runner.run(PARAMS, starts, QUIET, jax.random.key(0))

        flat = run()
        monkeypatch.setattr("almlip_jax.ensembles.blocks._ATOMS", 4)
        parts = run()
    for found, wanted in zip(parts.final, flat.final, strict=True):
        np.testing.assert_allclose(found.positions, wanted.positions, rtol=1e-9)
    for name, wanted in flat.scores.items():
        np.testing.assert_allclose(parts.scores[name], wanted, rtol=1e-6, atol=1e-10)


@pytest.mark.slow
def test_neighbour_overflow_is_as_if_nothing_had_happened():
    """A cluster that contracts outgrows its list: the chunk is done again with more room."""
    grid = np.stack(np.meshgrid(*[np.arange(4)] * 3), axis=-1).reshape(-1, 3)
    cluster = Atoms("H64", 1.7 * grid)
    options = settings(walkers=(WalkerGroup(temperature=50.0, count=1),), steps=150, chunk=50, skin=0.3)
    small = Explorer(morse, SPECIES, 2.2, options)
    found = small.run(0.02 * PARAMS, [cluster], QUIET, jax.random.key(0))
    roomy = Explorer(morse, SPECIES, 2.2, options, room=Room(63))
    expected = roomy.run(0.02 * PARAMS, [cluster], QUIET, jax.random.key(0))
    np.testing.assert_allclose(found.final[0].positions, expected.final[0].positions, atol=2e-3)
    assert found.status[0] is Status.COMPLETED


@pytest.mark.slow
def test_bins_and_pairs_give_one_trajectory(monkeypatch: pytest.MonkeyPatch):
    """A contracting cluster in double precision: its list outgrows its room whether bins or all pairs are searched."""
    grid = np.stack(np.meshgrid(*[np.arange(5)] * 3), axis=-1).reshape(-1, 3)
    cluster = Atoms("H125", 1.7 * grid)
    options = settings(walkers=(WalkerGroup(temperature=50.0, count=1),), steps=150, chunk=50, skin=0.3)
    runs = []
    with jax.enable_x64(True):
        for many in (10**6, 1):
            monkeypatch.setattr("almlip_jax.structures.walkers._MANY", many)
            runner = Explorer(morse, SPECIES, 2.2, options, dtype=np.float64)
            start = runner.begin(0.02 * PARAMS, [cluster], QUIET, jax.random.key(0)).state.neighbors.room
            runs.append(runner.run(0.02 * PARAMS, [cluster], QUIET, jax.random.key(0)))
            assert (runner.room.bins is not None) == (many == 1)
            assert runner.room.capacity > start.capacity
    np.testing.assert_allclose(runs[0].final[0].positions, runs[1].final[0].positions, atol=1e-8)


def test_fragments_are_connected_components():
    rng = np.random.default_rng(0)
    radii = jnp.asarray([0.5, 0.7])
    for _ in range(20):
        positions = rng.uniform(0, 6, size=(1, 12, 3))
        mask = np.arange(12) < rng.integers(1, 13)
        atoms = jnp.asarray(positions), jnp.zeros((1, 12), int), jnp.asarray(mask)[None], radii
        found = parts_of_tree(spanning_tree(*atoms), *atoms, jnp.asarray(2.0))
        near = np.linalg.norm(positions[0][:, None] - positions[0][None], axis=-1) < 2.0
        near &= mask[:, None] & mask[None]
        unseen, parts = set(np.flatnonzero(mask)), 0
        while unseen:
            parts, queue = parts + 1, [unseen.pop()]
            while queue:
                for other in [j for j in unseen if near[queue[0], j]]:
                    unseen.discard(other)
                    queue.append(other)
                queue.pop(0)
        assert int(found[0]) == parts


def test_trees_of_edges_are_those_of_all_pairs():
    """As long in all, in two walkers at random or on a grid of equal distances, whole or far apart; padding alone."""
    rng, radii = np.random.default_rng(1), jnp.asarray([0.5, 0.7])
    grid = np.stack(np.meshgrid(*[np.arange(3.0)] * 3), axis=-1).reshape(-1, 3)
    of_pairs, of_edges = jax.jit(spanning_tree), jax.jit(spanning_tree_of_edges, static_argnums=1)
    parts = jax.jit(parts_of_tree)
    for spread in (2.0, 5.0, 20.0):
        positions = np.stack([rng.uniform(0, spread, size=(27, 3)), grid * spread / 4]).astype(np.float32)
        mask = np.arange(27) < np.array([[int(rng.integers(1, 28))], [27]])
        species = jnp.asarray(rng.integers(0, 2, size=(2, 27))) * np.array([[1], [0]])
        open_cells = np.zeros((2, 3, 3)), np.zeros((2, 3), bool)
        neighbors = walker_neighbors(positions, *open_cells, mask, 2.9, 0.0, Room(26))
        graph = neighbors.graph(jnp.asarray(positions), species, jnp.zeros(2), jnp.ones(2))
        atoms = jnp.asarray(positions), species, jnp.asarray(mask), radii
        for factor in (0.3, 1.0, 1.5, 2.0):  # bonds of up to 2.8 Angstrom
            pairs, edges = (parts(tree, *atoms, factor) for tree in (of_pairs(*atoms), of_edges(graph, 2, radii)))
            np.testing.assert_array_equal(edges, pairs)


def test_adaptive_gate_follows_the_running_mean():
    gate = RunningMeanGate("energy_std", window=10, excess=0.5)
    state, mean, weight = gate.init(context([0.0], [100.0])), 0.0, 0.0
    for value in [1.0, 1.2, 0.9, 2.0, 1.0, 1.7, 4.0, 3.0]:
        expected = weight > 0 and value > 1.5 * mean / weight
        decision, state = gate.apply(state, observed("energy_std", value))
        if weight > 0:
            assert (int(decision[0]) == Decision.RECORD) == expected
        mean, weight = 0.9 * mean + 0.1 * value, 0.9 * weight + 0.1
    found = explorer(gate=AdaptiveGate()).run(PARAMS, [dimer()] * 3, (0.01, 1e4), jax.random.key(0))
    assert found.recorded


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({}, Cause.NONE),
        ({"finite": jnp.asarray([False])}, Cause.NOT_FINITE),
        ({"closest_contact": jnp.asarray([0.3])}, Cause.CLOSE_CONTACT),
        ({"max_force": jnp.asarray([51.0])}, Cause.LARGE_FORCE),
        ({"temperature": jnp.asarray([1900.0])}, Cause.HOT),
        ({"new_fragments": jnp.asarray([1])}, Cause.DISSOCIATED),
    ],
)
def test_each_check_has_its_cause(changes, cause):
    found = unphysical_cause(observed("energy_std", 1.0, **changes), SanityLimits.of(SanitySettings()))
    assert int(found[0]) == cause


def test_few_atoms_are_hot_by_chance_and_no_walker_ends_by_it(shared):
    """Six times the temperature of the bath is common for one atom (chi-squared), and as rare as can be for five."""
    freedom = np.array([3.0, 6.0, 9.0, 15.0, 300.0])
    limits = np.asarray(SanityLimits.of(SanitySettings(), freedom).max_temperature)
    np.testing.assert_allclose(np.log10(stats.chi2.sf(limits * freedom, freedom))[:4], -12, atol=0.01)
    np.testing.assert_allclose(limits[3:], 6, rtol=1e-6)
    held = dimer()
    held.set_constraint(FixAtoms([0]))
    setup = shared.begin(PARAMS, [dimer(), held, dimer()], QUIET, jax.random.key(0)).setup
    np.testing.assert_allclose(setup.limits.max_temperature, 1000 / 6 * limits[[1, 0, 1]], rtol=1e-5)


def test_atoms_may_leave_the_cell():
    """Whichever image a walker starts from, it moves in the same way, through the faces of the cell too."""
    grid = 2.0 * np.stack(np.meshgrid(*[np.arange(3)] * 3), axis=-1).reshape(-1, 3)
    crystal = Atoms("H27", grid + 0.01, cell=6 * np.eye(3) + 0.4 * np.eye(3, k=1), pbc=True)
    images = np.random.default_rng(0).integers(-2, 3, size=(27, 3)) @ crystal.cell.array
    elsewhere = crystal.copy()
    elsewhere.positions += images
    options = settings(
        walkers=(WalkerGroup(temperature=300.0, count=2),), integrator=NveSettings(), steps=100, chunk=50
    )
    with jax.enable_x64(True):
        runner = Explorer(morse, SPECIES, 2.5, options, dtype=np.float64)
        here = runner.run(0.1 * PARAMS, [crystal, crystal], QUIET, jax.random.key(0))
        there = runner.run(0.1 * PARAMS, [elsewhere, elsewhere], QUIET, jax.random.key(0))
    for one, other in zip(here.final, there.final, strict=True):
        fractional = one.cell.scaled_positions(one.positions)
        assert np.any(fractional < 0) and here.status[0] is Status.COMPLETED
        np.testing.assert_allclose(other.positions - images, one.positions, atol=1e-8)


@pytest.mark.parametrize(("elements", "fixed"), [((), []), (("O", "F"), []), ((), [-1])])
def test_swaps_of_nothing_are_refused(elements, fixed):
    """Every trial would exchange an atom with itself."""
    runner = Explorer(morse, SPECIES, CUTOFF, settings(swaps=SwapSettings(every=5, elements=elements)))
    alike = dimer() if elements or fixed else Atoms("O2", dimer().positions)
    alike.set_constraint(FixAtoms(fixed) if fixed else None)
    with pytest.raises(InputError, match="no start structure holds two elements.* that may move"):
        runner.begin(PARAMS, [alike] * 3, (1.0, 2.0), jax.random.key(0))
