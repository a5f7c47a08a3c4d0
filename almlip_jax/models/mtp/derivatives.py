"""Derivatives of a moment tensor potential by its parameters, and of these by the edges: what fits are made of.

With basic moments M of an atom and basis functions B, the derivatives by edge e of what multiplies the linear
coefficients are

    dB_s/de = sum_b (dB_s/dM_b) dM_b/de,

and of the energy V = sum_s m_s B_s by a radial coefficient c, with Q = dM/dc,

    d(dV/dc)/de = sum_b (H Q)_b dM_b/de + sum_b (dV/dM_b) dQ_b/de,    H = d2V/dM dM.

dB_s/dM_b and H are found for the few pairs that are not zero (`passes`).  The first sum of both is a product of
matrices for each atom, with the derivatives dM/de of its edges: one for moments of low rank, and one for those of high
rank, which are many and in few basis functions.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from almlip_jax.models.base import Params
from almlip_jax.models.constants import CONSTANTS
from almlip_jax.models.mtp.basis import Basis
from almlip_jax.models.mtp.contractions import factors_of, tree
from almlip_jax.models.mtp.moments import Edges, RadialBasis, edge_functions, shape_of
from almlip_jax.models.mtp.passes import all_moments, gradient, hessian, jacobian, passes
from almlip_jax.models.separable import Derivatives
from almlip_jax.structures.graph import Graph

if TYPE_CHECKING:
    from almlip_jax.models.mtp.model import Mtp


class Tiers(NamedTuple):
    """Moments of low and of high rank, and an order of basis functions.

    Attributes:
        rows: (mu, a, b, c) of the moments, those of low rank first.
        low: number of those.
        powers: of each mu, how many powers of directions have a low rank, and how many it takes part with.
        order: [S] basis functions, those of moments of low rank alone first.
        plain: number of those.
    """

    rows: tuple[tuple[int, int, int, int], ...]
    low: int
    powers: tuple[tuple[int, int], ...]
    order: np.ndarray
    plain: int


@lru_cache(maxsize=64)
def tiers(basis: Basis, radial: RadialBasis) -> Tiers:
    """The split of a basis that takes the fewest multiplications."""
    shape = shape_of(basis, radial)
    highest = np.array([max(nu for _, nu in factors) for factors in factors_of(basis)])
    found = []
    for rank in range(max(shape.ranks) + 1):
        most = (rank + 1) * (rank + 2) * (rank + 3) // 6
        powers = tuple((min(shape.number(mu), most), shape.number(mu)) for mu in shape.mus)
        low = sum(few for few, _ in powers)
        plain = int(np.sum(highest <= rank))
        cost = low * len(highest) + (len(shape.rows) - low) * (len(highest) - plain)
        found.append((cost, rank, low, powers, plain))
    _, rank, low, powers, plain = min(found)
    first = [(mu, *along) for mu, (few, _) in enumerate(powers) for along in shape.powers[:few]]
    rest = [(mu, *along) for mu, (few, all_) in enumerate(powers) for along in shape.powers[few:all_]]
    return Tiers((*first, *rest), low, powers, np.argsort(highest > rank, kind="stable"), plain)


def derivatives(model: Mtp, params: Params, graph: Graph) -> Derivatives:
    """Derivatives by ``moment`` in the order of `Tiers.order`, ``species`` and ``radial``; see `Separable`."""
    constants = params[CONSTANTS]
    shape, ways, split = shape_of(model.basis, model.radial_basis), passes(model.basis), split_of(model)
    edges = edge_functions(shape, graph.edge_mask, model.geometry(graph).components)
    told = jax.nn.one_hot(graph.species[graph.neighbors], model.num_species, axis=1, dtype=edges.radial.dtype)
    radial = jnp.swapaxes(constants["scaling"] * params["radial"], 1, 2)[graph.species]  # [A, mu, Z, R]
    values, slopes = (jnp.einsum("amzr,azk,ark->amk", radial, told, x) for x in (edges.radial, edges.slopes))
    sums = [jnp.einsum("ak,ank->an", values[:, mu], edges.powers[:, : shape.number(mu)]) for mu in shape.mus]
    moments = all_moments(
        ways, jnp.concatenate(sums, 1).T[np.array([shape.rows.index(x) for x in model.basis.moments])]
    )
    of_powers = _of_powers(shape.powers, edges)
    low, high = _of_moments(split, of_powers, values, slopes)
    scale = constants["last_scale"] * constants["moment_scale"]
    code = constants["last_scale"] * jax.nn.one_hot(graph.species, model.num_species, dtype=scale.dtype)
    by_radial = _radial(model, edges, told * constants["scaling"], moments, scale * params["moment"], of_powers)
    few, many = _cotangents(model, moments, scale[split.order])
    first = jnp.concatenate([few, by_radial.cotangents[:, : split.low]], 2)
    second = jnp.concatenate([many, by_radial.cotangents[:, split.low :]], 2)
    found = jnp.einsum("anik,ans->akis", low, first)
    found = found.at[..., split.plain :].add(jnp.einsum("anik,ans->akis", high, second))
    of_radial = _by_species(found[..., len(scale) :] + by_radial.edges, model, graph)
    of_species = jnp.zeros((*found.shape[:3], model.num_species), found.dtype)
    edge = jnp.concatenate([found[..., : len(scale)], of_species, of_radial], -1)
    functions = (scale[:, None] * moments[np.array(tree(model.basis).scalars)])[split.order].T
    return Derivatives(
        energy=jnp.concatenate([functions, code, _by_species(by_radial.energy, model, graph)], 1),
        edges=jnp.where(graph.edge_mask[..., None, None], edge, 0),
    )


def split_of(model: Mtp) -> Tiers:
    """The tiers of a model's basis."""
    return tiers(model.basis, model.radial_basis)


class _OfPowers(NamedTuple):
    """Derivatives of functions ``f(r) u^a`` by edge vectors are ``f / r`` and ``f'`` times these, [A, n, 3, K]."""

    across: jax.Array
    along: jax.Array


def _of_powers(powers: tuple[tuple[int, int, int], ...], edges: Edges) -> _OfPowers:
    places, exponents = _lowered(powers)
    ranks = np.array([sum(along) for along in powers])
    lowered = edges.powers[:, places] * exponents[..., None].astype(edges.powers.dtype)
    along = edges.powers[:, :, None] * jnp.stack(edges.direction, 1)[:, None]
    return _OfPowers((lowered - ranks[:, None, None] * along) * edges.inverse[:, None, None], along)


@lru_cache(maxsize=64)
def _lowered(powers: tuple[tuple[int, int, int], ...]) -> tuple[np.ndarray, np.ndarray]:
    """Places [n, 3] of the powers with one factor of x, y or z less, and the exponents [n, 3] of these."""
    place = {along: n for n, along in enumerate(powers)}
    less = [[(a - 1, b, c), (a, b - 1, c), (a, b, c - 1)] for a, b, c in powers]
    return np.array([[place.get(one, 0) for one in row] for row in less]), np.array(powers)


def _of_moments(split: Tiers, of: _OfPowers, values: jax.Array, slopes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Derivatives dM/de [A, rows, 3, K] of both tiers, from radial functions and their slopes [A, mu, K]."""

    def some(ends: list[tuple[int, int]]) -> jax.Array:
        parts = [
            values[:, mu, None, None] * of.across[:, a:b] + slopes[:, mu, None, None] * of.along[:, a:b]
            for mu, (a, b) in enumerate(ends)
        ]
        return jnp.concatenate(parts, 1)

    return some([(0, few) for few, _ in split.powers]), some(list(split.powers))


def _cotangents(model: Mtp, moments: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """dB_s/dM_b times scales [S] for the moments of both tiers: [A, low, S], and [A, others, S - plain]."""
    ways, split = passes(model.basis), split_of(model)
    functions, basic = ways.places
    rows, columns = _rows_of(model)[basic], np.argsort(split.order)[functions]
    pairs, atoms, number = jacobian(ways, moments), moments.shape[1], len(split.order)
    found = []
    for mine, first, before, width in (
        (rows < split.low, 0, 0, number),
        (rows >= split.low, split.low, split.plain, number - split.plain),
    ):
        height = split.low if first == 0 else len(split.rows) - split.low
        places = (rows[mine] - first) * width + columns[mine] - before
        blank = jnp.zeros((atoms, height * width), pairs.dtype)
        filled = blank.at[:, places].set(pairs[np.flatnonzero(mine)].T, unique_indices=True)
        found.append(filled.reshape(atoms, height, width) * scale[before:])
    return found[0], found[1]


def _rows_of(model: Mtp) -> np.ndarray:
    """The row of each basic moment among those of both tiers, [b]."""
    place = {row: n for n, row in enumerate(split_of(model).rows)}
    return np.array([place[moment] for moment in model.basis.moments])


class _ByRadial(NamedTuple):
    """Derivatives by the D radial coefficients [Z, mu, R] of an atom's own species.

    Attributes:
        energy: [A, D].
        cotangents: [A, rows, D] of moments, what their derivatives by edges are multiplied by.
        edges: [A, K, 3, D] what else there is.
    """

    energy: jax.Array
    cotangents: jax.Array
    edges: jax.Array


def _radial(
    model: Mtp, edges: Edges, told: jax.Array, moments: jax.Array, weights: jax.Array, of_powers: _OfPowers
) -> _ByRadial:
    """From neighbours' species [A, Z, K] times the scaling, all moments [m, A] and weights [S] of basis functions."""
    ways, split, atoms = passes(model.basis), split_of(model), moments.shape[1]
    slopes = gradient(ways, moments, weights)
    bends = hessian(ways, moments, slopes)
    of_basic = slopes[-len(model.basis.moments) :].T  # [A, b]
    sums = jnp.einsum("azk,ark,ank->anzr", told, edges.radial, edges.powers)
    rows = _rows_of(model)
    first, second = ways.bends
    energy, cotangents, rest = [], [], []
    for mu, (_, number) in enumerate(split.powers):
        mine = np.array([n for n, (of, *_) in enumerate(model.basis.moments) if of == mu])
        powers = np.array([shape_of(model.basis, model.radial_basis).powers.index(x[1:]) for x in _chosen(model, mu)])
        chosen = sums[:, powers]  # [A, b of mu, Z, R]
        energy.append(jnp.einsum("ab,abzr->azr", of_basic[:, mine], chosen))
        of_mu = np.flatnonzero(np.isin(second, mine))
        places = rows[first[of_mu]] * len(mine) + np.searchsorted(mine, second[of_mu])
        blank = jnp.zeros((atoms, len(split.rows) * len(mine)), bends.dtype)
        dense = blank.at[:, places].set(bends[of_mu].T, unique_indices=True).reshape(atoms, -1, len(mine))
        cotangents.append(jnp.einsum("anb,abzr->anzr", dense, chosen))
        spread = jnp.zeros((atoms, number), of_basic.dtype).at[:, powers].set(of_basic[:, mine], unique_indices=True)
        across = jnp.einsum("an,anik->aik", spread, of_powers.across[:, :number])
        along = jnp.einsum("an,anik->aik", spread, of_powers.along[:, :number])
        both = jnp.einsum("aik,ark->akir", across, edges.radial) + jnp.einsum("aik,ark->akir", along, edges.slopes)
        rest.append(jnp.einsum("azk,akir->akizr", told, both))
    found = (jnp.stack(one, -2) for one in (energy, cotangents, rest))  # [..., Z, mu, R]
    return _ByRadial(*(one.reshape(*one.shape[:-3], -1) for one in found))


def _chosen(model: Mtp, mu: int) -> list[tuple[int, int, int, int]]:
    return [moment for moment in model.basis.moments if moment[0] == mu]


def _by_species(values: jax.Array, model: Mtp, graph: Graph) -> jax.Array:
    """[A, ..., D] of an atom's own species as [A, ..., Z * D] of all."""
    if model.num_species == 1:
        return values
    code = jax.nn.one_hot(graph.species, model.num_species, dtype=values.dtype)
    spread = jnp.einsum("az,a...d->a...zd", code, values)
    return spread.reshape(*values.shape[:-1], -1)
