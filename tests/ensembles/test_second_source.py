"""Two label sources, one set of features: each structure has the energy and forces of its own source's last layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase.build import molecule

from almlip_jax.ensembles import Ensemble
from almlip_jax.ensembles.second_source import SecondSource, energies_by_source, last_layer
from almlip_jax.errors import InputError
from almlip_jax.models import MtpSettings, NequipSettings, SharedDensitySettings, build_model
from almlip_jax.structures.graph import Graph
from almlip_jax.structures.packing import BatchShape, pack, plan_batches, take_batch
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.training import check_two_sources

SPECIES = SpeciesTable((1, 8))
DENSITY = SharedDensitySettings(cutoff=3.0, radial=4, l_max=1, channels=4, hidden=(8,))


def two_molecules() -> Graph:
    frames = [molecule("H2O"), molecule("H2O2")]
    for seed, atoms in enumerate(frames):
        atoms.rattle(0.05, seed=seed)
    plan, _ = plan_batches(pack(frames, SPECIES, 3.0, neighbors=4), np.arange(2), BatchShape(8, 4, 2))
    return take_batch(pack(frames, SPECIES, 3.0, neighbors=4).data, plan, 0)[0]


def test_energy_and_forces_are_those_of_the_last_layer_of_the_source() -> None:
    """The second molecule is of the second source; the model's own last layer neither tells nor learns of it."""
    graph, ensemble = two_molecules(), Ensemble(build_model(DENSITY, SPECIES), 2)
    params, fresh = map(jax.jit(ensemble.init), (jax.random.key(0), jax.random.key(1)))
    other = params | {"last": fresh["last"], "species_bias": fresh["species_bias"] + 0.3}
    layers = jax.jit(jax.vmap(lambda one: last_layer(ensemble.model, one)))(other)

    @jax.jit
    def found(given: dict) -> tuple:
        told = ensemble.predict(given, graph, SecondSource(layers, jnp.array([0.0, 1.0])))
        return ensemble.predict(params, graph), ensemble.predict(other, graph), told

    def of_second(given: dict) -> jax.Array:
        second = SecondSource(layers, jnp.array([0.0, 1.0]))
        return jnp.sum(ensemble.predict(given, graph, second).energy[:, 1] ** 2)

    first, second, told = jax.device_get(found(params))
    np.testing.assert_allclose(told.energy[:, 0], first.energy[:, 0], rtol=1e-6)
    np.testing.assert_allclose(told.energy[:, 1], second.energy[:, 1], rtol=1e-5)
    of_atom = np.where((np.asarray(graph.structure) == 0)[None, :, None], first.forces, second.forces)
    np.testing.assert_allclose(told.forces, of_atom, atol=1e-5)
    assert np.abs(first.energy[:, 1] - second.energy[:, 1]).min() > 0.1
    learned = jax.device_get(jax.jit(jax.grad(of_second))(params))
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(learned))
    assert np.abs(learned["last"]).max() < 1e-5 * largest and np.abs(learned["species_bias"]).max() < 1e-5 * largest


@pytest.mark.parametrize(
    "settings, isolated, names",
    [
        (DENSITY, (1, 8), ("last", "species_bias")),
        (MtpSettings(cutoff=3.0, level=6), (), ("moment", "species")),
        (NequipSettings(cutoff=3.0, channels=2, layers=1, l_max=1), (8,), ("last", "species_bias")),
    ],
    ids=["anchored", "mtp", "nequip"],
)
def test_models_say_what_their_last_layer_is(settings: object, isolated: tuple[int, ...], names: tuple) -> None:
    graph, model = two_molecules(), build_model(settings, SPECIES, isolated)  # type: ignore[arg-type]
    params, fresh = map(jax.jit(model.init), (jax.random.key(0), jax.random.key(1)))
    other = params | {name: fresh[name] + 0.1 for name in names}

    @jax.jit
    def energies() -> tuple:
        geometry = model.geometry(graph)
        output = model.apply(params, geometry, graph)
        layer = last_layer(model, other)
        told = energies_by_source(model, params, output, graph, layer, jnp.array([1.0, 1.0]))
        return output.energy, told, model.apply(other, geometry, graph).energy

    own, told, wanted = (np.asarray(x)[:7] for x in energies())
    np.testing.assert_allclose(told, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    assert np.abs(own - wanted).max() > 1e-3


def test_what_has_no_second_last_layer_is_refused() -> None:
    class Silent:
        """A model of a user's own that says nothing of its last layer."""

        species = SPECIES
        init = staticmethod(lambda key: {})

    with pytest.raises(InputError, match="model Silent does not say what its last layer has learned"):
        check_two_sources(Ensemble(Silent(), 2))  # type: ignore[arg-type]
