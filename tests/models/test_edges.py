"""Edges expanded in radial functions and harmonics: values, and derivatives of any order, against plain formulas."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from almlip_jax.models import radial as bases
from almlip_jax.models.bilinear import spherical_harmonics
from almlip_jax.models.edges import EdgeBasis, expand_edges
from almlip_jax.models.nequip import NequipSettings
from almlip_jax.models.radial import RadialBasis, polynomial_cutoff

CUTOFF, ATOMS, SLOTS = 4.0, 3, 5


@pytest.fixture(scope="module", autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def plainly(basis: EdgeBasis, mask: jax.Array, vectors: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    distance = jnp.sqrt(sum(part**2 for part in vectors))
    cut = jnp.where(mask, polynomial_cutoff(distance, basis.cutoff, basis.cutoff_power), 0)
    if basis.kind == "bessel":
        waves = [np.sqrt(2) * jnp.sin(n * np.pi * distance / CUTOFF) * CUTOFF / distance for n in orders(basis)]
    elif basis.kind == "chebyshev":
        powers = [np.polynomial.chebyshev.cheb2poly(np.eye(basis.radial)[n - 1])[::-1] for n in orders(basis)]
        waves = [jnp.polyval(power, 2 * distance / CUTOFF - 1) / distance for power in powers]
    else:
        spacing = CUTOFF / (basis.radial - 1)
        waves = [jnp.exp(-0.5 * ((distance - (n - 1) * spacing) / spacing) ** 2) for n in orders(basis)]
    radial = jnp.stack([wave * cut for wave in waves], 1)
    return radial, jnp.stack(spherical_harmonics([part / distance for part in vectors], basis.l_max), 1)


def orders(basis: EdgeBasis) -> range:
    return range(1, basis.radial + 1)


def some_edges() -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Edges of all lengths up to a little beyond the cutoff; two slots hold none."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(3, ATOMS, SLOTS))
    lengths = rng.uniform(0.4, 1.1 * CUTOFF, (ATOMS, SLOTS))
    vectors = tuple(jnp.asarray(lengths * part) for part in directions / np.linalg.norm(directions, axis=0))
    return jnp.ones((ATOMS, SLOTS), bool).at[1, 3:].set(False), vectors


def chebyshev(arguments, cutoff, count):
    """Chebyshev polynomials over the distance."""

    def values(r):
        x = 2 * r / cutoff - 1
        found = [jnp.ones_like(r), x]
        while len(found) < count:
            found.append(2 * x * found[-1] - found[-2])
        return jnp.stack(found[:count], 1)

    return jax.jvp(values, arguments, (jnp.ones_like(arguments[0]),))


@pytest.fixture
def with_chebyshev(monkeypatch):
    monkeypatch.setattr(bases, "_DECLARED", {})
    bases.declare(RadialBasis("chebyshev", chebyshev, factor=lambda distance, cutoff: 1 / distance))


def test_settings_take_what_is_declared(with_chebyshev):
    assert NequipSettings(radial_basis="chebyshev").radial_basis == "chebyshev"
    with pytest.raises(ValidationError, match="'chebishev' is not a radial basis; did you mean 'chebyshev'"):
        NequipSettings(radial_basis="chebishev")
    assert NequipSettings.model_json_schema()["properties"]["radial_basis"]["enum"][2:] == ["chebyshev"]
    with pytest.raises(ValueError, match="another radial basis 'gaussian'"):
        bases.declare(RadialBasis("gaussian", chebyshev))


@pytest.mark.parametrize(
    ("radial", "l_max", "power", "kind"),
    [(6, 0, 3, "bessel"), (2, 1, 4, "gaussian"), (8, 4, 3, "bessel"), (3, 0, 3, "chebyshev")],
)
def test_values_and_derivatives_are_those_of_the_formulas(with_chebyshev, radial, l_max, power, kind):
    basis = EdgeBasis(CUTOFF, power, radial, l_max, kind)
    mask, vectors = some_edges()
    rng = np.random.default_rng(1)
    shapes = (ATOMS, radial, SLOTS), (ATOMS, (l_max + 1) ** 2, SLOTS)
    weights, others = (tuple(jnp.asarray(rng.normal(size=shape)) for shape in shapes) for _ in range(2))

    def total(expand, vectors, weights):
        return sum(jnp.sum(jnp.sin(x) * w) for x, w in zip(expand(basis, mask, vectors), weights, strict=True))

    def slope(expand, vectors):
        """Of the gradient: it needs the derivative of the derivative."""
        first = jax.grad(total, argnums=1)(expand, vectors, weights)
        second = jax.grad(total, argnums=1)(expand, vectors, others)
        return sum(jnp.sum(a * b) for a, b in zip(first, second, strict=True))

    for function in (
        lambda expand: expand(basis, mask, vectors),
        lambda expand: jax.grad(total, argnums=1)(expand, vectors, weights),
        lambda expand: jax.grad(slope, argnums=1)(expand, vectors),
    ):
        found, wanted = (jax.jit(function, static_argnums=0)(expand) for expand in (expand_edges, plainly))
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11 * float(jnp.max(jnp.abs(b))) + 1e-13)


def test_side_by_side_they_are_the_same():
    """Under `vmap` conditions become choices."""
    basis = EdgeBasis(CUTOFF, 3, 4, 2)
    mask, vectors = some_edges()
    masks = jnp.stack([mask, ~mask])
    pairs = tuple(jnp.stack([part, 0.5 * part]) for part in vectors)
    together = jax.vmap(lambda m, *v: expand_edges(basis, m, v))(masks, *pairs)
    for n in range(2):
        alone = expand_edges(basis, masks[n], tuple(part[n] for part in pairs))
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a[n], b, rtol=1e-13, atol=1e-13)
