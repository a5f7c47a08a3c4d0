"""A model as users and packages write one: what it has to have, and no more."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from almlip_jax.models import AtomicOutput, LinearLast
from almlip_jax.models.constants import CONSTANTS
from almlip_jax.structures.species import SpeciesTable


@dataclass(frozen=True)
class Pairs(LinearLast):
    """A sum over Gaussians of distances, linear in them, for each pair of species; no constant is called as ours are.

    Attributes:
        species: the species table.
        cutoff: Angstrom.
        width: number of Gaussians.
        named: the parameters that it says its last layer is.
    """

    species: SpeciesTable
    cutoff: float
    width: int = 6
    named: tuple[str, ...] = ("last",)
    small_members = True
    long_range = False
    sees_state = False
    local = True

    @property
    def num_species(self):
        return len(self.species)

    @property
    def last_names(self):
        return self.named

    def geometry(self, graph):
        far = jnp.array([0.0, 0.0, self.cutoff], graph.vectors.dtype)
        r = jnp.sqrt(jnp.sum(jnp.where(graph.edge_mask[..., None], graph.vectors, far) ** 2, axis=-1))
        fade = jnp.where(graph.edge_mask, (1 - (r / self.cutoff) ** 2) ** 3, 0)
        basis = jnp.exp(-4 * (r[..., None] - jnp.linspace(0.5, self.cutoff, self.width, dtype=r.dtype)) ** 2)
        other = jax.nn.one_hot(graph.species[graph.neighbors], self.num_species, dtype=r.dtype)
        return jnp.einsum("ak,akb,aks->asb", fade, basis, other).reshape(len(r), -1)

    def init(self, key):
        last = 0.1 * jax.random.normal(key, (self.num_species, self.num_species * self.width))
        return {"last": last, CONSTANTS: {"unit": jnp.ones(())}}

    def survey(self, graph):
        return jnp.zeros(())

    def standardise(self, params, survey, energy_scale):
        return params

    def with_species(self, params, fresh, wanted):
        raise NotImplementedError

    def apply(self, params, geometry, graph):
        return AtomicOutput(jnp.sum(geometry * params["last"][graph.species], axis=-1), geometry)

    def last_scale(self, params):
        return jnp.ones(())


def silent(species: SpeciesTable, cutoff: float) -> Pairs:
    """One that names no last layer."""
    return Pairs(species, cutoff, named=())


def misnamed(species: SpeciesTable, cutoff: float) -> Pairs:
    """One that names a last layer that it has not."""
    return Pairs(species, cutoff, named=("first",))


@dataclass(frozen=True)
class Charged(Pairs):
    """One that sees the charge, in a way of its own."""

    sees_state = True

    def apply(self, params, geometry, graph):
        told = (1 + 0.1 * graph.charge)[graph.structure][:, None] * geometry
        return AtomicOutput(jnp.sum(told * params["last"][graph.species], axis=-1), told)
