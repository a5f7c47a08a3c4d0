"""Random streams: keys whose arrays are drawn as rows give the numbers of jax's own."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
import pytest

from almlip_jax.ensembles import Ensemble
from almlip_jax.keys import in_a_row
from almlip_jax.models import SharedDensitySettings, build_model
from almlip_jax.structures.species import SpeciesTable

DRAWS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "normal": lambda key: jax.random.normal(key, (5, 7)),
    "of no size": lambda key: jax.random.normal(key, (0, 3)),
    "one number": jax.random.uniform,
    "truncated": lambda key: jax.random.truncated_normal(jax.random.fold_in(key, 3), -2, 2, (4, 3, 2)),
    "bytes": lambda key: jax.random.bits(key, (3, 5), "uint8"),
    "half of a split key": lambda key: jax.random.normal(jax.random.split(key)[1], (6, 2)),
    "order": lambda key: jax.random.permutation(key, 20),
}


@pytest.mark.parametrize("name", DRAWS)
def test_rows_hold_the_numbers_of_arrays(name):
    keys = jax.random.split(jax.random.key(7), 3)
    draw = jax.jit(jax.vmap(DRAWS[name]))
    np.testing.assert_array_equal(draw(in_a_row(keys)), draw(keys))
    np.testing.assert_array_equal(DRAWS[name](in_a_row(keys[0])), DRAWS[name](keys[0]))


def test_other_generators_stay():
    key = jax.random.key(0, impl="rbg")
    assert in_a_row(key) is key
    once = in_a_row(jax.random.key(0))
    assert in_a_row(once) is once
    old = in_a_row(jax.random.PRNGKey(5))  # plain numbers
    np.testing.assert_array_equal(jax.random.normal(old, (2, 2)), jax.random.normal(jax.random.key(5), (2, 2)))


def test_an_ensemble_begins_with_the_parameters_of_its_models():
    species = SpeciesTable((1, 8))
    model = build_model(SharedDensitySettings(radial=3, l_max=0, channels=3, hidden=(4,)), species)
    key = jax.random.key(1)
    of_models = jax.jit(jax.vmap(model.init))(jax.random.split(key, 2))
    jax.tree.map(np.testing.assert_array_equal, jax.jit(Ensemble(model, 2).init)(key), of_models)
