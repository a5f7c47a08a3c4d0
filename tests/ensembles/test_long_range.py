"""A model that reads positions, cells and charges: its forces, virials and dynamics against finite differences."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule

from almlip_jax.dynamics import ExplorationSettings, Explorer, SanitySettings, WalkerGroup
from almlip_jax.dynamics.integrators import NveSettings
from almlip_jax.ensembles import Ensemble, Prediction
from almlip_jax.models.base import AtomicOutput
from almlip_jax.structures.graph import Graph, lone_atom, sum_over_atoms
from almlip_jax.structures.packing import BatchShape, pack, plan_batches, take_batch
from almlip_jax.structures.species import SpeciesTable

SPECIES = SpeciesTable((1, 8, 11, 17))
CUTOFF = 3.0
COULOMB = 14.399645  # eV Angstrom
WAVES = np.array([[n, m, k] for n in (-1, 0, 1) for m in (-1, 0, 1) for k in (-1, 0, 1) if (n, m, k) != (0, 0, 0)])


@dataclass(frozen=True)
class Charges:
    """Springs between neighbours, and charges of the atoms that act on all of their structure.

    In a cell these are density waves, smeared so that those of the longest wavelengths are all; else pairs.  An atom's
    share of what the total charge leaves over is the same for all.
    """

    species: SpeciesTable = SPECIES
    cutoff: float = CUTOFF
    long_range: bool = True
    sees_state: bool = True
    small_members: bool = True
    local: bool = False

    @property
    def num_species(self) -> int:
        return len(self.species)

    def geometry(self, graph: Graph) -> tuple[jax.Array, jax.Array]:
        """Energies of the springs and of the charges, of each atom [A] eV."""
        squares = jnp.sum(graph.vectors**2, axis=-1)
        springs = jnp.sum(jnp.where(graph.edge_mask, (1 - squares / CUTOFF**2) ** 4, 0), axis=1)
        own = jnp.asarray([0.3, -0.6, 0.8, -0.8])[graph.species]
        counts = sum_over_atoms(jnp.ones_like(own), graph)
        rest = (graph.charge - sum_over_atoms(own, graph)) / jnp.maximum(counts, 1)
        charge = jnp.where(graph.atom_mask, own + rest[graph.structure], 0)
        return springs, jnp.where(graph.volume[graph.structure] == 1, _pairs(charge, graph), _waves(charge, graph))

    def init(self, key: jax.Array) -> dict[str, jax.Array]:
        return {"springs": 1 + 0.2 * jax.random.uniform(key), "charges": jnp.ones(())}

    def apply(self, params, geometry, graph) -> AtomicOutput:
        features = jnp.stack(geometry, axis=-1)
        return AtomicOutput(features @ jnp.stack([2 * params["springs"], params["charges"]]), features)


def _pairs(charge: jax.Array, graph: Graph) -> jax.Array:
    """``1/2 sum_j q_i q_j / sqrt(r_ij^2 + 1)`` over all other atoms of the structure, eV."""
    between = graph.positions[:, None] - graph.positions[None]
    together = (graph.structure[:, None] == graph.structure) & ~jnp.eye(len(charge), dtype=bool)
    inverse = jax.lax.rsqrt(jnp.sum(between**2, axis=-1) + 1)
    return 0.5 * COULOMB * charge * jnp.sum(jnp.where(together, inverse, 0) * charge, axis=1)


def _waves(charge: jax.Array, graph: Graph) -> jax.Array:
    """``2 pi / V sum_k exp(-k^2) / k^2 q_i Re(exp(-i k R_i) rho_k)`` of the waves along the shortest k, eV."""
    cell = jnp.where(graph.volume[:, None, None] == 1, jnp.eye(3), graph.cell)
    k = 2 * jnp.pi * WAVES @ jnp.swapaxes(jnp.linalg.inv(cell), 1, 2)  # [S, k, 3]
    square = jnp.sum(k**2, axis=-1)
    phase = jnp.sum(k[graph.structure] * graph.positions[:, None], axis=-1)  # [A, k]
    parts = [sum_over_atoms(charge[:, None] * wave(phase), graph)[graph.structure] for wave in (jnp.cos, jnp.sin)]
    weight = 2 * jnp.pi * COULOMB / jnp.linalg.det(cell)[:, None] * jnp.exp(-square) / square
    own = jnp.cos(phase) * parts[0] + jnp.sin(phase) * parts[1]
    return charge * jnp.sum(weight[graph.structure] * own, axis=1)


ENSEMBLE = Ensemble(Charges(), 2)


def structures() -> list[Atoms]:
    """A charged molecule, and salt in a skew cell with atoms outside of it."""
    hydronium = molecule("H2O") + Atoms("H", [[0.0, 0.3, 1.2]])
    hydronium.info["charge"] = 1
    salt = bulk("NaCl", "rocksalt", a=5.4)
    salt.set_cell(salt.cell.array + 0.2 * np.arange(9).reshape(3, 3) % 0.5, scale_atoms=True)
    salt.positions[0] += salt.cell[1] - 2 * salt.cell[0]
    for seed, atoms in enumerate((hydronium, salt)):
        atoms.rattle(0.1, seed=seed)
    return [hydronium, salt]


def graph_of(found: list[Atoms]) -> Graph:
    packed = pack(found, SPECIES, CUTOFF, neighbors=24, dtype=np.float64)
    return take_batch(packed.data, plan_batches(packed, np.arange(2), BatchShape(8, 24, 2))[0], 0)[0]


def params():
    return jax.tree.map(lambda x: np.asarray(x, np.float64), jax.jit(ENSEMBLE.init)(jax.random.key(0)))


def strained(atoms: Atoms, strain: np.ndarray) -> Atoms:
    moved = atoms.copy()
    moved.set_cell(atoms.cell.array @ (np.eye(3) + strain))
    moved.positions = atoms.positions @ (np.eye(3) + strain)
    return moved


def test_forces_and_virials_are_derivatives_of_the_energy_by_positions_and_cell():
    """Through packing, which moves atoms into their cell and the molecule to the origin: to nine digits."""
    with jax.enable_x64(True):
        start, step = structures(), 1e-5
        energies = jax.jit(ENSEMBLE.energies)
        found = jax.jit(ENSEMBLE.predict)(params(), graph_of(start))
        np.testing.assert_allclose(found.energy, energies(params(), graph_of(start)), rtol=1e-12)

        def slope(change):
            ends = [energies(params(), graph_of([change(atoms, s * step) for atoms in start])) for s in (1, -1)]
            return (ends[0] - ends[1]) / (2 * step)

        for atom, axis in ((0, 2), (1, 1), (1, 0)):

            def moved(atoms, by, atom=atom, axis=axis):
                other = atoms.copy()
                other.positions[atom, axis] += by
                return other

            np.testing.assert_allclose(found.forces[:, [atom, 4 + atom], axis], -slope(moved), rtol=1e-7, atol=1e-7)
        for i, j in ((0, 0), (1, 2), (2, 0)):
            direction = np.zeros((3, 3))
            direction[i, j] += 0.5
            direction[j, i] += 0.5
            wanted = -slope(lambda atoms, by, direction=direction: strained(atoms, by * direction))
            assert np.all(np.abs(wanted) > 1e-3)
            np.testing.assert_allclose(found.virial[:, :, i, j], wanted, rtol=1e-7, atol=1e-7)


def test_features_change_along_a_displacement_as_they_do_when_atoms_move():
    with jax.enable_x64(True):
        start, step = structures(), 1e-5
        predict = jax.jit(ENSEMBLE.predict)
        moves = np.zeros((2, 8, 3))
        moves[:, :6] = np.random.default_rng(0).normal(size=(2, 6, 3))
        found = jax.jit(ENSEMBLE.feature_change)(params(), graph_of(start), jnp.asarray(moves))
        for model in range(2):
            ends = []
            for sign in (1, -1):
                moved = [atoms.copy() for atoms in start]
                moved[0].positions += sign * step * moves[model, :4]
                moved[1].positions += sign * step * moves[model, 4:6]
                ends.append(predict(params(), graph_of(moved)).features[model])
            np.testing.assert_allclose(found[model, :6], ((ends[0] - ends[1]) / (2 * step))[:6], rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_dynamics_conserve_the_energy_of_charges():
    """To second order in the time step, of walkers with unlike cells and charges; packed, they have the same energy."""
    with jax.enable_x64(True):
        drift = []
        for timestep in (0.5, 0.25):  # the same program
            settings = ExplorationSettings(
                walkers=(WalkerGroup(temperature=600.0, count=2),),
                integrator=NveSettings(),
                timestep=timestep,
                steps=100,
                chunk=100,
                trajectory_every=100,
                sanity=SanitySettings(closest_contact=0.0, dissociation=False, max_temperature=1e5, max_force=1e4),
            )
            runner = Explorer(ENSEMBLE.predict, SPECIES, CUTOFF, settings, dtype=np.float64)
            session = runner.begin(params(), structures(), (1e3, 1e4), jax.random.key(1))
            total = np.concatenate([part.energy + part.kinetic for part in session.chunks()])
            drift.append(np.ptp(total, axis=0))
            ends = session.result([]).final
        assert np.all(drift[0] < 2e-2) and np.all(drift[0] > 3 * drift[1])
        packed = ENSEMBLE.energies(params(), graph_of(ends)).mean(axis=0)
        np.testing.assert_allclose(packed, part_energy(session), rtol=1e-9)


def part_energy(session) -> np.ndarray:
    """Mean energies where the walkers are, from the state that a run goes on from."""
    state, setup = session.state, session.setup
    graph = state.neighbors.graph(state.motion.position, setup.species, setup.charge, setup.spin)
    return ENSEMBLE.energies(params(), graph).mean(axis=0)


def test_a_model_that_does_not_say_so_is_shown_no_positions():
    hidden = Ensemble(replace(Charges(), long_range=False), 1)
    with pytest.raises((TypeError, AttributeError)):
        jax.eval_shape(hidden.predict, hidden.init(jax.random.key(0)), lone_atom())
    found: Prediction = jax.eval_shape(ENSEMBLE.predict, jax.jit(ENSEMBLE.init)(jax.random.key(0)), lone_atom())
    assert found.forces.shape == (2, 1, 3)
