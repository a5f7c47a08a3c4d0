"""The shared-density model: one atomic density without parameters, many-body invariants by equivariant products.

The density of atom i expands its neighbours in radial functions B_b and spherical harmonics Y_lm, species by species,

    A0[i, (s, b), lm] = sum_j delta(z_j, s) B_b(r_ij) Y_lm(r_ij),

and holds no parameter: members of an ensemble share it.  Each model then mixes A0 with weights that depend on the
central species into channels h of irreps 0 + 1 + ... + l_max, couples h with itself by Clebsch-Gordan products into q,
and forms the invariants h_0, <h, h>_l, <q, h>_l and <q, q>_l: functions of 2, 3, 4 and 5 bodies.  A small MLP reads
them out.  The construction is an atomic cluster expansion (Drautz, Phys. Rev. B 99, 014104, 2019) whose products are
taken pairwise, as in MACE (Batatia et al., NeurIPS 2022), with the sum over neighbours moved before every parameter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import e3nn_jax as e3nn
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from pydantic import Field

from almlip_jax.models.base import AtomicOutput, Params
from almlip_jax.models.radial import bessel_basis, polynomial_cutoff
from almlip_jax.settings import Settings
from almlip_jax.structures.graph import Graph


class SharedDensitySettings(Settings):
    """Shape of the shared-density model."""

    kind: Literal["shared_density"] = "shared_density"
    cutoff: float = Field(default=5.0, gt=0)
    """Radius of an atom's surroundings, Angstrom."""
    radial: int = Field(default=8, ge=2)
    """Number of radial Bessel functions."""
    l_max: int = Field(default=3, ge=0, le=6)
    """Highest degree of the spherical harmonics."""
    coupled_l_max: int = Field(default=2, ge=0, le=6)
    """Highest degree of the products that are formed; `l_max` where that is smaller."""
    channels: int = Field(default=24, ge=1)
    """Channels of the mixed density."""
    hidden: tuple[int, ...] = Field(default=(64, 64), min_length=1)
    """Widths of the read-out MLP; the last one is the number of features of an atom."""
    cutoff_power: int = Field(default=3, ge=3)
    """Power of the polynomial cutoff; a smaller one lets far neighbours fade earlier."""


_AMPLITUDE = 2.0  # root mean square of the scaled density: products of higher order then learn as fast as lower ones
_LAST = 0.1  # spread of the last layer at the start: first forces are small and the first steps stable


@struct.dataclass
class Density:
    """The parameter-free part.

    Attributes:
        values: [A, S * B, (l_max + 1)^2], species-resolved expansion of the surroundings of each atom.
    """

    values: jax.Array


@dataclass(frozen=True)
class SharedDensity:
    """The model as pure functions; see the module's text.

    Two instances with equal fields are equal, so that what was compiled for one serves the other.

    Attributes:
        settings: shape of the model.
        num_species: length of the species table.
    """

    settings: SharedDensitySettings
    num_species: int

    @property
    def cutoff(self) -> float:
        """Angstrom."""
        return self.settings.cutoff

    @property
    def _module(self) -> _ReadOut:
        return _ReadOut(self.settings, self.num_species)

    def geometry(self, graph: Graph) -> Density:
        """The atomic density A0 of every atom; differentiable in ``graph.vectors``."""
        s = self.settings
        # A padding slot gets a vector at the cutoff: its functions vanish there and their derivatives are finite.
        far = jnp.asarray([0.0, 0.0, s.cutoff], graph.vectors.dtype)
        vectors = jnp.where(graph.edge_mask[..., None], graph.vectors, far)
        distance = jnp.sqrt(jnp.sum(vectors**2, axis=-1))
        cut = jnp.where(graph.edge_mask, polynomial_cutoff(distance, s.cutoff, s.cutoff_power), 0)
        radial = bessel_basis(distance, s.cutoff, s.radial) * cut[..., None]  # [A, K, B]
        directions = e3nn.IrrepsArray("1o", vectors / distance[..., None])
        degrees = list(range(s.l_max + 1))
        harmonics = e3nn.spherical_harmonics(degrees, directions, normalize=False, normalization="component").array
        species = jax.nn.one_hot(graph.species[graph.neighbors], self.num_species, dtype=vectors.dtype)
        functions = (species[..., :, None] * radial[..., None, :]).reshape(*radial.shape[:2], -1)  # [A, K, S*B]
        return Density(values=jnp.einsum("akf,akm->afm", functions, harmonics))

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters of one model."""
        width = self.num_species * self.settings.radial
        values = jnp.zeros((1, width, (self.settings.l_max + 1) ** 2))
        return self._module.init(key, values, jnp.zeros((1,), jnp.int32))["params"]

    def standardise(self, params: Params, sample: Graph, energy_scale: float) -> Params:
        """Sets the scale of the density, degree by degree, and that of the energy; see `Model.standardise`."""
        squares = self.geometry(sample).values ** 2  # [A, S*B, LM]
        squares = squares * _smoothness(self.settings, self.num_species)[:, None] ** 2
        atoms = jnp.maximum(jnp.sum(sample.atom_mask), 1)
        per_component = jnp.sum(jnp.where(sample.atom_mask[:, None], jnp.mean(squares, axis=1), 0), axis=0) / atoms
        blocks = [jnp.mean(per_component[d]) for d in _degrees(self.settings.l_max)]
        scale = _AMPLITUDE / jnp.sqrt(jnp.maximum(jnp.stack(blocks), 1e-12))
        return params | {
            "density_scale": scale.astype(params["density_scale"].dtype),
            "energy_scale": jnp.full_like(params["energy_scale"], energy_scale),
        }

    def apply(self, params: Params, geometry: Density, graph: Graph) -> AtomicOutput:
        """Energies [A] and features [A, F] from the density."""
        output: tuple[jax.Array, jax.Array] = self._module.apply(  # type: ignore[assignment]
            {"params": params}, geometry.values, graph.species
        )
        return AtomicOutput(energy=output[0], features=output[1])


class _ReadOut(nn.Module):
    """From the density of an atom to its energy and features; all parameters are here."""

    settings: SharedDensitySettings
    num_species: int

    @nn.compact
    def __call__(self, density: jax.Array, species: jax.Array) -> tuple[jax.Array, jax.Array]:
        s = self.settings
        h = self._mix(density, species)
        q = self._couple(h)
        low = q.shape[-1]
        invariants = [h[..., 0], _inner(h, h), _inner(q, h[..., :low]), _inner(q, q)]
        x = jnp.concatenate(invariants, axis=-1)
        for n, width in enumerate(s.hidden):
            y = nn.silu(nn.Dense(width, name=f"dense_{n}")(x))
            x = x + y if n and x.shape[-1] == width else y
        bias = self.param("species_bias", nn.initializers.zeros, (self.num_species,))
        last = self.param("last", nn.initializers.normal(_LAST), (self.num_species, x.shape[-1]))
        scale = jax.lax.stop_gradient(self.param("energy_scale", nn.initializers.ones, ()))
        chosen = jax.nn.one_hot(species, self.num_species, dtype=x.dtype)
        energy = jnp.sum((x @ last.T / np.sqrt(x.shape[-1]) + bias) * chosen, axis=-1)
        return scale * energy, x

    def _mix(self, density: jax.Array, species: jax.Array) -> jax.Array:
        """Linear maps of the density into channels, one for each degree and central species, [A, C, LM]."""
        s = self.settings
        width = density.shape[-2]
        shape = (self.num_species, s.l_max + 1, s.channels, width)
        weights = self.param("mix", nn.initializers.normal(1 / np.sqrt(width)), shape)
        scale = jax.lax.stop_gradient(self.param("density_scale", nn.initializers.ones, (s.l_max + 1,)))
        factors = scale[:, None, None] * _smoothness(s, self.num_species).astype(density.dtype)
        weights = weights * factors
        chosen = jax.nn.one_hot(species, self.num_species, dtype=density.dtype)
        blocks = []
        for n, components in enumerate(_degrees(s.l_max)):
            # one matrix product for every central species, of which each atom keeps its own: as fast as can be for the
            # few species of most systems, and nothing is gathered
            every = jnp.einsum("scf,afm->ascm", weights[:, n], density[..., components])
            blocks.append(jnp.einsum("as,ascm->acm", chosen, every))
        return jnp.concatenate(blocks, axis=-1)

    def _couple(self, h: jax.Array) -> jax.Array:
        """Clebsch-Gordan products of h with itself, mixed over channels and paths, [A, C, (coupled_l_max + 1)^2]."""
        s = self.settings
        coupled_l_max = min(s.coupled_l_max, s.l_max)
        found: list[list[jax.Array]] = [[] for _ in range(coupled_l_max + 1)]
        for block in _couplings(s.l_max, coupled_l_max):
            # an outer product and a matrix: index gathers would cost more, and scatters in the backward pass
            outer = h[..., block.left, None] * h[..., None, block.right]
            products = outer.reshape(*h.shape[:2], -1) @ jnp.asarray(block.matrix, h.dtype)
            start = 0
            for degree in block.degrees:
                found[degree].append(products[..., start : start + 2 * degree + 1])
                start += 2 * degree + 1
        mixed = []
        for degree, paths in enumerate(found):
            stacked = jnp.stack(paths, axis=-2)  # [A, C, paths, 2l+1]
            shape = (s.channels, s.channels, len(paths))
            spread = 1 / np.sqrt(s.channels * len(paths))
            weights = self.param(f"couple_{degree}", nn.initializers.normal(spread), shape)
            mixed.append(jnp.einsum("dcp,acpm->adm", weights, stacked))
        return jnp.concatenate(mixed, axis=-1)


@dataclass(frozen=True)
class _Block:
    """Products of the components of degrees l1 <= l2, and the true tensors they couple to.

    Attributes:
        left: components of degree l1.
        right: components of degree l2.
        degrees: of the tensors, in the order of the columns.
        matrix: [(2 l1 + 1)(2 l2 + 1), sum of 2l+1] coefficients, scaled to unit variance of a tensor's components where
            those of the factors are independent normal numbers.
    """

    left: slice
    right: slice
    degrees: tuple[int, ...]
    matrix: np.ndarray


@cache
def _couplings(l_max: int, coupled_l_max: int) -> tuple[_Block, ...]:
    """The square of 0 + 1 + ... + l_max, as far as its parity is that of a true tensor; each pair of degrees once."""
    blocks = []
    for l1 in range(l_max + 1):
        for l2 in range(l1, l_max + 1):
            degrees = [d for d in range(l2 - l1, min(l1 + l2, coupled_l_max) + 1) if (l1 + l2 + d) % 2 == 0]
            if not degrees:
                continue
            columns = [e3nn.clebsch_gordan(l1, l2, d).reshape(-1, 2 * d + 1) for d in degrees]
            # equal factors: the products of different components come twice, which doubles their variance
            doubled = 2 if l1 == l2 else 1
            columns = [c * np.sqrt(c.shape[1] / (doubled * np.sum(c**2))) for c in columns]
            blocks.append(
                _Block(_degrees(l_max)[l1], _degrees(l_max)[l2], tuple(degrees), np.concatenate(columns, axis=1))
            )
    return tuple(blocks)


def _degrees(l_max: int) -> list[slice]:
    """Where the components of each degree lie."""
    return [slice(l * l, (l + 1) ** 2) for l in range(l_max + 1)]


def _inner(a: jax.Array, b: jax.Array) -> jax.Array:
    """Scalar products of two sets of irreps, degree by degree, divided by the dimension, [A, C * degrees]."""
    products = a * b
    l_max = round(np.sqrt(products.shape[-1])) - 1
    return jnp.concatenate([jnp.mean(products[..., d], axis=-1) for d in _degrees(l_max)], axis=-1)


def _smoothness(settings: SharedDensitySettings, num_species: int) -> jax.Array:
    """Factor 1/n of the n-th radial function, [S * B].

    A function of higher frequency starts with less weight and learns more slowly, so that few labels give a smooth
    potential: on 170 structures of the Zundel cation this halves the force error.
    """
    return jnp.tile(1.0 / jnp.arange(1, settings.radial + 1), num_species)
