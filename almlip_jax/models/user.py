"""A model of the user's own: a factory, named ``module:function``."""

from __future__ import annotations

from typing import ClassVar, Literal

from almlip_jax.errors import InputError
from almlip_jax.kinds import UserCode
from almlip_jax.models.base import METHODS, Model, ModelSettings, check_attributes
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.targets import FurtherName


class UserModelSettings(UserCode, ModelSettings):
    """A user's own factory ``(species, cutoff, **parameters) -> Model``.

    Models of equal arguments are made once in a process, so that they share programs whatever equality they have.
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
        """What the factory makes.

        Raises:
            InputError: as for `kinds.UserCode.call_for`, it has no hash, or is for other elements or another cutoff
                than it was asked for, or gives other targets than the settings say.
        """
        return self.kept(lambda: self.anew(species), species)

    def anew(self, species: SpeciesTable) -> Model:
        """As `build`, which makes a model once for equal arguments."""
        model: Model = self.call_for(METHODS, species=species, cutoff=self.cutoff)
        check_attributes(model, f"'{self.function}' returns a model")
        if model.cutoff != self.cutoff or model.species != species:
            raise InputError(
                f"'{self.function}' returns a model with cutoff {model.cutoff:g} Angstrom for {model.species}; it was "
                f"asked for one with {self.cutoff:g} Angstrom for {species}."
            )
        gives: tuple[str, ...] = getattr(model, "targets", ())
        if set(gives) != set(self.targets):
            raise InputError(
                f"'{self.function}' returns a model that gives {', '.join(gives) or 'nothing'} besides the energy, and "
                f"model.targets says {', '.join(self.targets) or 'nothing'}; let them say the same."
            )
        return model
