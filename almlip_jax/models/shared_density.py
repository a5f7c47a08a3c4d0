"""The shared-density model: one atomic density without parameters, many-body invariants by equivariant products.

The density of atom i expands its neighbours in radial functions B_b and spherical harmonics Y_lm, species by species,

    A0[i, (s, b), lm] = sum_j delta(z_j, s) B_b(r_ij) Y_lm(r_ij),

and holds no parameter: members of an ensemble share it.  Each model then mixes A0 with weights that depend on the
central species into channels h of irreps 0 + 1 + ... + l_max, couples h with itself by Clebsch-Gordan products into
r_2, r_2 with h into r_3, and so on, and forms the invariants h_0 and <r_n, r_m>_l: with one product, functions of 2 to
5 bodies.  A small MLP reads them out.  The construction is an atomic cluster expansion (Drautz, Phys. Rev. B 99,
014104, 2019) whose products are taken pairwise, as in MACE (Batatia et al., NeurIPS 2022), with the sum over neighbours
moved before every parameter.

Message-passing layers on top repeat this with densities that neighbours weight by what they know of themselves,

    A_t[i, (c, b), lm] = sum_j u_c(j) B_b(r_ij) Y_lm(r_ij),

u being linear in the features of the layer before.  Radial functions and harmonics are still shared by the members.

Arrays are component-major, [2l+1, A, channels] for each degree: Clebsch-Gordan products then are sums of a few products
of contiguous arrays (`models.bilinear`), and every map with parameters is a plain matrix product.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from pydantic import Field, model_validator

from almlip_jax.models.base import (
    LEAST_SQUARE,
    AtomicOutput,
    ModelSettings,
    Params,
    Survey,
    Width,
    sums_by_degree,
)
from almlip_jax.models.bilinear import Irreps, bilinear, couplings, inner_products
from almlip_jax.models.constants import CONSTANTS, as_params, as_variables, constant, with_constants
from almlip_jax.models.dipoles import molecular_dipoles
from almlip_jax.models.edges import EdgeBasis, edge_vectors, expand_edges
from almlip_jax.models.electronic import BY_SPECIES, scaled_states, state_features, survey_states
from almlip_jax.models.layout import side_by_side, split, unstack
from almlip_jax.models.species_code import CodedLast, central_code, exact_code, neighbor_code, with_more_species
from almlip_jax.structures.graph import Graph, lone_atom, values_at_neighbors
from almlip_jax.structures.species import SpeciesTable

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"channels": 12, "l_max": 2, "coupled_l_max": 1, "radial": 6, "hidden": (32,)},
    "small": {"channels": 16, "l_max": 2, "coupled_l_max": 2, "hidden": (64, 64)},
    "medium": {"channels": 24, "l_max": 3, "coupled_l_max": 2, "hidden": (64, 64)},
    "large": {"channels": 32, "l_max": 3, "coupled_l_max": 3, "hidden": (96, 96)},
}
"""Named sizes: what `SharedDensitySettings.size` stands for where the settings do not say otherwise."""


class SharedDensitySettings(ModelSettings):
    """Shape of the shared-density model."""

    kind: Literal["shared_density"] = "shared_density"
    size: Literal["tiny", "small", "medium", "large"] = "medium"
    """Named size, which decides `channels`, `l_max`, `coupled_l_max`, `hidden` and, for ``tiny``, `radial` where they
    are not given."""
    radial: int = Field(default=8, ge=2, le=64)
    """Number of radial Bessel functions."""
    l_max: int = Field(default=3, ge=0, le=6)
    """Highest degree of the spherical harmonics."""
    coupled_l_max: int = Field(default=2, ge=0, le=6)
    """Highest degree of the products that are formed; `l_max` where that is smaller."""
    products: int = Field(default=1, ge=0, le=4)
    """Equivariant products taken one after the other; the correlation order is twice one more than that."""
    channels: int = Field(default=24, ge=1, le=4096)
    """Channels of the mixed density."""
    coupled_channels: int | None = Field(default=None, ge=1, le=4096)
    """How many of the channels take part in products, the others entering to second order only; all of them where not
    given, and no more than there are."""
    hidden: tuple[Width, ...] = Field(default=(64, 64), min_length=1, max_length=16)
    """Widths of the read-out MLP; the last one is the number of features of an atom."""
    layers: int = Field(default=0, ge=0, le=4)
    """Message-passing layers on top; each widens what an atom sees by the cutoff."""
    message_channels: int = Field(default=8, ge=1, le=1024)
    """Numbers that an atom tells its neighbours in each message-passing layer."""
    species_channels: int = Field(default=8, ge=1, le=118)
    """Largest number of species told apart one by one; more than that share as many directions of an embedding."""
    cutoff_power: int = Field(default=3, ge=3, le=20)
    """Power of the polynomial cutoff; a smaller one lets far neighbours fade earlier."""
    dipole: bool = False
    """Whether the model also gives the dipole of molecules, from charges and dipoles of their atoms; it then learns
    from labels with dipoles (`training.loss.dipole`)."""
    electronic_state: bool = False
    """Whether atoms are told the total charge and the spin multiplicity of their structure, so that one composition may
    come in several states; neutral singlets are as without."""

    @property
    def coupled(self) -> int:
        """How many channels take part in products."""
        return self.channels if self.coupled_channels is None else min(self.coupled_channels, self.channels)

    @property
    def further(self) -> tuple[str, ...]:
        """The dipole, where asked for."""
        return ("dipole",) if self.dipole else ()

    @model_validator(mode="after")
    def _dipoles_are_vectors(self) -> Self:
        if self.dipole and self.l_max < 1:
            raise ValueError("a dipole needs harmonics of degree 1: raise l_max, or leave dipole out.")
        return self

    @model_validator(mode="before")
    @classmethod
    def _take_size(cls, given: Any) -> Any:
        size = given.get("size") if isinstance(given, dict) else None
        return SIZES[size] | given if isinstance(size, str) and size in SIZES else given

    def build(self, species: SpeciesTable) -> SharedDensity:
        """See `SharedDensity`."""
        return SharedDensity(self, species)

    def kept_beside(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """All but what a named size decides, where the size changes."""
        kept = super().kept_beside(changes)
        return {key: value for key, value in kept.items() if "size" not in changes or key not in SIZES["tiny"]}


_AMPLITUDE = 2.0  # root mean square of the scaled density: products of higher order then learn as fast as lower ones
_LEAST_ORDER = 0.1  # least mean square of a degree, as a share of that of neighbours at random: symmetry may leave none
_LAST = 0.1  # spread of the last layer at the start: first forces are small and the first steps stable


@struct.dataclass
class Density:
    """The parameter-free part.

    Attributes:
        values: [(l_max + 1)^2, A, S' B], expansion of the surroundings of each atom, for each of S' species channels.
        radial: [A, B, K] radial functions of the edges, where there are message-passing layers.
        harmonics: [A, (l_max + 1)^2, K] spherical harmonics of the edges, where there are such layers.
    """

    values: jax.Array
    radial: jax.Array | None
    harmonics: jax.Array | None


@dataclass(frozen=True)
class SharedDensity(CodedLast):
    """The model as pure functions; see the module's text.

    Two instances with equal fields are equal, so that what was compiled for one serves the other.

    Attributes:
        settings: shape of the model.
        species: the species table.
    """

    settings: SharedDensitySettings
    species: SpeciesTable
    small_members: ClassVar[bool] = True  # with message passing, the arrays of edges are still few
    long_range: ClassVar[bool] = False

    @property
    def cutoff(self) -> float:
        """Angstrom."""
        return self.settings.cutoff

    @property
    def num_species(self) -> int:
        """Length of the species table."""
        return len(self.species)

    @property
    def targets(self) -> tuple[str, ...]:
        """As its settings say."""
        return self.settings.further

    @property
    def local(self) -> bool:
        """Without message passing, and without charge and spin, which all atoms of a structure share."""
        return self.settings.layers == 0 and not self.settings.electronic_state

    @property
    def sees_state(self) -> bool:
        """As its settings say."""
        return self.settings.electronic_state

    @property
    def _module(self) -> _ReadOut:
        return _ReadOut(self.settings, self.species)

    def geometry(self, graph: Graph) -> Density:
        """The atomic density A0 of every atom; differentiable in ``graph.vectors``."""
        s = self.settings
        radial, harmonics = _edge_functions(graph, s)
        codes = jnp.swapaxes(neighbor_code(graph, self.species, s.species_channels, radial.dtype), 1, 2)  # [A, S', K]
        values = _density(harmonics, (codes[:, :, None] * radial[:, None]).reshape(len(radial), -1, radial.shape[-1]))
        return Density(values, radial, harmonics) if s.layers else Density(values, None, None)

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters of one model."""
        lone = lone_atom()
        return as_params(self._module.init(key, self.geometry(lone), lone))

    def survey(self, graph: Graph) -> Survey:
        """Mean squares of the density, degree by degree, and what they would be if neighbours stood at random."""
        s = self.settings
        values = self.geometry(graph).values
        squares = jnp.mean((values * _smoothness(s, values.shape[-1])) ** 2, axis=-1)  # [LM, A]
        radial, harmonics = _edge_functions(graph, s)
        codes = neighbor_code(graph, self.species, s.species_channels, radial.dtype)  # [A, K, S']
        smooth = _smoothness(s, s.radial)[:, None]
        of_edges = jnp.mean(codes**2, axis=-1) * jnp.mean((radial * smooth) ** 2, axis=1)  # [A, K]
        incoherent = jnp.einsum("alk,ak->la", harmonics**2, of_edges)
        found = sums_by_degree(squares, incoherent, graph, s.l_max)
        return found | survey_states(graph) if s.electronic_state else found

    def standardise(self, params: Params, survey: Survey, energy_scale: float) -> Params:
        """Sets the scale of the density, degree by degree, and that of the energy; see `Model.standardise`."""
        found = survey["squares"] / jnp.maximum(survey["atoms"], 1)
        at_random = survey["incoherent"] / jnp.maximum(survey["atoms"], 1)
        scale = _AMPLITUDE / jnp.sqrt(jnp.maximum(jnp.maximum(found, _LEAST_ORDER * at_random), LEAST_SQUARE))
        known = scaled_states(params, survey) if self.settings.electronic_state else params
        return with_constants(known, density_scale=scale, energy_scale=energy_scale)

    def with_species(self, params: Params, fresh: Params, wanted: SpeciesTable) -> Params:
        """Parameters for more species that predict the same as before for the old ones; see `Model.with_species`.

        Densities of new species enter in the size that they have in a fresh model.
        """

        def factor(name: str) -> jax.Array | float:
            mixed = re.fullmatch(r"mix_(?:\d+_)?(\d+)", name)
            fresh_scale, scale = (held[CONSTANTS]["density_scale"] for held in (fresh, params))
            return fresh_scale[int(mixed[1])] / scale[int(mixed[1])] if mixed else 1.0

        width = self.settings.species_channels
        leading = {"species_bias": 1, "charge_bias": 1, **BY_SPECIES}
        if len(self.species) > width:
            leading |= {"species_code": 1}
        else:
            leading |= {"last": 1, "charge_last": 1, r"mix_\d+": 2, r"mix_\d+_\d+": 1}
        return with_more_species(params, fresh, self.species, wanted, width, leading, factor)

    def apply(self, params: Params, geometry: Density, graph: Graph) -> AtomicOutput:
        """Energies [A] and features [A, F] from the density."""
        output: AtomicOutput = self._module.apply(as_variables(params), geometry, graph)  # type: ignore[assignment]
        return output


class _ReadOut(nn.Module):
    """From the density of an atom to its energy and features; all parameters are here."""

    settings: SharedDensitySettings
    species: SpeciesTable

    @nn.compact
    def __call__(self, geometry: Density, graph: Graph) -> AtomicOutput:
        s = self.settings
        exact = exact_code(graph, self.species, geometry.values.dtype)
        code = central_code(self, exact, s.species_channels)
        scales = constant(self, "density_scale", (s.l_max + 1,))
        h = self._mix("mix", geometry.values, code, scales)
        told = state_features(self, graph, exact, s.hidden[0]) if s.electronic_state else None
        x = self._perceptron("", self._invariants("", h), None, told)
        for layer in range(1, s.layers + 1):
            messages = self._messages(layer, x, geometry, graph)
            h = tuple(
                old + new
                for old, new in zip(
                    self._channels(f"keep_{layer}", h), self._mix(f"mix_{layer}", messages, code, scales), strict=True
                )
            )
            x = self._perceptron(f"_{layer}", self._invariants(f"_{layer}", h), x)
        bias = self.param("species_bias", nn.initializers.zeros, (len(self.species),))
        last = self.param("last", nn.initializers.normal(_LAST), (code.shape[-1], x.shape[-1]))
        scale = constant(self, "energy_scale")
        energy = jnp.sum(x @ last.T / math.sqrt(x.shape[-1]) * code, axis=-1) + exact @ bias
        told = None if code is exact else code
        if not s.dipole:
            return AtomicOutput(scale * energy, x, told)
        charges, dipoles = self._charges(x, code, exact), self._dipoles(x, h[1])
        return AtomicOutput(
            scale * energy, x, told, {"dipole": molecular_dipoles(charges, dipoles, graph, self.species)}
        )

    def _charges(self, x: jax.Array, code: jax.Array, exact: jax.Array) -> jax.Array:
        """Charges of the atoms, [A] e, from their features and species."""
        bias = self.param("charge_bias", nn.initializers.zeros, (len(self.species),))
        last = self.param("charge_last", nn.initializers.normal(_LAST), (code.shape[-1], x.shape[-1]))
        found: jax.Array = jnp.sum(x @ last.T / math.sqrt(x.shape[-1]) * code, axis=-1) + exact @ bias
        return found

    def _dipoles(self, x: jax.Array, vectors: jax.Array) -> jax.Array:
        """Dipoles of the atoms, [A, 3] e*Angstrom: channels of degree 1, weighted by functions of the features."""
        channels = vectors.shape[-1]
        last = self.param("dipole_last", nn.initializers.normal(_LAST), (x.shape[-1], channels))
        bias = self.param("dipole_bias", nn.initializers.zeros, (channels,))
        weights = x @ last / math.sqrt(x.shape[-1]) + bias
        found: jax.Array = jnp.sum(vectors * weights, axis=-1).T / np.sqrt(channels)
        return found

    def _mix(self, name: str, density: jax.Array, code: jax.Array, scales: jax.Array) -> Irreps:
        """Linear maps of a density [LM, A, F] into channels, one for each degree and central species, [2l+1, A, C]."""
        s = self.settings
        width, kinds = density.shape[-1], code.shape[-1]
        # each atom's density stands in the slot of its own species: one matrix product then serves all species
        x = density if kinds == 1 else (code[:, :, None] * density[:, :, None, :]).reshape(*density.shape[:2], -1)
        smooth = jnp.tile(_smoothness(s, width), kinds).astype(density.dtype)
        mixed = []
        for degree, block in enumerate(split(x, tuple(2 * l + 1 for l in range(s.l_max + 1)), 0)):
            shape = (kinds * width, s.channels)
            weights = self.param(f"{name}_{degree}", nn.initializers.normal(1 / np.sqrt(width)), shape)
            mixed.append(block @ (weights * (scales[degree] * smooth)[:, None]))
        return tuple(mixed)

    def _channels(self, name: str, h: Irreps) -> Irreps:
        """Linear maps of the channels, one for each degree."""
        spread, shape = nn.initializers.normal(1 / np.sqrt(self.settings.channels)), 2 * (self.settings.channels,)
        return tuple(block @ self.param(f"{name}_{degree}", spread, shape) for degree, block in enumerate(h))

    def _messages(self, layer: int, x: jax.Array, geometry: Density, graph: Graph) -> jax.Array:
        """The density of neighbours weighted by what they tell, [LM, A, c B]."""
        assert geometry.radial is not None and geometry.harmonics is not None
        told = nn.Dense(self.settings.message_channels, name=f"tell_{layer}")(x)  # [A, c]
        told = told * jax.lax.rsqrt(1 + jnp.mean(told**2, axis=-1, keepdims=True))  # bounded, as products follow
        atoms, _, slots = geometry.radial.shape
        heard = jnp.moveaxis(values_at_neighbors(told, graph), 1, 2)  # [A, c, K]
        functions = (heard[:, :, None] * geometry.radial[:, None]).reshape(atoms, -1, slots)
        return _density(geometry.harmonics, functions)

    def _invariants(self, suffix: str, h: Irreps) -> jax.Array:
        """Scalar products of h and the products of h with itself, [A, number of invariants]."""
        s = self.settings
        low = min(s.coupled_l_max, s.l_max)
        found = [h[0], *bilinear(inner_products(s.l_max), h, h)]
        if s.coupled < s.channels:
            h = tuple(block[..., : s.coupled] for block in h)
        previous: Irreps = h
        for n in range(s.products):
            table, degrees = couplings(s.l_max if n == 0 else low, s.l_max, low, n == 0)
            product = self._weigh(f"couple{n or ''}{suffix}", bilinear(table, previous, h), degrees)
            if n:  # the next products stay of the order of the first
                product = tuple(block / _AMPLITUDE**2 for block in product)
            found += bilinear(inner_products(low), product, previous)
            found += bilinear(inner_products(low), product, product)
            previous = product
        return side_by_side([values for block in found for values in unstack(block, 0)])

    def _weigh(self, name: str, products: Irreps, degrees: Sequence[int]) -> Irreps:
        """Products of one degree mixed over channels and paths, [2l+1, A, C] for each degree."""
        channels, mixed = self.settings.coupled, []
        for degree in range(max(degrees) + 1):
            paths = [block for block, d in zip(products, degrees, strict=True) if d == degree]
            spread = nn.initializers.normal(1 / np.sqrt(channels * len(paths)))
            weights = self.param(f"{name}_{degree}", spread, (len(paths) * channels, channels))
            mixed.append(side_by_side(paths) @ weights)
        return tuple(mixed)

    def _perceptron(
        self, suffix: str, x: jax.Array, before: jax.Array | None, told: jax.Array | None = None
    ) -> jax.Array:
        """The MLP of one layer; it adds to the features of the layer before.  ``told`` enters its first hidden one."""
        for n, width in enumerate(self.settings.hidden):
            y = nn.Dense(width, name=f"dense_{n}{suffix}")(x)
            y = nn.silu(y if n or told is None else y + told)
            x = x + y if n and x.shape[-1] == width else y
        return x if before is None else before + x


def _edge_functions(graph: Graph, settings: SharedDensitySettings) -> tuple[jax.Array, jax.Array]:
    """Radial functions [A, B, K] and spherical harmonics [A, (l_max + 1)^2, K] of all edges."""
    s = settings
    basis = EdgeBasis(s.cutoff, s.cutoff_power, s.radial, s.l_max)
    return expand_edges(basis, graph.edge_mask, edge_vectors(graph, s.cutoff))


@jax.custom_vjp
def _density(harmonics: jax.Array, functions: jax.Array) -> jax.Array:
    """Sum over the edges of each atom of harmonics [A, LM, K] times functions [A, F, K], [LM, A, F].

    The derivatives are spelt out because the order of their axes decides their speed: a batch of matrix products in
    row-major order runs several times as fast as one that must be transposed first.
    """
    return jnp.moveaxis(jnp.einsum("alk,afk->alf", harmonics, functions), 0, 1)


def _density_backward(edges: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    harmonics, functions = edges
    by_atom = jnp.moveaxis(cotangent, 1, 0)  # [A, LM, F]
    to_harmonics = jnp.einsum("alf,afk->alk", by_atom, functions)
    return to_harmonics, jnp.einsum("afl,alk->afk", jnp.swapaxes(by_atom, 1, 2), harmonics)


_density.defvjp(lambda *edges: (_density(*edges), edges), _density_backward)


def _smoothness(settings: SharedDensitySettings, width: int) -> jax.Array:
    """Factor 1/n of the n-th radial function, [width].

    A function of higher frequency starts with less weight and learns more slowly, so that few labels give a smooth
    potential: on 170 structures of the Zundel cation this halves the force error.
    """
    return jnp.tile(1.0 / jnp.arange(1, settings.radial + 1), width // settings.radial)
