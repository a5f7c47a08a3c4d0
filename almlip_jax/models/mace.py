"""The MACE-type model: messages of the neighbours, then many-body products of them, layer after layer.

In each layer the messages of the neighbours are gathered into A, [2l+1, A, C] for l up to ``l_max``; products of A with
itself up to the correlation order give many-body functions B, a linear map of which, plus the atom's own features
mapped with weights of its species, are the next features.  Energies are read out linearly from the scalars of every
layer but the last, and by an MLP from those of the last.  Source: Batatia et al., NeurIPS 2022, arXiv:2206.07697.

The symmetric contraction of order n is taken pairwise, T_1 = A and T_n = sum_p w_p (T_(n-1) x A)_p with weights w_p of
path, channel and central species: the generalised Clebsch-Gordan coefficients are products of simple ones.

Messages are linear in the radial functions B_b unless ``radial_hidden`` asks for an MLP of them.  Where an atom has
many neighbours, the sum over them then comes before the weights: with the basis beta_(lm,b) = B_b(r_ij) Y_lm(r_ij) of
an edge, which holds no parameter and is shared by the members of an ensemble, each later layer sums

    S_(l1 m1, b, l2 m2, c)(i) = sum_j beta_(l1 m1, b)(ij) h_(l2 m2, c)(j),

one matrix product for each atom, and then applies weights of path, radial function and channel, and the Clebsch-Gordan
coefficients.  Where there are few, the weights of each edge come first; both orders give the same numbers.

In the first layer neighbours are told apart by their species alone: the sum over them is the atomic density of the
shared-density model, and holds no parameter at all.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from pydantic import Field

from almlip_jax.models.base import LEAST_SQUARE, Params, Survey, sums_by_degree
from almlip_jax.models.bilinear import Irreps, Table, bilinear, couplings
from almlip_jax.models.constants import constant, with_constants
from almlip_jax.models.convolution import (
    ConvolutionalModel,
    ConvolutionalSettings,
    DegreeLinear,
    Edges,
    Path,
    RadialWeights,
    SpeciesLinear,
    by_degree,
    convolve,
    edge_functions,
    first_features,
    incoherent_sums,
    paths_between,
)
from almlip_jax.models.layout import side_by_side, split, stack, unstack
from almlip_jax.models.species_code import central_code, exact_code, neighbor_code
from almlip_jax.structures.graph import Graph
from almlip_jax.structures.species import SpeciesTable

_MANY_SLOTS = 24  # as fast either way on a CPU: edges first is 1.2 times as fast with 14, sums first 1.5 times with 40


class MaceSettings(ConvolutionalSettings):
    """Shape of the MACE-type model."""

    kind: Literal["mace"] = "mace"
    correlation: int = Field(default=3, ge=1, le=5)
    """Correlation order: neighbours that a product involves; a function of one more bodies than that."""

    def build(self, species: SpeciesTable) -> Mace:
        """See `Mace`."""
        return Mace(self, species)


@struct.dataclass
class Surroundings:
    """The parameter-free part.

    Attributes:
        density: [(l_max + 1)^2, A, S' B], sum of the edge basis over neighbours, for each of S' species channels; none
            where an MLP follows the radial functions.
        basis: [A, (l_max + 1)^2, B, K], harmonics times radial functions of the edges, where sums come first.
        edges: radial functions and coupled harmonics of the edges, where they do not.
    """

    density: jax.Array | None
    basis: jax.Array | None
    edges: Edges | None


@dataclass(frozen=True)
class Mace(ConvolutionalModel):
    """The model as pure functions; see the module's text."""

    settings: MaceSettings

    @property
    def paths(self) -> tuple[Path, ...]:
        """Couplings that any layer uses."""
        s = self.settings
        return paths_between(s.l_max, s.hidden_l_max if s.layers > 1 else 0, s.l_max)

    @property
    def module(self) -> nn.Module:
        """The module with all parameters."""
        return _Layers(self.settings, self.species, self.paths)

    @property
    def last_names(self) -> tuple[str, ...]:
        """Those of the read-outs of earlier layers too; see `LinearLast.last_names`."""
        return *super().last_names, *(f"read_{layer}" for layer in range(self.settings.layers - 1))

    @property
    def _by_species(self) -> dict[str, int]:
        few = len(self.species) <= self.settings.species_channels
        return super()._by_species | ({"weights_.*": 1, "first_.*": 1} if few else {})

    def _of_new_species(self, name: str, ratio: jax.Array) -> jax.Array | float:
        """Densities of new species enter in the size that they have in a fresh model, products of messages no larger.

        Too large ones would grow with the third power from layer to layer; small ones leave the rest as it is.
        """
        found = re.fullmatch(r"(first|weights)_(\d+)(?:_(\d+))?", name)
        if found is None:
            return 1.0
        if found[1] == "first":
            return ratio[int(found[2])]
        if found[2] == "0" and not self.settings.radial_hidden:  # products of the density
            return 1.0
        mean = jnp.minimum(jnp.exp(jnp.mean(jnp.log(ratio))), 1.0)
        return mean**2 if found[3] == "2" else mean

    def geometry(self, graph: Graph) -> Surroundings:  # type: ignore[override]
        """What the edges contribute without a parameter; differentiable in ``graph.vectors``."""
        s = self.settings
        if s.radial_hidden:
            return Surroundings(None, None, super().geometry(graph))
        plain = self._plain_edges(graph)
        harmonics = jnp.concatenate(plain.coupled, axis=1)
        codes = neighbor_code(graph, self.species, s.species_channels, plain.radial.dtype)
        functions = (codes[..., None] * plain.radial[:, :, None]).reshape(*graph.neighbors.shape, -1)
        density = jnp.einsum("alk,akf->laf", harmonics, functions)
        if s.layers == 1:
            return Surroundings(density, None, None)
        if graph.neighbors.shape[1] < _MANY_SLOTS:
            return Surroundings(density, None, super().geometry(graph))
        return Surroundings(density, edge_basis(harmonics, plain.radial.swapaxes(1, 2)), None)

    def _plain_edges(self, graph: Graph) -> Edges:
        """Radial functions, and harmonics that are coupled with nothing."""
        s = self.settings
        return edge_functions(
            graph,
            paths_between(s.l_max, 0, s.l_max),
            cutoff=s.cutoff,
            cutoff_power=s.cutoff_power,
            basis=s.radial_basis,
            count=s.radial,
        )

    def survey(self, graph: Graph) -> Survey:
        """Mean squares of sums over neighbours, without weights and for harmonics of random sign."""
        s = self.settings
        edges = self._plain_edges(graph)
        count = (s.l_max + 1) ** 2
        incoherent = jnp.broadcast_to(incoherent_sums(graph, edges.radial), (count, len(graph.atom_mask)))
        if s.radial_hidden:
            return self._with_states(sums_by_degree(incoherent, incoherent, graph, s.l_max), graph)
        total = jnp.einsum("alk,akb->lab", jnp.concatenate(edges.coupled, axis=1), edges.radial)  # [LM, A, B]
        return self._with_states(sums_by_degree(jnp.mean(total**2, axis=-1), incoherent, graph, s.l_max), graph)

    def standardise(self, params: Params, survey: Survey, energy_scale: float) -> Params:
        """Sets the scale of messages, for each degree of the edges, and that of the energy; see `Model.standardise`.

        A sum over neighbours is taken to be as large as it is without weights, or as for harmonics of random sign if
        that is more: by symmetry, the former may vanish where the neighbours' features do not.
        """
        squares = jnp.maximum(survey["squares"], survey["incoherent"]) / jnp.maximum(survey["atoms"], 1)
        squares = jnp.maximum(squares, LEAST_SQUARE)
        known = self._scaled_states(params, survey)
        return with_constants(known, message_scale=jax.lax.rsqrt(squares), energy_scale=energy_scale)


class _Layers(nn.Module):
    settings: MaceSettings
    species: SpeciesTable
    paths: tuple[Path, ...]

    @nn.compact
    def __call__(self, geometry: Surroundings, graph: Graph) -> tuple[jax.Array, jax.Array]:
        s = self.settings
        dtype = jax.tree.leaves(geometry)[0].dtype
        exact = exact_code(graph, self.species, dtype)
        code = central_code(self, exact, s.species_channels)
        scale = constant(self, "message_scale", (s.l_max + 1,))
        features: Irreps = (first_features(self, exact, graph, s)[None],)
        energy = exact @ self.param("species_bias", nn.initializers.zeros, (len(self.species),))
        for layer in range(s.layers):
            highest = s.hidden_l_max if layer < s.layers - 1 else 0
            if layer == 0 and geometry.density is not None:
                gathered = self._first(scale, geometry.density)
            else:
                gathered = self._gather(layer, features, scale, geometry, graph)
            many_body = self._many_body(layer, gathered, highest, code)
            own = SpeciesLinear(s.channels, name=f"own_{layer}")(features[: highest + 1], code)
            features = tuple(b + own[n] if n < len(own) else b for n, b in enumerate(many_body))
            if layer < s.layers - 1:
                energy = energy + nn.Dense(1, use_bias=False, name=f"read_{layer}")(features[0][0])[:, 0]
        x = features[0][0]
        for n, width in enumerate(s.read_out):
            x = nn.silu(nn.Dense(width, name=f"read_out_{n}")(x))
        last = self.param("last", nn.initializers.normal(0.1), (len(self.species), x.shape[-1]))
        energy = energy + jnp.sum(x * (exact @ last), axis=-1) / math.sqrt(x.shape[-1])
        return constant(self, "energy_scale") * energy, x

    def _first(self, scale: jax.Array, density: jax.Array) -> Irreps:
        """A of the first layer, [2l+1, A, C] for l up to ``l_max``: weights of species, radial function and channel."""
        s = self.settings
        spread, mixed = nn.initializers.normal(1 / np.sqrt(s.radial)), []
        for degree, block in enumerate(split(density, tuple(2 * n + 1 for n in range(s.l_max + 1)), 0)):
            weights = self.param(f"first_{degree}", spread, (block.shape[-1], s.channels))
            mixed.append(block @ (scale[degree] * weights))
        return tuple(mixed)

    def _gather(self, layer: int, features: Irreps, scale: jax.Array, geometry: Surroundings, graph: Graph) -> Irreps:
        """A of a layer, [2l+1, A, C] for l up to ``l_max``, from the features of the neighbours."""
        s = self.settings
        chosen = [n for n, path in enumerate(self.paths) if path.neighbor < len(features)]
        by_path = scale[np.array([self.paths[n].edge for n in chosen])][:, None]
        mixed = DegreeLinear(s.channels, name=f"before_{layer}")(features)
        if s.radial_hidden:
            assert geometry.edges is not None
            radial = RadialWeights(len(chosen), s.channels, s.radial_hidden, name=f"radial_{layer}")
            of_edges = by_path * radial(geometry.edges.radial, graph.edge_mask)
            messages = convolve(mixed, of_edges, geometry.edges, self.paths, chosen, graph)
        else:
            spread = nn.initializers.normal(1 / np.sqrt(s.radial))
            weights = self.param(f"radial_{layer}", spread, (len(chosen), s.radial, s.channels)) * by_path[..., None]
            if geometry.edges is None:
                assert geometry.basis is not None
                messages = list(messages_of_sums(mixed, weights, geometry.basis, graph))
            else:
                # the radial functions vanish in padding slots
                of_edges = jnp.einsum("akb,pbc->akpc", geometry.edges.radial, weights)
                messages = convolve(mixed, of_edges, geometry.edges, self.paths, chosen, graph)
        return DegreeLinear(s.channels, name=f"after_{layer}")(by_degree(messages, [self.paths[n].out for n in chosen]))

    def _many_body(self, layer: int, gathered: Irreps, highest: int, code: jax.Array) -> Irreps:
        """Products of A with itself up to the correlation order, mixed, for degrees up to ``highest``."""
        s = self.settings
        product, found = gathered, [gathered[: highest + 1]]
        for order in range(2, s.correlation + 1):
            # the last product is only needed as far as it is kept
            top = highest if order == s.correlation else s.l_max
            product = self._product(f"weights_{layer}_{order}", product, gathered, top, order == 2, code)
            found.append(product[: highest + 1])
        degrees = range(max(len(blocks) for blocks in found))
        stacked = [side_by_side([blocks[d] for blocks in found if d < len(blocks)]) for d in degrees]
        return DegreeLinear(s.channels, name=f"mix_{layer}")(stacked)

    def _product(self, name: str, left: Irreps, right: Irreps, top: int, equal: bool, code: jax.Array) -> Irreps:
        """Sums over the paths of left x right with weights of path, channel and central species, up to degree top."""
        table, factors, counts = _merged_couplings(len(left) - 1, len(right) - 1, top, equal)
        shape = (code.shape[-1], len(factors), right[0].shape[-1])
        spread = 1 / np.sqrt(np.repeat(counts, counts))[:, None]
        weights = self.param(name, lambda key: spread * jax.random.normal(key, shape))
        by_atom = (code @ weights.reshape(len(weights), -1)).reshape(len(code), *shape[1:])
        weighed = [weight * left[degree] for weight, degree in zip(unstack(by_atom, 1), factors, strict=True)]
        return bilinear(table, weighed, right)


def messages_of_sums(features: Irreps, weights: jax.Array, basis: jax.Array, graph: Graph) -> Irreps:
    """Messages of the neighbours with weights linear in the radial functions, the sum over neighbours coming first.

    Args:
        features: of the atoms, [2 l2 + 1, A, C] for each degree.
        weights: [P, B, C] for the P paths of `paths_between`.
        basis: [A, (l_max + 1)^2, B, K] of the edges; 0 in padding slots.
        graph: the structures.

    Returns:
        for each path [2 l3 + 1, A, C], what `models.convolution.convolve` gives for weights ``B_b(r) w_(p,b,c)``.
    """
    components, count = basis.shape[1:3]
    places, table = _coupling(round(np.sqrt(components)) - 1, len(features) - 1)
    told = jnp.concatenate(features).swapaxes(0, 1)  # [A, M, C]
    sums = sum_over_neighbors(basis, neighbors_of(told, graph))  # [A, LM, B, M, C]
    placed = jnp.asarray(places, weights.dtype) @ weights.reshape(len(weights), -1)
    placed = placed.reshape(-1, components, told.shape[1], count, weights.shape[-1])
    return sparse_map(table, weigh_radial(sums, placed.swapaxes(2, 3)))


@jax.custom_vjp
def edge_basis(harmonics: jax.Array, radial: jax.Array) -> jax.Array:
    """Products of harmonics [A, LM, K] and radial functions [A, B, K] of each edge, [A, LM, B, K]."""
    return harmonics[:, :, None] * radial[:, None]


def _edge_basis_backward(edges: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    # sums written out run along the slots, which are contiguous
    harmonics, radial = edges
    by_radial = zip(unstack(cotangent, 2), unstack(radial, 1), strict=True)
    to_harmonics = sum(c * b[:, None] for c, b in by_radial)
    by_component = zip(unstack(cotangent, 1), unstack(harmonics, 1), strict=True)
    to_radial = sum(c * y[:, None] for c, y in by_component)
    return to_harmonics, to_radial  # type: ignore[return-value]


edge_basis.defvjp(lambda *edges: (edge_basis(*edges), edges), _edge_basis_backward)


@jax.custom_vjp
def sum_over_neighbors(basis: jax.Array, values: jax.Array) -> jax.Array:
    """Sum over the slots of each atom of functions [A, LM, B, K] times values [A, K, M, C], [A, LM, B, M, C].

    The derivatives are spelt out because the order of their axes decides their speed.
    """
    return jnp.einsum("albk,akmc->albmc", basis, values)


def _sum_backward(factors: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    basis, values = factors
    to_basis = jnp.einsum("albmc,akmc->albk", cotangent, values)
    return to_basis, jnp.einsum("albk,albmc->akmc", basis, cotangent)


sum_over_neighbors.defvjp(lambda *factors: (sum_over_neighbors(*factors), factors), _sum_backward)

Slots: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]
"""Neighbours, opposite slots and edge mask of a graph, each [A, K]."""


def neighbors_of(values: jax.Array, graph: Graph) -> jax.Array:
    """Values [A, M, C] of the atom at the other end of each edge, [A, K, M, C]; 0 in padding slots."""
    return _spread(values, (graph.neighbors, graph.reverse, graph.edge_mask))


@jax.custom_vjp
def _spread(values: jax.Array, slots: Slots) -> jax.Array:
    return values[slots[0]]


@jax.custom_vjp
def _collect(values: jax.Array, slots: Slots) -> jax.Array:
    """The transpose of `_spread`: what an atom's neighbours hold for it lies in the opposite slots."""
    neighbors, reverse, mask = slots
    return jnp.sum(jnp.where(mask[..., None, None], values[neighbors, reverse], 0), axis=1)


_spread.defvjp(lambda x, slots: (_spread(x, slots), slots), lambda slots, c: (_collect(c, slots), None))
_collect.defvjp(lambda x, slots: (_collect(x, slots), slots), lambda slots, c: (_spread(c, slots), None))


@jax.custom_vjp
def weigh_radial(sums: jax.Array, weights: jax.Array) -> tuple[jax.Array, ...]:
    """Sums over radial functions b of sums [A, LM, B, M, C] times weights [N, LM, B, M, C]: N of [A, LM, M, C]."""
    parts = unstack(sums, 2)
    return tuple(
        sum(x * w for x, w in zip(parts, unstack(one, 1), strict=True))  # type: ignore[misc]
        for one in unstack(weights, 0)
    )


def _weigh_backward(
    factors: tuple[jax.Array, jax.Array], cotangent: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    sums, weights = factors
    terms = [w * c[:, :, None] for w, c in zip(unstack(weights, 0), cotangent, strict=True)]
    to_weights = [jnp.einsum("albmc,almc->lbmc", sums, c) for c in cotangent]
    return sum(terms[1:], terms[0]), stack(tuple(to_weights), 0)


weigh_radial.defvjp(lambda *factors: (weigh_radial(*factors), factors), _weigh_backward)


SparseTable: TypeAlias = tuple[tuple[tuple[tuple[int, int, int, float], ...], ...], ...]
"""For each output block and each of its components, the terms (block, LM, M, coefficient) to sum."""


def sparse_map(table: SparseTable, blocks: tuple[jax.Array, ...]) -> Irreps:
    """Sums of components of blocks [A, LM, M, C] with given coefficients: [2l+1, A, C] for each output block."""
    return _sparse_map(table, tuple(block.shape[1:3] for block in blocks), blocks)


def _sparse_map_plain(table: SparseTable, shapes: tuple, blocks: tuple[jax.Array, ...]) -> Irreps:
    rows = []
    for block in table:
        sums = []
        for terms in block:
            found = [np.asarray(c, blocks[n].dtype) * blocks[n][:, i, j] for n, i, j, c in terms]
            sums.append(sum(found[1:], found[0]))
        rows.append(jnp.stack(sums))
    return tuple(rows)


def _sparse_map_transposed(table: SparseTable, shapes: tuple, cotangent: Irreps) -> tuple[jax.Array, ...]:
    found: list[list[list[list[jax.Array]]]] = [[[[] for _ in range(m)] for _ in range(lm)] for lm, m in shapes]
    for o, block in enumerate(table):
        for k, terms in enumerate(block):
            for n, i, j, c in terms:
                found[n][i][j].append(cotangent[o][k] * np.asarray(c, cotangent[o].dtype))
    zero = jnp.zeros_like(cotangent[0][0])
    return tuple(
        jnp.stack([jnp.stack([sum(t[1:], t[0]) if t else zero for t in row], axis=1) for row in block], axis=1)
        for block in found
    )


_sparse_map = jax.custom_vjp(_sparse_map_plain, nondiff_argnums=(0, 1))
_sparse_transposed = jax.custom_vjp(_sparse_map_transposed, nondiff_argnums=(0, 1))
_sparse_map.defvjp(
    lambda table, shapes, blocks: (_sparse_map(table, shapes, blocks), None),
    lambda table, shapes, _, cotangent: (_sparse_transposed(table, shapes, tuple(cotangent)),),
)
_sparse_transposed.defvjp(
    lambda table, shapes, blocks: (_sparse_transposed(table, shapes, blocks), None),
    lambda table, shapes, _, cotangent: (_sparse_map(table, shapes, tuple(cotangent)),),
)


@cache
def _coupling(l_max: int, highest: int) -> tuple[np.ndarray, SparseTable]:
    """How sums over neighbours with features of degrees 0 to ``highest`` are weighted and coupled.

    Returns:
        where the weights of each of the P paths of `paths_between` stand, [N (l_max + 1)^2 (highest + 1)^2, P], the
        n-th of N holding the n-th coupling of a pair of degrees; and the coefficients of the N weighted sums.
    """
    paths = paths_between(l_max, highest, l_max)
    pairs = [(path.edge, path.neighbor) for path in paths]
    rows = [pairs[:n].count(pair) for n, pair in enumerate(pairs)]
    places = np.zeros((max(rows) + 1, (l_max + 1) ** 2, (highest + 1) ** 2, len(paths)))
    table = []
    for n, (row, path) in enumerate(zip(rows, paths, strict=True)):
        first, second = path.edge**2, path.neighbor**2
        places[row, first : (path.edge + 1) ** 2, second : (path.neighbor + 1) ** 2, n] = 1
        coefficients = path.coefficients
        found = np.argwhere(np.abs(coefficients) > 1e-12).tolist()
        table.append(
            tuple(
                tuple((row, first + i, second + j, float(coefficients[i, j, k])) for i, j, m in found if m == k)
                for k in range(2 * path.out + 1)
            )
        )
    return places.reshape(-1, len(paths)), tuple(table)


@cache
def _merged_couplings(
    left: int, right: int, highest: int, equal: bool
) -> tuple[Table, tuple[int, ...], tuple[int, ...]]:
    """`couplings` whose paths of one degree are summed, each with a left factor of its own.

    Returns:
        the table, the degree of each left factor, and how many of them add up to each degree of the result.
    """
    blocks, degrees = couplings(left, right, highest, equal)
    merged: list[list[list]] = [[[] for _ in range(2 * degree + 1)] for degree in range(max(degrees) + 1)]
    factors = []
    for n, (block, degree) in enumerate(zip(blocks, degrees, strict=True)):
        factors.append(next(term[0] for terms in block for term in terms))
        for k, terms in enumerate(block):
            merged[degree][k] += [(n, i, b, j, c) for _, i, b, j, c in terms]
    counts = tuple(degrees.count(degree) for degree in range(len(merged)))
    table = tuple(tuple(tuple(terms) for terms in block) for block in merged)
    return table, tuple(factors), counts
