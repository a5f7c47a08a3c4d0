"""What stands on the features of a model: further last layers, and what the model says about its own errors.

A shallow ensemble (Kellner and Ceriotti, Mach. Learn.: Sci. Technol. 5, 035006, 2024) shares one model and differs in
the last layer: head h adds ``w_h[species] . x`` to the energy of an atom with features x.  Member forces then share the
forward pass, and each pays for a reverse pass of its own.

A mean-variance model (Nix and Weigend 1994; for forces, Busk et al., Phys. Chem. Chem. Phys. 25, 25828, 2023) predicts
the variance of its errors; an evidential one (Amini et al., NeurIPS 2020) a normal-inverse-gamma distribution with
parameters (v, alpha, beta) around its prediction: variance of the noise ``beta / (alpha - 1)``, of the prediction
``beta / (v (alpha - 1))``.  Variances of energies and virials are sums over atoms, those of forces belong to each atom
and are the same for its three components; v and alpha of a structure are means over its atoms.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from almlip_jax.ensembles.settings import Likelihood
from almlip_jax.models.base import Params
from almlip_jax.models.constants import CONSTANTS, with_constants
from almlip_jax.structures.graph import Graph, atom_counts, sum_over_atoms
from almlip_jax.structures.species import SpeciesTable

_SPREAD = 0.1  # of the weights of a head at the start, as that of a model's own last layer
_LEAST = 1e-3  # of v and alpha - 1: variances stay finite far from what was trained on
_FIRST_SIGMA = 0.1  # standard deviation that a fresh head predicts for an atom, in energy scales


@struct.dataclass
class Belief:
    """A distribution of errors around a prediction.

    Attributes:
        variance: of the noise of one component.
        evidence: v of a normal-inverse-gamma distribution, with which the variance of the prediction itself is
            ``variance / evidence``; None for a normal distribution.
        shape: alpha of it; None for a normal distribution.
    """

    variance: jax.Array
    evidence: jax.Array | None = None
    shape: jax.Array | None = None

    @property
    def epistemic(self) -> jax.Array:
        """Variance of the prediction itself; 0 where the model says nothing about it."""
        return jnp.zeros_like(self.variance) if self.evidence is None else self.variance / self.evidence


@struct.dataclass
class Noise:
    """What a model says about its own errors.

    Attributes:
        energy: of the energy of a structure, [(L,) S] eV^2.
        forces: of each component of the force on an atom, [(L,) A] (eV/Angstrom)^2.
        virial: of each component of the virial of a structure, [(L,) S] eV^2.
    """

    energy: Belief
    forces: Belief
    virial: Belief


@dataclass(frozen=True)
class Heads:
    """Last layers and error models on the features of a model.

    Attributes:
        count: number of last layers H.
        likelihood: what the model says about its own errors.
    """

    count: int = 1
    likelihood: Likelihood = "none"

    @property
    def plain(self) -> bool:
        """Whether there is nothing but the model itself."""
        return self.count == 1 and self.likelihood == "none"

    def init(self, key: jax.Array, species: int, features: int) -> Params:
        """Fresh parameters for a number of species and of features."""
        one, two = jax.random.split(key)
        params: Params = {CONSTANTS: {"scale": jnp.ones(())}}
        if self.count > 1:
            params["last"] = _SPREAD * jax.random.normal(one, (self.count, species, features))
        if self.likelihood != "none":
            columns = 3 if self.likelihood == "mean_variance" else 9
            params["noise"] = _SPREAD * jax.random.normal(two, (features, columns))
            params["noise_bias"] = jnp.zeros((columns,))
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
        if self.likelihood == "none":
            return None
        raw = features @ params["noise"] / features.shape[-1] ** 0.5 + params["noise_bias"]  # [A, columns]
        scale = jax.lax.stop_gradient(params[CONSTANTS]["scale"])
        sigma = scale * jax.nn.softplus(raw[:, :3] + _inverse_softplus(_FIRST_SIGMA))
        energy, forces, virial = sigma[:, 0] ** 2, sigma[:, 1] ** 2, sigma[:, 2] ** 2
        if self.likelihood == "mean_variance":
            return Noise(Belief(sum_over_atoms(energy, graph)), Belief(forces), Belief(sum_over_atoms(virial, graph)))
        evidence = _LEAST + jax.nn.softplus(raw[:, 3:6] + _inverse_softplus(1.0))
        shape = 1 + _LEAST + jax.nn.softplus(raw[:, 6:9] + _inverse_softplus(1.0))
        counts = atom_counts(graph)

        def of_structure(variance: jax.Array, column: int) -> Belief:
            means = (sum_over_atoms(x[:, column], graph) / counts for x in (evidence, shape))
            # a padding slot holds no atom, whose sums are zero
            v, alpha = (jnp.where(graph.structure_mask, mean, 2.0) for mean in means)
            return Belief(sum_over_atoms(variance, graph), v, alpha)

        return Noise(of_structure(energy, 0), Belief(forces, evidence[:, 1], shape[:, 1]), of_structure(virial, 2))


def _inverse_softplus(value: float) -> float:
    return float(np.log(np.expm1(value)))
