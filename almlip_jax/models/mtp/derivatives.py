"""Derivatives of a moment tensor potential by its parameters, and of these by the edges: what fits are made of.

With basic moments M of an atom and basis functions B, the derivatives by edge e of what multiplies the linear
coefficients are

    dB_s/de = sum_b (dB_s/dM_b) dM_b/de,

and of the energy V = sum_s m_s B_s by a radial coefficient c, with Q = dM/dc,

    d(dV/dc)/de = sum_b (H Q)_b dM_b/de + sum_b (dV/dM_b) dQ_b/de,    H = d2V/dM dM.

dB_s/dM_b and H are found for the few pairs that are not zero (`passes`).  Directions have length one, z^2 = 1 - x^2 -
y^2, so that moments are sums of few of them, those of powers with at most one factor of z: 49 instead of 84 up to rank
6 (`Sphere`).  In these the first sum of both is one product of matrices for each atom.
"""

from __future__ import annotations

from functools import lru_cache, partial
from math import factorial
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from almlip_jax.materialise import materialised
from almlip_jax.models.base import Params
from almlip_jax.models.constants import CONSTANTS
from almlip_jax.models.edges import Vectors
from almlip_jax.models.mtp.basis import Basis
from almlip_jax.models.mtp.contractions import tree
from almlip_jax.models.mtp.moments import RadialFunctions, radial_functions
from almlip_jax.models.mtp.passes import all_moments, gradient, hessian, jacobian, passes
from almlip_jax.models.mtp.ranks import shape_of
from almlip_jax.models.mtp.tables import Table, Term, sums_of_rows
from almlip_jax.models.separable import Derivatives
from almlip_jax.structures.graph import Graph

if TYPE_CHECKING:
    from almlip_jax.models.mtp.model import Mtp

_Power: TypeAlias = tuple[int, int, int]


class Sphere(NamedTuple):
    """Moments of powers with at most one factor of z, rank by rank for each mu, and how all moments follow from them.

    Attributes:
        powers: x^a y^b z^c, c < 2, up to the highest rank.
        numbers: of each mu, how many of these it has, the first of them.
        moments: [n, b] by which the basic moments of the basis are sums of these n.
        pairs: of derivatives of basis functions by these, from `Passes.pairs`' last ones and a row of ones.
        pair_places: basis function and moment of each, [q] each.
        bends: of second derivatives by these, from `Passes.curves`' last ones and a row of ones, in two steps.
        bend_places: two moments of each, [q] each.
    """

    powers: tuple[_Power, ...]
    numbers: tuple[int, ...]
    moments: np.ndarray
    pairs: Table
    pair_places: tuple[np.ndarray, np.ndarray]
    bends: tuple[Table, Table]
    bend_places: tuple[np.ndarray, np.ndarray]

    @property
    def blocks(self) -> list[slice]:
        """Where the moments of each mu are."""
        ends = np.cumsum([0, *self.numbers]).tolist()
        return [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]


@lru_cache(maxsize=64)
def sphere(basis: Basis) -> Sphere:
    """That of a basis."""
    shape, ways = shape_of(basis), passes(basis)
    highest = max(shape.ranks)
    powers = tuple(
        one
        for rank in range(highest + 1)
        for a in range(rank, -1, -1)
        for one in ((a, rank - a, 0), (a, rank - a - 1, 1))
        if min(one) >= 0
    )
    numbers = tuple((rank + 1) ** 2 for rank in shape.ranks)
    row = {
        (mu, *along): n
        for n, (mu, along) in enumerate((mu, one) for mu, few in enumerate(numbers) for one in powers[:few])
    }
    parts = [{row[(mu, *one)]: x for one, x in _on_sphere(along).items()} for mu, *along in basis.moments]
    moments = np.zeros((len(row), len(parts)))
    for b, part in enumerate(parts):
        moments[list(part), b] = list(part.values())
    pairs, pair_places = _spread(*ways.places, parts)
    first, (ends, starts) = _spread(ways.bends[1], ways.bends[0], parts)
    second, (begins, others) = _spread(starts, ends, parts)
    return Sphere(powers, numbers, moments, pairs, pair_places, (first, second), (begins, others))


def _on_sphere(power: list[int]) -> dict[_Power, float]:
    """A power of a direction as a sum of those with at most one factor of z."""
    a, b, c = power
    half, found = c // 2, dict[_Power, float]()
    for i in range(half + 1):
        for j in range(half + 1 - i):
            ways = factorial(half) // (factorial(i) * factorial(j) * factorial(half - i - j))
            found[a + 2 * i, b + 2 * j, c % 2] = float((-1) ** (i + j) * ways)
    return found


def _spread(
    kept: np.ndarray, moments: np.ndarray, parts: list[dict[int, float]]
) -> tuple[Table, tuple[np.ndarray, np.ndarray]]:
    """From rows for pairs of something and a basic moment to those for pairs of it and the moments that this sums."""
    terms: dict[tuple[int, int], list[Term]] = {}
    for n, (one, moment) in enumerate(zip(kept.tolist(), moments.tolist(), strict=True)):
        for part, factor in parts[moment].items():
            terms.setdefault((one, part), []).append((n, 0, factor))
    both = np.array(sorted(terms), int).reshape(-1, 2)
    rows = tuple(tuple(terms[one, part]) for one, part in both.tolist())
    return Table(rows, len(kept), 1), (both[:, 0], both[:, 1])


def derivatives(model: Mtp, params: Params, graph: Graph) -> Derivatives:
    """Derivatives by ``moment``, ``species`` and ``radial``; see `Separable`."""
    constants, ways, over = params[CONSTANTS], passes(model.basis), sphere(model.basis)
    edges = _edges(model, graph, constants["scaling"])
    sums = jnp.einsum("apk,adk->apd", edges.powers, edges.radial)  # [A, p, Z * R]
    coefficients = _coefficients(model, params, graph)
    few = [jnp.einsum("apd,ad->ap", sums[:, :p], coefficients[:, mu]) for mu, p in enumerate(over.numbers)]
    moments = all_moments(ways, (jnp.concatenate(few, 1) @ over.moments.astype(sums.dtype)).T)
    scale = constants["last_scale"] * constants["moment_scale"]
    code = jax.nn.one_hot(graph.species, model.num_species, dtype=scale.dtype)
    slopes = gradient(ways, moments, scale * params["moment"])
    of_moments = slopes[-len(model.basis.moments) :].T @ over.moments.T.astype(sums.dtype)  # [A, n]
    by_energy = jnp.stack(
        [jnp.einsum("ap,apd->ad", of_moments[:, at], sums[:, :p]) for at, p in _by_mu(over)], 1
    )  # [A, mu, Z * R]
    bends = _bends(over, hessian(ways, moments, slopes))
    by_radial = jnp.stack([bends[..., at] @ sums[:, :p] for at, p in _by_mu(over)], 2)  # [A, n, mu, Z * R]
    of_functions = _of_functions(over, jacobian(ways, moments), len(scale)) * scale
    none = jnp.zeros((*of_functions.shape[:2], model.num_species), scale.dtype)
    cotangents = jnp.concatenate([of_functions, none, _by_species(by_radial, code)], 2)
    some = jnp.any(graph.edge_mask)
    by_edges = materialised(partial(_of_moments, over), some, edges, coefficients)
    spread = materialised(partial(_of_radial, over), some, edges, of_moments)
    found = materialised(_product, some, by_edges, cotangents, spread, code)
    functions = (scale[:, None] * moments[np.array(tree(model.basis).scalars)]).T
    return Derivatives(
        energy=jnp.concatenate([functions, constants["last_scale"] * code, _by_species(by_energy, code)], 1),
        edges=found.reshape(len(found), -1, 3, found.shape[2]),
    )


class _Edges(NamedTuple):
    """Functions of edges; what is multiplied by them is 0 in padding slots.

    Derivatives of functions ``f(r) u^a`` by edge vectors are ``f / r`` and ``f'`` times ``across`` and ``along``.

    Attributes:
        radial: [A, Z * R, K] scaled Chebyshev polynomials times (max - r)^2, for the neighbour's species.
        slopes: [A, Z * R, K] their derivatives by the distance.
        powers: [A, p, K] of the directions.
        across: [A, p, 3, K].
        along: [A, p, 3, K].
    """

    radial: jax.Array
    slopes: jax.Array
    powers: jax.Array
    across: jax.Array
    along: jax.Array


def _edges(model: Mtp, graph: Graph, scaling: jax.Array) -> _Edges:
    over = sphere(model.basis)

    def functions(told: jax.Array, mask: jax.Array, vectors: Vectors) -> _Edges:
        found = radial_functions(model.radial_basis, mask, vectors)
        radial, slopes = (
            (told[:, :, None] * one[:, None]).reshape(len(one), -1, one.shape[-1])
            for one in (found.radial, found.slopes)
        )
        powers = _powers(sum(over.powers[-1]), found.direction)
        return _Edges(radial, slopes, powers, *_of_powers(over.powers, powers, found))

    told = scaling * jax.nn.one_hot(graph.species[graph.neighbors], model.num_species, axis=1, dtype=scaling.dtype)
    mask = graph.edge_mask
    found: _Edges = materialised(functions, jnp.any(mask), told, mask, model.geometry(graph).components)
    return found


def _powers(highest: int, direction: Vectors) -> jax.Array:
    """Powers [A, p, K] with at most one factor of z: x times those of the rank below, and two without x."""
    x, y, z = (one[:, None] for one in direction)
    found = [jnp.ones_like(x)]
    for rank in range(1, highest + 1):
        below = found[-1]
        without = [y * below[:, -2:]] if rank > 1 else [y, z]
        found.append(jnp.concatenate([x * below, *without], axis=1))
    return jnp.concatenate(found, axis=1)


def _of_powers(powers: tuple[_Power, ...], values: jax.Array, of: RadialFunctions) -> tuple[jax.Array, jax.Array]:
    """`_Edges.across` and `_Edges.along`."""
    place = {along: n for n, along in enumerate(powers)}
    less = [[(a - 1, b, c), (a, b - 1, c), (a, b, c - 1)] for a, b, c in powers]
    places = np.array([[place.get(one, 0) for one in row] for row in less])
    exponents = np.array(powers, values.dtype)
    lowered = values[:, places] * exponents[..., None]
    along = values[:, :, None] * jnp.stack(of.direction, 1)[:, None]
    return (lowered - exponents.sum(axis=1)[:, None, None] * along) * of.inverse[:, None, None], along


def _coefficients(model: Mtp, params: Params, graph: Graph) -> jax.Array:
    """Radial coefficients of each atom, [A, mu, Z * R]."""
    own = jnp.swapaxes(params["radial"], 1, 2)[graph.species]  # [A, mu, Z, R]
    return own.reshape(*own.shape[:2], -1)


def _by_mu(over: Sphere) -> list[tuple[slice, int]]:
    return list(zip(over.blocks, over.numbers, strict=True))


def _bends(over: Sphere, pairs: jax.Array) -> jax.Array:
    """Second derivatives by moments, [A, n, n], from those of the pairs of basic ones [h, A]."""
    for table in over.bends:
        pairs = sums_of_rows(table, pairs, jnp.ones_like(pairs[:1]))
    first, second = over.bend_places
    return _filled(pairs, first, second, (sum(over.numbers), sum(over.numbers)))


def _of_functions(over: Sphere, pairs: jax.Array, functions: int) -> jax.Array:
    """Derivatives of basis functions by moments, [A, n, S], from those of the pairs with basic ones [q, A]."""
    pairs = sums_of_rows(over.pairs, pairs, jnp.ones_like(pairs[:1]))
    function, moment = over.pair_places
    return _filled(pairs, moment, function, (sum(over.numbers), functions))


def _filled(values: jax.Array, rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> jax.Array:
    """Matrices [A, *shape] with values [q, A] in some places, and 0 elsewhere."""
    blank = jnp.zeros((values.shape[1], shape[0] * shape[1]), values.dtype)
    return blank.at[:, rows * shape[1] + columns].set(values.T, unique_indices=True).reshape(-1, *shape)


def _of_moments(over: Sphere, edges: _Edges, coefficients: jax.Array) -> jax.Array:
    """Derivatives of moments by components of edges, [A, K * 3, n]."""
    values, slopes = (jnp.einsum("amd,adk->amk", coefficients, x) for x in (edges.radial, edges.slopes))
    parts = [
        values[:, mu, None, None] * edges.across[:, :p] + slopes[:, mu, None, None] * edges.along[:, :p]
        for mu, p in enumerate(over.numbers)
    ]
    found = jnp.transpose(jnp.concatenate(parts, 1), (0, 3, 2, 1))
    return found.reshape(len(found), -1, found.shape[3])


class _Spread(NamedTuple):
    """What the radial functions' own derivatives add is ``across * radial + along * slopes``.

    Attributes:
        across: [A, K, 3, mu].
        along: [A, K, 3, mu].
        radial: [A, K, Z * R].
        slopes: [A, K, Z * R].
    """

    across: jax.Array
    along: jax.Array
    radial: jax.Array
    slopes: jax.Array


def _of_radial(over: Sphere, edges: _Edges, of_moments: jax.Array) -> _Spread:
    """From derivatives [A, n] by moments."""
    most = len(over.powers)
    wide = [jnp.pad(of_moments[:, at], ((0, 0), (0, most - p))) for at, p in _by_mu(over)]
    weights = jnp.stack(wide, 1)  # [A, mu, p]
    across, along = (
        jnp.transpose((weights @ x.reshape(len(x), most, -1)).reshape(len(x), -1, *x.shape[2:]), (0, 3, 2, 1))
        for x in (edges.across, edges.along)
    )
    return _Spread(across, along, jnp.swapaxes(edges.radial, 1, 2), jnp.swapaxes(edges.slopes, 1, 2))


def _product(by_edges: jax.Array, cotangents: jax.Array, spread: _Spread, code: jax.Array) -> jax.Array:
    """Derivatives by components of edges, [A, K * 3, M]."""
    radial, slopes = (one[:, :, None, None] for one in (spread.radial, spread.slopes))
    rest = spread.across[..., None] * radial + spread.along[..., None] * slopes
    rest = _by_species(rest.reshape(len(rest), -1, *rest.shape[3:]), code)
    found = jnp.einsum("aen,ans->aes", by_edges, cotangents)
    return found.at[..., found.shape[2] - rest.shape[2] :].add(rest)


def _by_species(values: jax.Array, code: jax.Array) -> jax.Array:
    """[A, ..., mu, Z * R] of an atom's own species as [A, ..., Z * Z * mu * R] of all, from species [A, Z]."""
    kinds = code.shape[1]
    found = jnp.moveaxis(values.reshape(*values.shape[:-1], kinds, -1), -2, -3)  # [A, ..., Z, mu, R]
    if kinds > 1:
        found = found[..., None, :, :, :] * code.reshape(-1, *(1,) * (found.ndim - 4), kinds, 1, 1, 1)
    return found.reshape(*values.shape[:-2], -1)
