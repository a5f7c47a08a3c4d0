"""The NequIP-type model: gated equivariant convolutions, one after the other.

Each layer couples the harmonics of the edges with the features of the neighbours, mixes the messages, adds a linear map
of the atom's own features with weights of its species, and applies a gate: scalars go through silu, tensors are
multiplied by the sigmoid of scalars of their own.  Source: Batzner et al., Nature Communications 13, 2453 (2022).

Features are true tensors (parity (-1)^l) of degrees 0 to ``hidden_l_max``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from pydantic import Field

from almlip_jax.models.bilinear import Irreps
from almlip_jax.models.constants import constant
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
    first_features,
    paths_between,
)
from almlip_jax.models.species_code import central_code, exact_code
from almlip_jax.structures.graph import Graph
from almlip_jax.structures.species import SpeciesTable


class NequipSettings(ConvolutionalSettings):
    """Shape of the NequIP-type model."""

    kind: Literal["nequip"] = "nequip"
    l_max: int = Field(default=2, ge=0, le=4)
    """Highest degree of the spherical harmonics of an edge."""
    layers: int = Field(default=3, ge=1, le=10)
    """Number of layers."""

    def build(self, species: SpeciesTable) -> Nequip:
        """See `Nequip`."""
        return Nequip(self, species)


@dataclass(frozen=True)
class Nequip(ConvolutionalModel):
    """The model as pure functions; see the module's text."""

    settings: NequipSettings

    @property
    def paths(self) -> tuple[Path, ...]:
        """Couplings that any layer uses."""
        return paths_between(self.settings.l_max, self.settings.hidden_l_max, self.settings.hidden_l_max)

    @property
    def module(self) -> nn.Module:
        """The module with all parameters."""
        return _Layers(self.settings, self.species, self.paths)


class _Layers(nn.Module):
    settings: NequipSettings
    species: SpeciesTable
    paths: tuple[Path, ...]

    @nn.compact
    def __call__(self, edges: Edges, graph: Graph) -> tuple[jax.Array, jax.Array]:
        s = self.settings
        dtype = edges.radial.dtype
        exact = exact_code(graph, self.species, dtype)
        code = central_code(self, exact, s.species_channels)
        scale = constant(self, "message_scale")
        features: Irreps = (first_features(self, exact, graph, s)[None],)
        for layer in range(s.layers):
            last = layer == s.layers - 1
            features = self._layer(layer, features, 0 if last else s.hidden_l_max, code, scale, edges, graph)
        x = features[0][0]
        for n, width in enumerate(s.read_out):
            x = nn.silu(nn.Dense(width, name=f"read_out_{n}")(x))
        read = self.param("last", nn.initializers.normal(0.1), (len(self.species), x.shape[-1]))
        bias = self.param("species_bias", nn.initializers.zeros, (len(self.species),))
        energy = jnp.sum(x * (exact @ read), axis=-1) / math.sqrt(x.shape[-1]) + exact @ bias
        return constant(self, "energy_scale") * energy, x

    def _layer(
        self,
        layer: int,
        features: Irreps,
        highest: int,
        code: jax.Array,
        scale: jax.Array,
        edges: Edges,
        graph: Graph,
    ) -> Irreps:
        """Convolution, self-connection and gate, from features of any degrees to those of 0 to ``highest``."""
        s = self.settings
        known = len(features) - 1
        chosen = [n for n, path in enumerate(self.paths) if path.neighbor <= known and path.out <= highest]
        weights = RadialWeights(len(chosen), s.channels, s.radial_hidden, name=f"radial_{layer}")(
            edges.radial, graph.edge_mask
        )
        mixed = DegreeLinear(s.channels, name=f"before_{layer}")(features)
        messages = convolve(mixed, scale * weights, edges, self.paths, chosen, graph)
        summed = by_degree(messages, [self.paths[n].out for n in chosen])
        # the scalars also hold the gates of the tensors
        gates = (len(summed) - 1) * s.channels
        scalars, *tensors = DegreeLinear(s.channels, name=f"after_{layer}")(summed)
        own = SpeciesLinear(s.channels, name=f"own_{layer}")(features, code)
        scalars = scalars[0] + own[0][0]
        tensors = [t + own[n + 1] if n + 1 < len(own) else t for n, t in enumerate(tensors)]
        if not gates:
            return (nn.silu(scalars)[None],)
        gate = nn.sigmoid(nn.Dense(gates, name=f"gate_{layer}")(summed[0][0]))
        opened = [t * g for t, g in zip(tensors, jnp.split(gate, len(tensors), axis=-1), strict=True)]
        return (nn.silu(scalars)[None], *opened)
