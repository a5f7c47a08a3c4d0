"""A correction of a trained model that stays as it is: what labels of one method add to a potential of another.

The energy is that of the base, whose parameters are held among the constants, plus that of the correction, which is
learned.  Both come from one evaluation: forces, virials and energies of atoms are those of the sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

import jax
from flax import struct
from pydantic import Field, model_validator

from almlip_jax.models.around import Around
from almlip_jax.models.base import (
    AtomicOutput,
    Geometry,
    LastLayer,
    LinearLast,
    Model,
    ModelSettings,
    Params,
    Survey,
    silent_last,
)
from almlip_jax.models.build import build_model
from almlip_jax.models.constants import BASE, CONSTANTS, CORRECTION
from almlip_jax.settings import unit
from almlip_jax.structures.graph import Graph
from almlip_jax.structures.species import SpeciesTable


class DeltaSettings(ModelSettings):
    """A correction of a trained potential, which is kept; `Corrected.of` and `teacher.correction` make such models."""

    kind: Literal["delta"] = "delta"
    base: ModelSettings
    """Model of the trained potential."""
    base_isolated: tuple[Annotated[int, Field(ge=1, le=118)], ...] = ()
    """Atomic numbers of the elements whose isolated atoms this one gives exactly."""
    correction: ModelSettings
    """Model of what is learned on top."""
    cutoff: float = Field(default=1.0, ge=1.0, le=20.0, json_schema_extra=unit("Angstrom"))
    """The longer one of the two, Angstrom, whatever is given."""

    @model_validator(mode="before")
    @classmethod
    def _reach(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or not {BASE, CORRECTION} <= set(given):
            return given
        parts = [ModelSettings.parse(given[name]) for name in (BASE, CORRECTION)]
        return {**given, "base": parts[0], "correction": parts[1], "cutoff": max(part.cutoff for part in parts)}

    @model_validator(mode="after")
    def _has_energies_only(self) -> Self:
        if self.base.further or self.correction.further:
            names = ", ".join((*self.base.further, *self.correction.further))
            raise ValueError(f"a correction is one of energies; take models that do not give {names}.")
        if self.repulsion or self.correction.repulsion:
            raise ValueError("the repulsion of nuclei belongs to the base of a correction; leave repulsion out.")
        return self

    def build(self, species: SpeciesTable) -> Model:
        """Base and correction for one species table."""
        return Delta(build_model(self.base, species, self.base_isolated), build_model(self.correction, species))


@struct.dataclass
class DeltaGeometry:
    """Geometries of both parts; what they share the compiler computes once."""

    base: Geometry
    correction: Geometry


@dataclass(frozen=True)
class Delta(LinearLast):
    """A frozen model plus a correction, whose features and last layer are those of the whole.

    Attributes:
        base: the model that stays.
        correction: the model that learns.
    """

    base: Model
    correction: Model

    @property
    def cutoff(self) -> float:
        """Angstrom, the longer one."""
        return max(self.base.cutoff, self.correction.cutoff)

    @property
    def species(self) -> SpeciesTable:
        """The species table."""
        return self.correction.species

    @property
    def num_species(self) -> int:
        """Length of the species table."""
        return self.correction.num_species

    @property
    def targets(self) -> tuple[str, ...]:
        """Nothing besides the energy."""
        return ()

    @property
    def small_members(self) -> bool:
        """Where both are."""
        return self.base.small_members and self.correction.small_members

    @property
    def sees_state(self) -> bool:
        """Where either does."""
        return any(getattr(part, "sees_state", False) for part in (self.base, self.correction))

    @property
    def long_range(self) -> bool:
        """Where either is."""
        return self.base.long_range or self.correction.long_range

    @property
    def local(self) -> bool:
        """Where both are."""
        return self.base.local and self.correction.local

    def geometry(self, graph: Graph) -> DeltaGeometry:
        """Those of both."""
        return DeltaGeometry(self.base.geometry(graph), self.correction.geometry(graph))

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters of both: no potential yet, since the base is to be a trained one."""
        one, two = jax.random.split(key)
        return {CONSTANTS: {BASE: self.base.init(one)}, CORRECTION: self.correction.init(two)}

    def survey(self, graph: Graph) -> Survey:
        """Those of both."""
        return {BASE: self.base.survey(graph), CORRECTION: self.correction.survey(graph)}

    def standardise(self, params: Params, survey: Survey, energy_scale: float) -> Params:
        """The constants of both, for fresh parameters; see `Model.standardise`."""
        base = self.base.standardise(params[CONSTANTS][BASE], survey[BASE], energy_scale)
        correction = self.correction.standardise(params[CORRECTION], survey[CORRECTION], energy_scale)
        return params | {CONSTANTS: params[CONSTANTS] | {BASE: base}, CORRECTION: correction}

    def with_species(self, params: Params, fresh: Params, wanted: SpeciesTable) -> Params:
        """See `Model.with_species`."""
        base = self.base.with_species(params[CONSTANTS][BASE], fresh[CONSTANTS][BASE], wanted)
        correction = self.correction.with_species(params[CORRECTION], fresh[CORRECTION], wanted)
        return params | {CONSTANTS: params[CONSTANTS] | {BASE: base}, CORRECTION: correction}

    def apply(self, params: Params, geometry: DeltaGeometry, graph: Graph) -> AtomicOutput:
        """Energies of both, and the features of the correction."""
        frozen = jax.lax.stop_gradient(params[CONSTANTS][BASE])
        known = self.base.apply(frozen, geometry.base, graph)
        learned = self.correction.apply(params[CORRECTION], geometry.correction, graph)
        return replace(learned, energy=known.energy + learned.energy)

    def last_scale(self, params: Params) -> jax.Array:
        """That of the correction."""
        return self.correction.last_scale(params[CORRECTION])

    def last(self, params: Params) -> LastLayer:
        """That of the correction."""
        if not isinstance(self.correction, LinearLast):  # of a user's own, which need not say
            raise silent_last(self.correction)
        return self.correction.last(params[CORRECTION])


def corrects(model: Model) -> bool:
    """Whether there is a trained model within, for which no fresh parameters can stand."""
    while isinstance(model, Around):
        model = model.inner
    return isinstance(model, Delta)
