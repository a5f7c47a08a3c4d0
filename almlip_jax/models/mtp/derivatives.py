"""Derivatives of a moment tensor potential by its parameters, and of these by the edges: what fits are made of.

With basic moments M of an atom and basis functions B, the derivatives by edge e of what multiplies the linear
coefficients are

    dB_s/de = sum_b (dB_s/dM_b) dM_b/de,

and of the energy V = sum_s m_s B_s by a radial coefficient c, with Q = dM/dc,

    d(dV/dc)/de = sum_b (H Q)_b dM_b/de + sum_b (dV/dM_b) dQ_b/de,    H = d2V/dM dM.

Each dB_s/dM_b belongs to few pairs (s, b), and is found for these alone by going back through the tree of products
(`Passes`).  The first sum of both is one product of matrices for each atom, with the derivatives dM/de of its edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from almlip_jax.models.base import Params
from almlip_jax.models.constants import CONSTANTS
from almlip_jax.models.mtp.basis import Basis
from almlip_jax.models.mtp.contractions import tree
from almlip_jax.models.mtp.moments import Edges, Shape, edge_functions, shape_of
from almlip_jax.models.mtp.tables import Table, Term, sums_of_rows
from almlip_jax.models.separable import Derivatives
from almlip_jax.structures.graph import Graph

if TYPE_CHECKING:
    from almlip_jax.models.mtp.model import Mtp


@dataclass(frozen=True, eq=False)
class Passes:
    """Ways through the tree of products of a basis, a table of sums for each layer.

    Attributes:
        forward: the moments of each layer from all before.
        back: cotangents of the moments of each layer, the last one first, from those found before and the moments.
        seeds: [n] for each of these layers, which basis function a moment is; their number where it is none.
        pairs: derivatives of one basis function by one moment, layer by layer as for ``back``: from those found before,
            behind a row of ones, and the moments with a row of ones behind them.
        places: basis functions and basic moments of the last layer's pairs, [n] each.
        functions: number of basis functions S.
    """

    forward: tuple[Table, ...]
    back: tuple[Table, ...]
    seeds: tuple[np.ndarray, ...]
    pairs: tuple[Table, ...]
    places: tuple[np.ndarray, np.ndarray]
    functions: int


@lru_cache(maxsize=32)
def passes(basis: Basis) -> Passes:
    """Those of a basis."""
    found, functions = tree(basis), len(tree(basis).scalars)
    seeds = tuple(np.array([functions if of < 0 else of for of in chosen]) for _, chosen in found.back)
    pairs, places = _pairs(found.parts, found.products, found.scalars)
    return Passes(found.layers, tuple(table for table, _ in found.back), seeds, pairs, places, functions)


_Products = dict[int, tuple[Term, ...]]


def _pairs(
    layers: Sequence[range], products: _Products, scalars: Sequence[int]
) -> tuple[tuple[Table, ...], tuple[np.ndarray, np.ndarray]]:
    """`Passes.pairs` and `Passes.places`."""
    one = layers[-1].stop  # place of the row of ones behind the moments
    terms: dict[tuple[int, int], list[tuple[tuple[int, int] | None, int, float]]] = {}
    for function, scalar in enumerate(scalars):
        terms.setdefault((function, scalar), []).append((None, one, 1.0))
        open_, met = [scalar], {scalar}
        while open_:
            moment = open_.pop()
            for i, j, factor in products.get(moment, ()):
                terms.setdefault((function, i), []).append(((function, moment), j, factor))
                terms.setdefault((function, j), []).append(((function, moment), i, factor))
                open_ += {i, j} - met
                met |= {i, j}
    place: dict[tuple[int, int] | None, int] = {None: 0}
    tables, last = [], []
    for layer in reversed(layers):
        last = [pair for pair in terms if pair[1] in layer]
        rows = tuple(tuple((place[above], other, x) for above, other, x in terms[pair]) for pair in last)
        tables.append(Table(rows, len(place), one + 1))
        place |= {pair: len(place) + n for n, pair in enumerate(last)}
    return tuple(tables), (np.array([f for f, _ in last]), np.array([b for _, b in last]))


def all_moments(ways: Passes, basic: jax.Array) -> jax.Array:
    """Basic moments [b, A] and those of all layers."""
    known = basic
    for table in ways.forward:
        known = jnp.concatenate([known, sums_of_rows(table, known, known)])
    return known


def jacobian(ways: Passes, moments: jax.Array) -> jax.Array:
    """Derivatives dB_s/dM_b [n, A] of the pairs of `Passes.places`, from all moments."""
    ones = jnp.ones_like(moments[:1])
    moments, known, found = jnp.concatenate([moments, ones]), ones, ones
    for table in ways.pairs:
        found = sums_of_rows(table, known, moments)
        known = jnp.concatenate([known, found])
    return found


def gradient(ways: Passes, moments: jax.Array, weights: jax.Array) -> jax.Array:
    """Derivatives [moments, A] of ``weights @ B`` by all moments, the last layer first."""
    padded = jnp.concatenate([weights, jnp.zeros_like(weights[:1])])
    known = jnp.zeros((0, *moments.shape[1:]), moments.dtype)
    for table, seeds in zip(ways.back, ways.seeds, strict=True):
        found = jnp.broadcast_to(padded[seeds][:, None], (len(seeds), moments.shape[1]))
        known = jnp.concatenate([known, found + sums_of_rows(table, known, moments) if len(known) else found])
    return known


def curvature(ways: Passes, moments: jax.Array, slopes: jax.Array, along: jax.Array) -> jax.Array:
    """Second derivatives H of ``weights @ B`` by basic moments times directions.

    Args:
        ways: through the basis.
        moments: [moments, A], all of them.
        slopes: [moments, A], what `gradient` gave.
        along: [b, D, A] directions of the basic moments.

    Returns:
        [b, D, A].
    """
    moments, slopes, moved = moments[:, None], slopes[:, None], along
    for table in ways.forward:
        further = sums_of_rows(table, moved, moments) + sums_of_rows(table, moments, moved)
        moved = jnp.concatenate([moved, further])
    known = jnp.zeros((0, *along.shape[1:]), along.dtype)
    for table in ways.back:
        if table.left_rows:
            found = sums_of_rows(table, known, moments) + sums_of_rows(table, slopes, moved)
        else:
            found = jnp.zeros((len(table.terms), *along.shape[1:]), along.dtype)
        known = jnp.concatenate([known, found])
    return known[-along.shape[0] :]


class _Slopes(NamedTuple):
    """Derivatives by the vectors of edges.

    Attributes:
        moments: [A, rows, 3, K] of the sums of a `Shape`.
        powers: [A, n, 3, K] of the powers of directions.
    """

    moments: jax.Array
    powers: jax.Array


def _slopes(shape: Shape, edges: Edges, values: jax.Array, slopes: jax.Array) -> _Slopes:
    """Derivatives of f_mu(r) u^a, from radial functions and their slopes [A, mu, K]."""
    places, exponents = _lowered(shape.powers)
    direction = jnp.stack(edges.direction, 1)  # [A, 3, K]
    ranks = np.array([sum(along) for along in shape.powers])
    lowered = edges.powers[:, places] * exponents[..., None].astype(edges.powers.dtype)  # [A, n, 3, K]
    inverse = edges.inverse[:, None]
    along = edges.powers[:, :, None] * direction[:, None]
    across = (lowered - ranks[:, None, None] * along) * inverse[:, None]
    found = [
        values[:, mu, None, None] * across[:, : shape.number(mu)]
        + slopes[:, mu, None, None] * along[:, : shape.number(mu)]
        for mu in shape.mus
    ]
    return _Slopes(jnp.concatenate(found, 1), across)


@lru_cache(maxsize=64)
def _lowered(powers: tuple[tuple[int, int, int], ...]) -> tuple[np.ndarray, np.ndarray]:
    """Places [n, 3] of the powers with one factor of x, y or z less, and the exponents [n, 3] of these."""
    place = {along: n for n, along in enumerate(powers)}
    less = [[(a - 1, b, c), (a, b - 1, c), (a, b, c - 1)] for a, b, c in powers]
    return np.array([[place.get(one, 0) for one in row] for row in less]), np.array(powers)


def derivatives(model: Mtp, params: Params, graph: Graph) -> Derivatives:
    """Derivatives by ``moment``, ``species`` and ``radial``; see `separable.Separable`."""
    constants = params[CONSTANTS]
    shape, ways = shape_of(model.basis, model.radial_basis), passes(model.basis)
    edges = edge_functions(shape, graph.edge_mask, model.geometry(graph).components)
    told = jax.nn.one_hot(graph.species[graph.neighbors], model.num_species, axis=1, dtype=edges.radial.dtype)
    radial = jnp.swapaxes(constants["scaling"] * params["radial"], 1, 2)[graph.species]  # [A, mu, Z, R]
    values, slopes = (jnp.einsum("amzr,azk,ark->amk", radial, told, x) for x in (edges.radial, edges.slopes))
    sums = [jnp.einsum("ak,ank->an", values[:, mu], edges.powers[:, : shape.number(mu)]) for mu in shape.mus]
    rows = np.array([shape.rows.index(one) for one in model.basis.moments])
    moments = all_moments(ways, jnp.concatenate(sums, 1).T[rows])
    by_edge = _slopes(shape, edges, values, slopes)
    scale = constants["last_scale"] * constants["moment_scale"]
    code = constants["last_scale"] * jax.nn.one_hot(graph.species, model.num_species, dtype=scale.dtype)
    by_radial = _Radial(model, shape, ways, rows, edges, told * constants["scaling"])
    found = by_radial.parts(moments, scale * params["moment"], by_edge.powers, graph)
    functions = (scale[:, None] * moments[np.array(tree(model.basis).scalars)]).T
    by_functions = _dense(ways, shape, rows, jacobian(ways, moments)) * scale
    cotangents = jnp.concatenate([by_functions, found.cotangents], 2)
    both = jnp.einsum("anik,ans->akis", by_edge.moments, cotangents)
    of_functions, of_radial = both[..., : len(scale)], both[..., len(scale) :] + found.edges
    of_species = jnp.zeros((*both.shape[:3], model.num_species), both.dtype)
    edge = jnp.concatenate([of_functions, of_species, of_radial], -1)
    return Derivatives(
        energy=jnp.concatenate([functions, code, found.energy], 1),
        edges=jnp.where(graph.edge_mask[..., None, None], edge, 0),
    )


def _dense(ways: Passes, shape: Shape, rows: np.ndarray, pairs: jax.Array) -> jax.Array:
    """Derivatives dB_s/dM_b as cotangents of all sums, [A, rows, S]."""
    functions, moments = ways.places
    blank = jnp.zeros((pairs.shape[1], len(shape.rows) * ways.functions), pairs.dtype)
    filled = blank.at[:, rows[moments] * ways.functions + functions].set(pairs.T, unique_indices=True)
    return filled.reshape(-1, len(shape.rows), ways.functions)


class _ByRadial(NamedTuple):
    """Derivatives by radial coefficients.

    Attributes:
        energy: [A, P].
        cotangents: [A, rows, P] of the sums of a `Shape`, what their derivatives by edges are multiplied by.
        edges: [A, K, 3, P] what else there is.
    """

    energy: jax.Array
    cotangents: jax.Array
    edges: jax.Array


class _Radial(NamedTuple):
    """Derivatives by radial coefficients [Z, Z, mu, R]."""

    model: Mtp
    shape: Shape
    ways: Passes
    rows: np.ndarray
    edges: Edges
    told: jax.Array  # [A, Z, K] one-hot, of the neighbours, times the scaling

    def parts(self, moments: jax.Array, weights: jax.Array, powers: jax.Array, graph: Graph) -> _ByRadial:
        """From all moments, the weights of basis functions, and derivatives of the powers of directions by edges."""
        atoms, basic = graph.species.shape[0], len(self.rows)
        slopes = gradient(self.ways, moments, weights)
        of_basic = slopes[-basic:]
        along = self._directions()
        curved = jnp.moveaxis(curvature(self.ways, moments, slopes, along), -1, 0)  # [A, b, D]
        blank = jnp.zeros((atoms, len(self.shape.rows), curved.shape[2]), curved.dtype)
        cotangents = blank.at[:, self.rows].set(curved, unique_indices=True)
        energies = jnp.einsum("ba,bda->ad", of_basic, along)
        rest = self._of_edges(of_basic, powers)
        return _ByRadial(*(self._by_species(one, graph) for one in (energies, cotangents, rest)))

    def _directions(self) -> jax.Array:
        """Derivatives of basic moments by the coefficients of their atom's species, [b, (Z, mu, R), A]."""
        sums = jnp.einsum("azk,ark,ank->nzra", self.told, self.edges.radial, self.edges.powers)
        found = []
        for mu in self.shape.mus:
            chosen = [(self.shape.powers.index(tuple(along)), of == mu) for of, *along in self.model.basis.moments]
            places, mine = (np.array(one) for one in zip(*chosen, strict=True))
            found.append(jnp.where(mine[:, None, None, None], sums[places], 0))
        stacked = jnp.stack(found, 2)  # [b, Z, mu, R, A]
        return stacked.reshape(stacked.shape[0], -1, stacked.shape[-1])

    def _of_edges(self, slopes: jax.Array, powers: jax.Array) -> jax.Array:
        """The sum over moments of dV/dM times the derivative of dM/dc by an edge, [A, K, 3, D]."""
        direction = jnp.stack(self.edges.direction, 1)
        found = []
        for mu in self.shape.mus:
            mine = [n for n, (of, *_) in enumerate(self.model.basis.moments) if of == mu]
            places = np.array([self.shape.powers.index(tuple(self.model.basis.moments[n][1:])) for n in mine])
            weights = slopes[np.array(mine)]
            across = jnp.einsum("na,anik->aik", weights, powers[:, places])
            along = jnp.einsum("na,ank->ak", weights, self.edges.powers[:, places])[:, None] * direction
            both = jnp.einsum("aik,ark->akir", across, self.edges.radial)
            found.append(both + jnp.einsum("aik,ark->akir", along, self.edges.slopes))
        stacked = jnp.stack(found, -2)  # [A, K, 3, mu, R]
        told = jnp.einsum("azk,akimr->akizmr", self.told, stacked)
        return told.reshape(*told.shape[:3], -1)

    def _by_species(self, values: jax.Array, graph: Graph) -> jax.Array:
        """[A, ..., D] of an atom's own species as [A, ..., Z * D] of all."""
        if self.model.num_species == 1:
            return values
        code = jax.nn.one_hot(graph.species, self.model.num_species, dtype=values.dtype)
        spread = jnp.einsum("az,a...d->a...zd", code, values)
        return spread.reshape(*values.shape[:-1], -1)
