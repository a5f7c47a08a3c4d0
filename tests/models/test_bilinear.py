"""Sparse bilinear maps and the arrangement of arrays, against e3nn and plain numpy."""

from __future__ import annotations

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from almlip_jax.models import bilinear as module
from almlip_jax.models.bilinear import bilinear, clebsch_gordan, inner_products, spherical_harmonics, terms_of
from almlip_jax.models.layout import join, side_by_side, split, stack, unstack


@pytest.fixture(scope="module", autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("l_max", [0, 1, 4, 6])
def test_harmonics_are_those_of_e3nn(l_max):
    vectors = normal(7, 3)
    directions = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    wanted = e3nn.spherical_harmonics(
        list(range(l_max + 1)), e3nn.IrrepsArray("1o", directions), normalize=False, normalization="component"
    )
    found = np.stack(spherical_harmonics(list(jnp.asarray(directions.T)), l_max), axis=-1)
    np.testing.assert_allclose(found, wanted.array, atol=1e-13)
    squares = [np.sum(found[:, l * l : (l + 1) ** 2] ** 2, axis=1) for l in range(l_max + 1)]
    np.testing.assert_allclose(squares, [[2 * l + 1] * 7 for l in range(l_max + 1)], rtol=1e-12)


@pytest.mark.parametrize(("l1", "l2", "l3"), [(0, 0, 0), (1, 1, 2), (1, 2, 1), (2, 2, 2), (2, 3, 3)])
def test_products_are_clebsch_gordan_contractions(l1, l2, l3):
    x, y = normal(2 * l1 + 1, 4, 3, seed=1), normal(2 * l2 + 1, 4, 3, seed=2)
    coefficients = clebsch_gordan(l1, l2, l3)
    (found,) = bilinear((terms_of(coefficients, 0, 0),), (x,), (y,))
    np.testing.assert_allclose(found, np.einsum("ijk,inc,jnc->knc", coefficients, x, y), atol=1e-13)


def test_coefficients_are_there_where_the_package_keeps_them_elsewhere(monkeypatch):
    def moved(*_):
        raise ModuleNotFoundError("No module named 'e3nn_jax._src.so3'")

    monkeypatch.setattr(module, "import_part", moved)
    np.testing.assert_array_equal(module._with_coefficients().clebsch_gordan(1, 2, 3), e3nn.clebsch_gordan(1, 2, 3))


def test_several_blocks_derivatives_of_every_order_and_batching():
    x, y = (normal(1, 3), normal(3, 3, seed=1)), (normal(3, 3, seed=2), normal(5, 3, seed=3))
    table = (
        tuple(
            a + b
            for a, b in zip(
                terms_of(clebsch_gordan(0, 1, 1), 0, 0), terms_of(clebsch_gordan(1, 2, 1), 1, 1), strict=True
            )
        ),
        terms_of(clebsch_gordan(1, 1, 2), 1, 0),
    )

    def value(x, y):
        a, b = bilinear(table, x, y)
        return jnp.sum(jnp.sin(a)) + jnp.sum(b**2)

    value = jax.jit(value)
    check_grads(value, (x, y), order=3, modes=["rev"], atol=1e-5, rtol=1e-5)
    pairs = tuple(np.stack([one, 2 * one]) for one in x)
    mapped = jax.vmap(value, in_axes=(0, None))(pairs, y)
    np.testing.assert_allclose(mapped, [value(x, y), value(tuple(2 * one for one in x), y)], rtol=1e-13)


def test_broadcast_factor_collects_the_whole_gradient():
    x, y = (normal(3, 4, 2),), (normal(3, 1, 2, seed=1),)

    def value(x, y):
        return jnp.sum(bilinear(inner_products(1), (x[0][:1], x[0]), (y[0][:1], y[0]))[0] ** 2)

    check_grads(jax.jit(value), (x, y), order=2, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_taking_apart_and_putting_together_differentiate_into_each_other():
    values = normal(5, 3)

    def through(values):
        rows = unstack(values, 1)
        parts = split(stack(tuple(n * row**2 for n, row in enumerate(rows)), 0), (1, 2), 0)
        rows = join(parts[::-1], (2, 1), 0)
        return jnp.sum(jnp.sin(side_by_side(split(rows, (1, 3, 1), -1)[::-1])) * np.arange(1, 6))

    wanted = np.roll((np.arange(3) * values**2).T, 2, axis=0)[:, [4, 1, 2, 3, 0]]
    np.testing.assert_allclose(through(values), np.sum(np.sin(wanted) * np.arange(1, 6)), rtol=1e-13)
    check_grads(jax.jit(through), (values,), order=3, modes=["rev"], atol=1e-5, rtol=1e-5)
    text = jax.jit(jax.grad(through)).lower(values).as_text()
    assert "pad" not in text and "scatter" not in text
