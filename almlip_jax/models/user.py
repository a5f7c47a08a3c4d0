"""A model of the user's own: a factory, named ``module:function``."""

from __future__ import annotations

from typing import ClassVar, Literal

from almlip_jax.errors import InputError
from almlip_jax.kinds import UserCode
from almlip_jax.models.base import Model, ModelSettings
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.targets import FurtherName

_METHODS = ("geometry", "init", "survey", "standardise", "with_species", "apply", "last_scale", "linear")


class UserModelSettings(UserCode, ModelSettings):
    """A user's own factory ``(species, cutoff, **parameters) -> Model``.

    Models of equal arguments should be equal and have equal hashes (frozen dataclasses), by which programs are kept.
    """

    also_given: ClassVar[tuple[str, ...]] = ("species", "cutoff")

    kind: Literal["user"] = "user"

    targets: tuple[FurtherName, ...] = ()
    """What the model gives besides the energy, as its own ``targets`` say."""

    @property
    def further(self) -> tuple[str, ...]:
        """As said."""
        return self.targets

    def build(self, species: SpeciesTable) -> Model:
        """What the factory makes."""
        model: Model = self.call_for(_METHODS, species=species, cutoff=self.cutoff)
        if model.cutoff != self.cutoff or model.species != species:
            raise InputError(
                f"'{self.function}' returns a model with cutoff {model.cutoff:g} Angstrom for {model.species}; it was "
                f"asked for one with {self.cutoff:g} Angstrom for {species}."
            )
        given: tuple[str, ...] = getattr(model, "targets", ())
        if set(given) != set(self.targets):
            raise InputError(
                f"'{self.function}' returns a model that gives {', '.join(given) or 'nothing'} besides the energy, and "
                f"model.targets says {', '.join(self.targets) or 'nothing'}; let them say the same."
            )
        return model
