"""What stands on the features of a model: further last layers, and what the model says about its own errors.

A shallow ensemble (Kellner and Ceriotti, Mach. Learn.: Sci. Technol. 5, 035006, 2024) shares one model and differs in
the last layer: head h adds ``w_h[species] . x`` to the energy of an atom with features x.  Member forces then share the
forward pass, and each pays for a reverse pass of its own.
What a model says about its errors is in `ensembles.likelihoods`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from almlip_jax.ensembles.likelihoods import LikelihoodSettings, Noise, NoLikelihood
from almlip_jax.models.base import Params
from almlip_jax.models.constants import CONSTANTS, with_constants
from almlip_jax.structures.graph import Graph
from almlip_jax.structures.species import SpeciesTable

_SPREAD = 0.1  # of the weights of a head at the start, as that of a model's own last layer


@dataclass(frozen=True)
class Heads:
    """Last layers and error models on the features of a model.

    Attributes:
        count: number of last layers H.
        likelihood: what the model says about its own errors.
    """

    count: int = 1
    likelihood: LikelihoodSettings = field(default_factory=NoLikelihood)

    @property
    def plain(self) -> bool:
        """Whether there is nothing but the model itself."""
        return self.count == 1 and self.likelihood.silent

    def init(self, key: jax.Array, species: int, features: int) -> Params:
        """Fresh parameters for a number of species and of features."""
        one, two = jax.random.split(key)
        params: Params = {CONSTANTS: {"scale": jnp.ones(())}}
        if self.count > 1:
            params["last"] = _SPREAD * jax.random.normal(one, (self.count, species, features))
        if not self.likelihood.silent:
            outputs = self.likelihood.outputs
            params["noise"] = _SPREAD * jax.random.normal(two, (features, outputs))
            params["noise_bias"] = jnp.zeros((outputs,))
        return params

    def standardise(self, params: Params, energy_scale: float) -> Params:
        """The parameters with the energy scale set, eV."""
        return with_constants(params, scale=energy_scale)

    def with_species(self, params: Params, fresh: Params, known: SpeciesTable, wanted: SpeciesTable) -> Params:
        """Parameters for more species; see `models.base.Model.with_species`."""
        if "last" not in params:
            return params
        places = wanted.index(np.asarray(known.numbers))
        return params | {"last": fresh["last"].at[:, places].set(params["last"])}

    def last_scale(self, params: Params) -> jax.Array:
        """Of the last layers, []; see `models.base.Model.last_scale`."""
        return jax.lax.stop_gradient(params[CONSTANTS]["scale"]) / params["last"].shape[-1] ** 0.5

    def weights(self, params: Params, graph: Graph) -> jax.Array:
        """What an atom's features are multiplied by in each head, [H, A, F] eV; 0 for padding atoms."""
        last = params["last"][:, graph.species] * self.last_scale(params)
        return jnp.where(graph.atom_mask[None, :, None], last, 0)

    def noise(self, params: Params, features: jax.Array, graph: Graph) -> Noise | None:
        """What a model says about its errors, from its features [A, F]; None where it says nothing."""
        if self.likelihood.silent:
            return None
        raw = features @ params["noise"] / features.shape[-1] ** 0.5 + params["noise_bias"]  # [A, outputs]
        return self.likelihood.noise(raw, graph, jax.lax.stop_gradient(params[CONSTANTS]["scale"]))
