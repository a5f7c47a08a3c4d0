"""Relaxed starts: downhill on the mean potential, as far as the gate and sanity of the exploration let them."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from analytic import CUTOFF, DEPTH, LENGTH, PARAMS, SPECIES, WIDTH, dimer, morse, settings
from ase import Atoms
from ase.constraints import FixAtoms

from almlip_jax.dynamics import (
    Explorer,
    Knowledge,
    RelaxationSettings,
    Status,
    WalkerGroup,
    relax,
    relaxation_summary,
    relaxing,
)
from almlip_jax.dynamics.gates import AbsoluteGate
from almlip_jax.dynamics.integrators import FireSettings

FMAX = 0.02
SPREAD = float(np.std(PARAMS)) / DEPTH  # of the forces, relative to the mean force


@pytest.fixture(scope="module")
def relaxer() -> Explorer:
    """Compiled once, for three walkers of up to three atoms."""
    by_element = AbsoluteGate(species={"H": 1.0})  # so that the program tells elements apart
    chosen = relaxing(settings(chunk=50, gate=by_element), RelaxationSettings(fmax=FMAX, steps=300))
    return Explorer(morse, SPECIES, CUTOFF, chosen, atoms=3)


def mean_energy_and_force(atoms: Atoms) -> tuple[float, float]:
    """Mean energy, eV, and largest force on an atom that is not held, eV/Angstrom, of pairs in closed form."""
    energy, forces = 0.0, np.zeros((len(atoms), 3))
    for i in range(len(atoms)):
        for j in range(i):
            bond = atoms.positions[j] - atoms.positions[i]
            length = np.linalg.norm(bond)
            decay = np.exp(-WIDTH * (length - LENGTH))
            energy += DEPTH * (1 - decay) ** 2
            pull = 2 * DEPTH * WIDTH * (1 - decay) * decay * bond / length
            forces[i] += pull
            forces[j] -= pull
    for constraint in atoms.constraints:
        forces[constraint.get_indices()] = 0
    return energy, float(np.linalg.norm(forces, axis=1).max())


def water(length: float) -> Atoms:
    return Atoms("OHH", [[0, 0, 0], [length, 0, 0], [0, length, 0.1]], info={"charge": 1})


def test_forces_fall_below_fmax_and_the_energy_falls(relaxer: Explorer) -> None:
    held = water(1.2)
    held.set_constraint(FixAtoms([0]))
    origins = [water(0.85), held, dimer(1.4)]
    found = relax(relaxer, PARAMS, origins, 1e3, Knowledge())
    assert set(found.status) == {Status.CONVERGED} and relaxation_summary(found.status) == ""
    for start, origin in zip(found.structures, origins, strict=True):
        energy, force = mean_energy_and_force(start)
        before, steep = mean_energy_and_force(origin)
        assert force < FMAX * (1 + 1e-3) < steep and energy < before - 0.1
        assert start.info == origin.info and start.get_chemical_formula() == origin.get_chemical_formula()
    np.testing.assert_array_equal(found.structures[1].positions[0], 0)
    assert isinstance(found.structures[1].constraints[0], FixAtoms)


def test_the_gate_stops_what_leaves_the_known_and_the_frame_before_is_the_start(relaxer: Explorer) -> None:
    """On the way in from 3 Angstrom force and spread rise; the exploration without a gate shows which frame it was."""
    stop, far, other = 0.1, dimer(3.0), water(1.2)
    found = relax(relaxer, PARAMS, [far, dimer(1.2), other], [stop, stop, -np.inf], Knowledge())
    assert found.status == (Status.STOPPED,) * 3
    assert relaxation_summary(found.status) == "3 of 3 relaxations ended early: 3 by the gate."
    # the second begins beyond the threshold, and the third is told to stay
    for one, origin in zip(found.structures[1:], (dimer(1.2), other), strict=True):
        np.testing.assert_allclose(one.positions, origin.positions, atol=1e-6)
    assert SPREAD * mean_energy_and_force(found.structures[0])[1] <= stop
    assert 2.0 < found.structures[0].get_distance(0, 1) < 2.9
    strict = Knowledge(relative={"H": 0.5})  # as calibrated thresholds give
    halved = relax(relaxer, PARAMS, [far, dimer(1.2), other], [2 * stop, 2 * stop, -np.inf], strict)
    np.testing.assert_array_equal(halved.structures[0].positions, found.structures[0].positions)

    whole = relaxer.settings
    gated = relaxer.run(PARAMS, [far, far, other], (1e3, stop), jax.random.key(1))
    number = int(gated.end_step[0])

    def after(steps: int) -> Atoms:
        relaxer.settings = whole.model_copy(update={"steps": steps})
        return relaxer.run(PARAMS, [far, far, other], (1e3, 1e3), jax.random.key(1)).final[0]

    try:
        np.testing.assert_array_equal(after(number - 1).positions, found.structures[0].positions)
        assert SPREAD * mean_energy_and_force(after(number))[1] > stop
    finally:
        relaxer.settings = whole


def test_steps_that_do_not_suffice_are_taken_as_far_as_they_go(relaxer: Explorer) -> None:
    whole = relaxer.settings
    relaxer.settings = whole.model_copy(update={"steps": 3})
    try:
        found = relax(relaxer, PARAMS, [dimer(1.4)] * 3, 1e3, Knowledge())
    finally:
        relaxer.settings = whole
    assert set(found.status) == {Status.COMPLETED}
    # smaller structures take the room that the explorer keeps, and the program made for it
    begun = relaxer.begin(PARAMS, [dimer(1.4)] * 3, (1e3, 1e3), jax.random.key(0))
    assert begun.state.motion.position.shape == (3, 3, 3)
    assert found.structures[0].get_distance(0, 1) < 1.4
    assert relaxation_summary([*found.status, Status.CONVERGED]) == (
        "3 of 4 relaxations ended early: 3 as their steps were done."
    )


def test_what_is_taken_over_from_the_exploration() -> None:
    groups = (WalkerGroup(temperature=300.0, count=2, pressure=(1.0, 5.0), bias=0.3), WalkerGroup(temperature=600.0))
    exploration = settings(walkers=groups, rewind=None)
    full = relaxing(exploration, RelaxationSettings(cell="full", fmax=0.1, steps=7))
    assert full.integrator == FireSettings(cell="full", largest_force=0.1)
    assert [group.pressure for group in full.walkers] == [1.0, 0.0] and full.temperatures == exploration.temperatures
    assert (full.sanity, full.gate.score, full.steps) == (exploration.sanity, exploration.gate.score, 7)
    assert full.chunk == 7, "chunks of the exploration are longer than this relaxation"
    fixed = relaxing(exploration, RelaxationSettings())
    assert [group.pressure for group in fixed.walkers] == [0.0, 0.0]
