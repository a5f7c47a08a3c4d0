"""Constants of models lie apart from what is learned: trainings leave them as they were set, to the last bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from almlip_jax.ensembles import Ensemble, Heads
from almlip_jax.ensembles.likelihoods import Evidential
from almlip_jax.models import MaceSettings, MtpSettings, NequipSettings, SharedDensitySettings, build_model
from almlip_jax.models.constants import is_learned, learned_leaves
from almlip_jax.structures.graph import lone_atoms
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.training import TrainingSettings
from almlip_jax.training.optimisers import build_optimiser

MODELS = {
    "shared_density": SharedDensitySettings(cutoff=3.0, radial=3, l_max=1, channels=2, hidden=(4,)),
    "mace": MaceSettings(cutoff=3.0, radial=3, channels=2, read_out=(4,)),
    "nequip": NequipSettings(cutoff=3.0, radial=3, channels=2, layers=1, read_out=(4,), radial_hidden=(4,)),
    "mtp": MtpSettings(cutoff=3.0, level=4, radial_basis_size=3),
}
CONSTANT = {
    "shared_density": {"density_scale", "energy_scale"},
    "mace": {"message_scale", "energy_scale"},
    "nequip": {"message_scale", "energy_scale"},
    "mtp": {"scaling", "moment_scale", "last_scale"},
}


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_scales_are_constants_and_nothing_else_is(settings):
    ensemble = Ensemble(build_model(settings, SpeciesTable((1, 8))), 2, heads=Heads(2, Evidential()))
    params = jax.eval_shape(ensemble.init, jax.random.key(0))
    constant = {path for path, learned in flatten_dict(is_learned(params), sep="/").items() if not learned}
    assert constant == {f"model/constants/{name}" for name in CONSTANT[settings.kind]} | {"heads/constants/scale"}
    assert len(learned_leaves(params)) == len(jax.tree.leaves(params)) - len(constant)


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_energies_have_no_gradient_by_constants(settings):
    ensemble = Ensemble(build_model(settings, SpeciesTable((1, 8))), 2)
    params, graph = jax.jit(ensemble.init)(jax.random.key(0)), lone_atoms(2, jnp.dtype(jnp.float32))
    gradient = jax.jit(jax.grad(lambda of: jnp.sum(ensemble.energies(of, graph))))(params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient["constants"]))
    assert any(np.any(leaf) for leaf in learned_leaves(gradient))


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_optimisers_leave_constants_alone(kind):
    params = {"w": jnp.asarray([1.0, 0.3]), "constants": {"scale": jnp.asarray(0.7)}}
    optimiser = build_optimiser(TrainingSettings(optimiser=kind, weight_decay=0.1))
    gradient = jax.tree.map(jnp.ones_like, params) | {"constants": {"scale": jnp.asarray(0.0)}}
    updates, _ = optimiser.update(gradient, optimiser.init(params), params)
    moved = optax.apply_updates(params, updates)
    assert moved["constants"]["scale"] == params["constants"]["scale"]
    assert np.all(moved["w"] != params["w"])
