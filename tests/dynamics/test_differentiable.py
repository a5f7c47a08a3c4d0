"""Gradients through a trajectory against finite differences."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import DEPTH, LENGTH, PARAMS, QUIET, WIDTH, explorer
from ase import Atoms
from ase.build import bulk
from ase.neighborlist import neighbor_list

from almlip_jax.dynamics import WalkerGroup
from almlip_jax.dynamics.biases import UncertaintySettings
from almlip_jax.dynamics.differentiable import rollout
from almlip_jax.dynamics.integrators import LangevinSettings, NptSettings

STEPS = 30
WATER = Atoms("OH2", [[0, 0, 0], [0.95, 0.1, 0], [0, 0.9, 0.1]])


@pytest.fixture(scope="module")
def pieces():
    """Value and gradient of the largest spread at the end, as functions of momenta, temperature and bias strength."""
    with jax.enable_x64(True):
        runner = explorer(
            np.float64,
            integrator=LangevinSettings(friction=0.02),
            biases=(UncertaintySettings(tau=0.3),),
            steps=STEPS,
        )
        session = runner.begin(PARAMS, [WATER] * 3, QUIET, jax.random.key(0))
        loop = runner.loop(find_fragments=False)

        def objective(momentum: jax.Array, kt: jax.Array, strength: jax.Array) -> jax.Array:
            state = replace(session.state, motion=session.state.motion.set(momentum=momentum))
            setup = replace(session.setup, drive=replace(session.setup.drive, kt=kt), strength=strength)
            found = rollout(loop, session.params, state, setup, STEPS)
            return jnp.sum(found.scores["force_std_max"][-1] * jnp.asarray([1.0, 2.0, 3.0]))

        at = (session.state.motion.momentum, session.setup.drive.kt, session.setup.strength)
        yield jax.jit(objective), jax.jit(jax.grad(objective, argnums=(0, 1, 2)))(*at), at, session, runner, loop


@pytest.mark.parametrize(("argument", "index"), [(0, (0, 0, 1)), (0, (2, 1, 0)), (1, (1, 0)), (1, (2, 1)), (2, (1,))])
def test_gradients_are_those_of_finite_differences(pieces, argument, index):
    objective, gradient, at, *_ = pieces
    with jax.enable_x64(True):
        values = []
        width = 1e-5 * (1 if argument != 1 else 0.01)
        for sign in (1, -1):
            arguments = list(at)
            arguments[argument] = at[argument].at[index].add(sign * width)
            values.append(float(objective(*arguments)))
        slope = (values[0] - values[1]) / (2 * width)
    assert float(gradient[argument][index]) == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_the_trajectory_is_that_of_the_exploration(pieces):
    *_, session, runner, loop = pieces
    with jax.enable_x64(True):
        found = jax.jit(lambda s: rollout(loop, session.params, s, session.setup, STEPS))(session.state)
        expected = runner.run(PARAMS, [WATER] * 3, QUIET, jax.random.key(0))
    np.testing.assert_allclose(found.scores["force_std_max"], expected.scores["force_std_max"], rtol=1e-9)
    np.testing.assert_allclose(found.motion.position[0], expected.final[0].positions, atol=1e-9)
    assert bool(found.listed)


def test_cells_move_in_a_rollout_too():
    """The last energy is that of the last positions in the last cell; a list that a squeezed cell outgrows says so.

    Beyond the steps that were planned a ramp stays at its end, here just above 0 K.
    """
    crystal = bulk("O", "fcc", a=4.2, cubic=True)
    walkers = tuple(WalkerGroup(temperature=(300.0, 1.0), pressure=pressure) for pressure in (0.0, 100.0))
    npt = NptSettings(barostat_time=10.0)
    runner = explorer(cutoff=3.2, walkers=walkers, integrator=npt, steps=2, skin=1.0)
    session = runner.begin(PARAMS, [crystal] * 2, QUIET, jax.random.key(0))
    loop = runner.loop(find_fragments=False)
    found = jax.jit(lambda s: rollout(loop, session.params, s, session.setup, 4))(session.state)
    end = crystal.copy()
    end.set_cell(found.motion.cell[0])
    end.positions = np.asarray(found.motion.position[0])
    assert abs(end.cell.volume / crystal.cell.volume - 1) > 1e-3
    bonds = neighbor_list("d", end, 3.2)
    energy = 0.5 * DEPTH * np.sum((1 - np.exp(-WIDTH * (bonds - LENGTH))) ** 2)
    np.testing.assert_allclose(found.energy[-1, 0], energy, rtol=1e-5)
    assert not found.listed
