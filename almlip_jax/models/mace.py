"""The MACE-type model: convolutions, then many-body products of what they gathered, layer after layer.

In each layer the messages of the neighbours are mixed into A, [2l+1, A, C] for l up to ``l_max``; products of A with
itself up to the correlation order give many-body functions B, a linear map of which, plus the atom's own features
mapped with weights of its species, are the next features.  Energies are read out linearly from the scalars of every
layer but the last, and by an MLP from those of the last.  Source: Batatia et al., NeurIPS 2022, arXiv:2206.07697.

The symmetric contraction of order n is taken pairwise, T_1 = A and T_n = sum_p w_p (T_(n-1) x A)_p with weights w_p of
path, channel and central species: the generalised Clebsch-Gordan coefficients are products of simple ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from almlip_jax.models.bilinear import Irreps, bilinear, couplings
from almlip_jax.models.convolution import (
    ConvolutionalModel,
    ConvolutionalSettings,
    DegreeLinear,
    Edges,
    Path,
    RadialWeights,
    SpeciesLinear,
    by_degree,
    constant,
    convolve,
    paths_between,
    species_code,
)
from almlip_jax.structures.graph import Graph


class MaceSettings(ConvolutionalSettings):
    """Shape of the MACE-type model."""

    kind: Literal["mace"] = "mace"
    correlation: int = Field(default=3, ge=1, le=5)
    """Correlation order: neighbours that a product involves; a function of one more bodies than that."""


@dataclass(frozen=True)
class Mace(ConvolutionalModel):
    """The model as pure functions; see the module's text."""

    settings: MaceSettings

    @property
    def paths(self) -> tuple[Path, ...]:
        """Couplings that any layer uses."""
        known = self.settings.hidden_l_max if self.settings.layers > 1 else 0
        return paths_between(self.settings.l_max, known, self.settings.l_max)

    @property
    def module(self) -> nn.Module:
        """The module with all parameters."""
        return _Layers(self.settings, self.num_species, self.paths)


class _Layers(nn.Module):
    settings: MaceSettings
    num_species: int
    paths: tuple[Path, ...]

    @nn.compact
    def __call__(self, edges: Edges, graph: Graph) -> tuple[jax.Array, jax.Array]:
        s = self.settings
        dtype = edges.radial.dtype
        exact = jax.nn.one_hot(graph.species, self.num_species, dtype=dtype)
        code = species_code(self, graph.species, self.num_species, s.species_channels, dtype)
        scale = constant(self, "message_scale")
        embedding = self.param("embedding", nn.initializers.normal(1.0), (self.num_species, s.channels))
        features: Irreps = ((exact @ embedding)[None],)
        energy = exact @ self.param("species_bias", nn.initializers.zeros, (self.num_species,))
        for layer in range(s.layers):
            highest = s.hidden_l_max if layer < s.layers - 1 else 0
            gathered = self._gather(layer, features, scale, edges, graph)
            many_body = self._many_body(layer, gathered, highest, code)
            own = SpeciesLinear(s.channels, name=f"own_{layer}")(features[: highest + 1], code)
            features = tuple(b + own[n] if n < len(own) else b for n, b in enumerate(many_body))
            if layer < s.layers - 1:
                energy = energy + nn.Dense(1, use_bias=False, name=f"read_{layer}")(features[0][0])[:, 0]
        x = features[0][0]
        for n, width in enumerate(s.read_out):
            x = nn.silu(nn.Dense(width, name=f"read_out_{n}")(x))
        last = self.param("last", nn.initializers.normal(0.1), (self.num_species, x.shape[-1]))
        energy = energy + jnp.sum(x * (exact @ last), axis=-1) / np.sqrt(x.shape[-1])
        return constant(self, "energy_scale") * energy, x

    def _gather(self, layer: int, features: Irreps, scale: jax.Array, edges: Edges, graph: Graph) -> Irreps:
        """A of one layer, [2l+1, A, C] for l up to ``l_max``."""
        s = self.settings
        chosen = [n for n, path in enumerate(self.paths) if path.neighbor < len(features)]
        weights = RadialWeights(len(chosen), s.channels, s.radial_hidden, name=f"radial_{layer}")(
            edges.radial, graph.edge_mask
        )
        mixed = DegreeLinear(s.channels, name=f"before_{layer}")(features)
        messages = convolve(mixed, scale * weights, edges, self.paths, chosen, graph)
        return DegreeLinear(s.channels, name=f"after_{layer}")(by_degree(messages, [self.paths[n].out for n in chosen]))

    def _many_body(self, layer: int, gathered: Irreps, highest: int, code: jax.Array) -> Irreps:
        """Products of A with itself up to the correlation order, mixed, for degrees up to ``highest``."""
        s = self.settings
        product, found = gathered, [gathered[: highest + 1]]
        for order in range(2, s.correlation + 1):
            # the last product is only needed as far as it is kept
            top = highest if order == s.correlation else s.l_max
            table, degrees = couplings(len(product) - 1, s.l_max, top, order == 2)
            product = self._weighted(f"weights_{layer}_{order}", bilinear(table, product, gathered), degrees, code)
            found.append(product[: highest + 1])
        stacked = [jnp.concatenate(blocks, axis=-1) for blocks in zip(*found, strict=True)]
        return DegreeLinear(s.channels, name=f"mix_{layer}")(stacked)

    def _weighted(self, name: str, products: Irreps, degrees: Sequence[int], code: jax.Array) -> Irreps:
        """Sums over the paths of each degree with weights of path, channel and central species."""
        summed = []
        for degree in range(max(degrees) + 1):
            paths = [block for block, d in zip(products, degrees, strict=True) if d == degree]
            spread = nn.initializers.normal(1 / np.sqrt(len(paths)))
            shape = (code.shape[-1], len(paths) * self.settings.channels)
            weights = jnp.split(code @ self.param(f"{name}_{degree}", spread, shape), len(paths), axis=-1)
            terms = [weight * block for weight, block in zip(weights, paths, strict=True)]
            summed.append(sum(terms[1:], terms[0]))
        return tuple(summed)
