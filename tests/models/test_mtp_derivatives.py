"""Derivatives of moment tensor potentials by their parameters, against automatic differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms

from almlip_jax.models.mtp import MtpSettings
from almlip_jax.structures.packing import BatchShape, pack, plan_batches, take_batch
from almlip_jax.structures.species import SpeciesTable


@pytest.mark.slow
@pytest.mark.parametrize(("level", "numbers"), [(2, (3,)), (6, (3, 9)), (12, (3,))])
def test_derivatives_are_those_of_the_energy(level, numbers):
    generator, table = np.random.default_rng(0), SpeciesTable(numbers)
    atoms = Atoms(
        [numbers[n % len(numbers)] for n in range(4)], generator.normal(size=(4, 3)) * 1.5, cell=[6, 5, 6], pbc=True
    )
    with jax.enable_x64(True):
        model = MtpSettings(level=level, cutoff=4.0, radial_basis_size=4).build(table)
        packed = pack([atoms], table, 4.0, neighbors=40, dtype=np.float64)
        plan, _ = plan_batches(packed, np.arange(1), BatchShape(5, 40, 1))
        graph, _ = take_batch(packed.data, plan, 0)
        params = jax.jit(model.init)(jax.random.key(0))
        scales = jnp.asarray(generator.uniform(0.5, 2.0, len(model.basis.scalars)))
        params["constants"] |= {"scaling": jnp.asarray(0.7), "moment_scale": scales, "last_scale": jnp.asarray(1.3)}
        linear, others = model.separate(params)

        def energies(linear, others, vectors):
            moved = graph.replace(vectors=vectors)
            return model.apply(model.put_together(params, linear, others), model.geometry(moved), moved).energy

        def by_edges(linear, others):
            return jax.grad(lambda vectors: jnp.sum(energies(linear, others, vectors)))(graph.vectors)

        found = jax.jit(lambda one: model.derivatives(one, graph))(params)
        energy = jnp.concatenate(jax.jacrev(energies, (0, 1))(linear, others, graph.vectors), 1)
        edges = jnp.concatenate(jax.jacrev(by_edges, (0, 1))(linear, others), -1)
        real = np.asarray(graph.atom_mask)
        edges = np.where(np.asarray(graph.edge_mask)[..., None, None], edges, 0)[real]
        np.testing.assert_allclose(found.energy[real], energy[real], atol=1e-12 * np.abs(energy[real]).max())
        np.testing.assert_allclose(found.edges[real], edges, atol=1e-12 * np.abs(edges).max())
