"""Convolutions over neighbours: the equivariant messages of NequIP- and MACE-type models.

A message couples the harmonics of an edge with the features of the neighbour,

    m_i[l3, m3] = sum_j w_p(r_ij) sum_(m1, m2) C(l1 m1, l2 m2 | l3 m3) Y_(l1 m1)(r_ij) h_j[l2, m2],

for every path p = (l1, l2, l3) and channel.  The coupled harmonics Z_p[m3, m2] = sum_m1 C Y hold no parameter: they are
made once for all members of an ensemble, and the sum over neighbours and m2 is one small matrix product per atom.
Source: Batzner et al., Nature Communications 13, 2453 (2022), with the coefficients moved to the edges.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from pydantic import Field

from almlip_jax.models.base import (
    LEAST_SQUARE,
    AtomicOutput,
    ModelSettings,
    Params,
    Survey,
    Width,
    sums_by_degree,
)
from almlip_jax.models.bilinear import Irreps, clebsch_gordan
from almlip_jax.models.constants import CONSTANTS, as_params, as_variables, with_constants
from almlip_jax.models.edges import EdgeBasis, edge_vectors, expand_edges
from almlip_jax.models.electronic import BY_SPECIES, scaled_states, state_features, survey_states
from almlip_jax.models.layout import side_by_side, stack, unstack
from almlip_jax.models.radial import RadialBasisName, radial_basis
from almlip_jax.models.species_code import CodedLast, with_more_species
from almlip_jax.settings import unit
from almlip_jax.structures.graph import Graph, lone_atom, values_at_neighbors
from almlip_jax.structures.species import SpeciesTable


@dataclass(frozen=True)
class Path:
    """One coupling: harmonics of degree ``edge`` with features of degree ``neighbor`` to messages of degree ``out``."""

    edge: int
    neighbor: int
    out: int

    @property
    def coefficients(self) -> np.ndarray:
        """[2 l1 + 1, 2 l2 + 1, 2 l3 + 1], with which normal factors give components of variance 1."""
        found = clebsch_gordan(self.edge, self.neighbor, self.out)
        return found * np.sqrt((2 * self.out + 1) / np.sum(found**2))


@cache
def paths_between(edge: int, neighbor: int, out: int) -> tuple[Path, ...]:
    """All couplings of degrees up to the given ones whose result has the parity of a true tensor, by ``out``."""
    return tuple(
        Path(l1, l2, l3)
        for l3 in range(out + 1)
        for l2 in range(neighbor + 1)
        for l1 in range(edge + 1)
        if abs(l1 - l2) <= l3 <= l1 + l2 and (l1 + l2 + l3) % 2 == 0
    )


@struct.dataclass
class Edges:
    """The parameter-free part of a convolution.

    Attributes:
        radial: [A, K, B] radial functions times the cutoff function.
        coupled: for each path [A, 2 l3 + 1, (2 l2 + 1) K], coupled harmonics; 0 in padding slots.
        distance: [A, K] Angstrom; the cutoff in padding slots.
    """

    radial: jax.Array
    coupled: tuple[jax.Array, ...]
    distance: jax.Array


def edge_functions(
    graph: Graph, paths: Sequence[Path], *, cutoff: float, cutoff_power: int, basis: str, count: int
) -> Edges:
    """Radial functions and coupled harmonics of all edges; differentiable in ``graph.vectors``.

    Args:
        graph: the structures.
        paths: couplings wanted.
        cutoff: Angstrom.
        cutoff_power: of the polynomial cutoff.
        basis: name of the radial functions.
        count: number of radial functions B.
    """
    x, y, z = edge_vectors(graph, cutoff)
    expansion = EdgeBasis(cutoff, cutoff_power, count, max(path.edge for path in paths), basis)
    functions, harmonics = expand_edges(expansion, graph.edge_mask, (x, y, z))
    radial = jnp.swapaxes(functions, 1, 2)
    if radial_basis(basis).by_order:  # functions of higher frequency start with less weight and learn more slowly
        radial = radial / np.arange(1, count + 1, dtype=radial.dtype)
    components = unstack(harmonics, 1)
    return Edges(radial, tuple(_coupled(path, components) for path in paths), jnp.sqrt(x**2 + y**2 + z**2))


def _coupled(path: Path, harmonics: Sequence[jax.Array]) -> jax.Array:
    """Z of one path, [A, 2 l3 + 1, (2 l2 + 1) K]."""
    coefficients, own = path.coefficients, harmonics[path.edge**2 : (path.edge + 1) ** 2]
    rows = []
    for m3 in range(2 * path.out + 1):
        for m2 in range(2 * path.neighbor + 1):
            terms = [
                np.asarray(c, own[0].dtype) * y
                for c, y in zip(coefficients[:, m2, m3], own, strict=True)
                if abs(c) > 1e-12
            ]
            rows.append(sum(terms[1:], terms[0]) if terms else jnp.zeros_like(own[0]))
    atoms, slots = own[0].shape
    return stack(tuple(rows), 1).reshape(atoms, 2 * path.out + 1, (2 * path.neighbor + 1) * slots)


def convolve(
    features: Irreps, weights: jax.Array, edges: Edges, paths: Sequence[Path], chosen: Sequence[int], graph: Graph
) -> list[jax.Array]:
    """Messages of the neighbours along some paths.

    Args:
        features: of the atoms, [2 l2 + 1, A, C] for each degree.
        weights: [A, K, P, C], w_p of each edge, path and channel; the cutoff function is in them.
        edges: the parameter-free part.
        paths: couplings that ``edges`` holds.
        chosen: indices of the P paths to take.
        graph: the structures.

    Returns:
        for each chosen path [2 l3 + 1, A, C], the sum over neighbours.
    """
    atoms, slots, _, channels = weights.shape
    at_neighbors = [
        # [A, 2 l2 + 1, K, C]
        jnp.moveaxis(jax.vmap(lambda values: values_at_neighbors(values, graph))(block), 0, 1)
        for block in features
    ]
    found = []
    for n, index in enumerate(chosen):
        weighted = weights[:, None, :, n] * at_neighbors[paths[index].neighbor]
        flat = weighted.reshape(atoms, -1, channels)
        found.append(jnp.moveaxis(jnp.einsum("amx,axc->amc", edges.coupled[index], flat), 1, 0))
    return found


class RadialWeights(nn.Module):
    """Weights of edges, paths and channels as a function of distance: linear in the basis, or an MLP of it."""

    paths: int
    channels: int
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, radial: jax.Array, edge_mask: jax.Array) -> jax.Array:
        """[A, K, P, C] from the radial functions [A, K, B]; 0 where there is no edge."""
        # without biases, what vanishes at the cutoff with two derivatives goes on doing so
        x = radial
        for n, width in enumerate(self.hidden):
            spread = nn.initializers.normal(1 / np.sqrt(x.shape[-1]))
            x = nn.silu(nn.Dense(width, use_bias=False, kernel_init=spread, name=f"hidden_{n}")(x))
        spread = nn.initializers.normal(1 / np.sqrt(x.shape[-1]))
        x = nn.Dense(self.paths * self.channels, use_bias=False, kernel_init=spread, name="out")(x)
        return jnp.where(edge_mask[..., None, None], x.reshape(*radial.shape[:2], self.paths, self.channels), 0)


class SpeciesLinear(nn.Module):
    """Linear maps of channels with weights of the central species, one for each degree."""

    channels: int

    @nn.compact
    def __call__(self, features: Irreps, code: jax.Array) -> Irreps:
        """[2l+1, A, C'] for each degree from [2l+1, A, C] and the species code [A, Q]."""
        mixed = []
        for degree, block in enumerate(features):
            x = (code[:, :, None] * block[:, :, None, :]).reshape(*block.shape[:2], -1)
            spread = nn.initializers.normal(1 / np.sqrt(block.shape[-1]))
            mixed.append(x @ self.param(f"weights_{degree}", spread, (x.shape[-1], self.channels)))
        return tuple(mixed)


class DegreeLinear(nn.Module):
    """Linear maps of channels, one for each degree."""

    channels: int

    @nn.compact
    def __call__(self, features: Sequence[jax.Array]) -> Irreps:
        """[2l+1, A, C'] for each degree from [2l+1, A, C]."""
        mixed = []
        for degree, block in enumerate(features):
            spread = nn.initializers.normal(1 / np.sqrt(block.shape[-1]))
            mixed.append(block @ self.param(f"weights_{degree}", spread, (block.shape[-1], self.channels)))
        return tuple(mixed)


def by_degree(blocks: Sequence[jax.Array], degrees: Sequence[int]) -> list[jax.Array]:
    """Blocks [2l+1, A, C] of equal degree side by side in the channels, from degree 0 up."""
    return [
        side_by_side([block for block, d in zip(blocks, degrees, strict=True) if d == degree])
        for degree in range(max(degrees) + 1)
    ]


def incoherent_sums(graph: Graph, radial: jax.Array) -> jax.Array:
    """Variance of a sum over neighbours of linear radial functions [A, K, B] with random weights, for each atom [A]."""
    return jnp.sum(jnp.where(graph.edge_mask, jnp.mean(radial**2, axis=-1), 0), axis=1)


class ConvolutionalSettings(ModelSettings):
    """What NequIP- and MACE-type models have in common."""

    cutoff: float = Field(default=5.0, ge=1.0, le=20.0, json_schema_extra=unit("Angstrom"))
    """Radius of an atom's surroundings, Angstrom; each further layer widens what an atom sees by as much."""
    cutoff_power: int = Field(default=5, ge=3, le=20)
    """Power of the polynomial cutoff; a smaller one lets far neighbours fade earlier."""
    radial_basis: RadialBasisName = "bessel"
    """Kind of radial functions."""
    radial: int = Field(default=8, ge=2, le=64)
    """Number of radial functions."""
    radial_hidden: tuple[Width, ...] = Field(default=(), max_length=16)
    """Widths of an MLP between radial functions and the weights of messages; none makes these linear in them."""
    l_max: int = Field(default=3, ge=0, le=4)
    """Highest degree of the spherical harmonics of an edge."""
    hidden_l_max: int = Field(default=1, ge=0, le=4)
    """Highest degree of the features of an atom."""
    channels: int = Field(default=32, ge=1, le=4096)
    """Channels of the features, for each degree."""
    layers: int = Field(default=2, ge=1, le=10)
    """Number of layers."""
    read_out: tuple[Width, ...] = Field(default=(32,), min_length=1, max_length=16)
    """Widths of the read-out MLP; the last one is the number of features of an atom."""
    species_channels: int = Field(default=8, ge=1, le=118)
    """Largest number of species told apart one by one; more share as many directions of a learned embedding."""
    electronic_state: bool = False
    """Whether atoms are told the total charge and the spin multiplicity of their structure, so that one composition may
    come in several states; neutral singlets are as without."""


@dataclass(frozen=True)
class ConvolutionalModel(CodedLast):
    """A model whose parameters sit in one Flax module that takes the `Edges` of a graph; see `models.base.Model`.

    Attributes:
        settings: shape of the model.
        species: the species table.
    """

    settings: ConvolutionalSettings
    species: SpeciesTable
    targets: ClassVar[tuple[str, ...]] = ()
    small_members: ClassVar[bool] = False  # the weights of messages are arrays of edges, paths and channels
    long_range: ClassVar[bool] = False
    local: ClassVar[bool] = False  # atoms hear of their neighbours

    @property
    def cutoff(self) -> float:
        """Angstrom."""
        return self.settings.cutoff

    @property
    def num_species(self) -> int:
        """Length of the species table."""
        return len(self.species)

    @property
    def sees_state(self) -> bool:
        """As its settings say."""
        return self.settings.electronic_state

    @property
    @abstractmethod
    def paths(self) -> tuple[Path, ...]:
        """Couplings that any layer uses."""

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """The module with all parameters, ``(edges, graph) -> energy [A], features [A, F]``."""

    def geometry(self, graph: Graph) -> Edges:
        """Radial functions and coupled harmonics of all edges; differentiable in ``graph.vectors``."""
        s = self.settings
        return edge_functions(
            graph, self.paths, cutoff=s.cutoff, cutoff_power=s.cutoff_power, basis=s.radial_basis, count=s.radial
        )

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters of one model."""
        lone = lone_atom()
        return as_params(self.module.init(key, self.geometry(lone), lone))

    def survey(self, graph: Graph) -> Survey:
        """Variances of sums over neighbours."""
        incoherent = incoherent_sums(graph, self.geometry(graph).radial)[None]
        return self._with_states(sums_by_degree(incoherent, incoherent, graph, 0), graph)

    def _with_states(self, survey: Survey, graph: Graph) -> Survey:
        return survey | survey_states(graph) if self.settings.electronic_state else survey

    def _scaled_states(self, params: Params, survey: Survey) -> Params:
        return scaled_states(params, survey) if self.settings.electronic_state else params

    def standardise(self, params: Params, survey: Survey, energy_scale: float) -> Params:
        """Sets the scale of messages and that of the energy; see `Model.standardise`."""
        square = jnp.maximum(survey["incoherent"][0] / jnp.maximum(survey["atoms"], 1), LEAST_SQUARE)
        known = self._scaled_states(params, survey)
        return with_constants(known, message_scale=jax.lax.rsqrt(square), energy_scale=energy_scale)

    @property
    def _by_species(self) -> dict[str, int]:
        """Parameters whose first axis runs over the species; see `species_code.with_more_species`."""
        always = {"species_bias": 1, "embedding": 1, "last": 1, **BY_SPECIES}
        many = len(self.species) > self.settings.species_channels
        return always | ({"species_code": 1} if many else {"own_.*": 1})

    def with_species(self, params: Params, fresh: Params, wanted: SpeciesTable) -> Params:
        """Parameters for more species that predict the same as before for the old ones; see `Model.with_species`."""
        width = self.settings.species_channels
        ratio = fresh[CONSTANTS]["message_scale"] / params[CONSTANTS]["message_scale"]

        def factor(name: str) -> jax.Array | float:
            return self._of_new_species(name, ratio)

        return with_more_species(params, fresh, self.species, wanted, width, self._by_species, factor)

    def _of_new_species(self, name: str, ratio: jax.Array) -> jax.Array | float:
        """By what new species enter more strongly in a parameter, where a fresh model has ``ratio`` times the scale.

        Messages come in linearly, and gates bound what follows from them.
        """
        return 1.0

    def apply(self, params: Params, geometry: Edges, graph: Graph) -> AtomicOutput:
        """Energies [A] and features [A, F]."""
        energy, features = cast(Any, self.module.apply(as_variables(params), geometry, graph))
        return AtomicOutput(energy=energy, features=features)


def first_features(module: nn.Module, exact: jax.Array, graph: Graph, settings: ConvolutionalSettings) -> jax.Array:
    """Scalars that atoms begin with, [A, C]: an embedding of the species, and what they are told of charge and spin."""
    embedding = module.param("embedding", nn.initializers.normal(1.0), (exact.shape[-1], settings.channels))
    features = exact @ embedding
    if not settings.electronic_state:
        return features
    return features + state_features(module, graph, exact, settings.channels)
