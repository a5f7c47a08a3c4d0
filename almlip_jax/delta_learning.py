"""Corrections of trained potentials: what labels of another method add to one that stays as it is (delta learning)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from ase import Atoms

from almlip_jax.ensembles import Ensemble, EnsembleSettings, build_ensemble
from almlip_jax.errors import InputError
from almlip_jax.fitting import standardised
from almlip_jax.given import given_settings
from almlip_jax.keys import named_key
from almlip_jax.models import Delta, DeltaSettings, LinearLast, Model, ModelSettings
from almlip_jax.models.around import Around
from almlip_jax.models.constants import BASE, CONSTANTS, CORRECTION, with_constants
from almlip_jax.models.user import UserModelSettings
from almlip_jax.origins import Taught
from almlip_jax.potential import Potential
from almlip_jax.structures.species import SpeciesTable

_LEAST = 0.05  # eV, scale of the energies of a correction


@dataclass(frozen=True)
class Corrected(Taught):
    """A trained potential that trainings leave as it is: they learn what labels of another source differ by.

    ``potential`` is that with a correction that is zero so far (`Corrected.of`).
    """

    @classmethod
    def of(
        cls,
        base: Potential,
        structures: Sequence[Atoms],
        model: ModelSettings | Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> Corrected:
        """What trainings of corrections begin with, one for each member.

        Args:
            base: the potential that stays.
            structures: typical ones; labels are not looked at.
            model: of the correction; that of the base where not given.
            seed: draws its parameters.

        Raises:
            InputError: the base is no compiled potential, or of a kind that cannot be corrected.
        """
        return cls(corrected(base, structures, model, seed))

    def begin(self, grown: Potential, data: Sequence[Atoms]) -> Potential:
        """As `Taught.begin`, in the scale of what the forces of the base lack."""
        begun = super().begin(grown, data)
        labelled = [atoms for atoms in data if atoms.calc is not None and "forces" in atoms.calc.results]
        if not labelled:
            return begun
        known = grown.evaluate(labelled).forces
        apart = [atoms.calc.results["forces"] - forces for atoms, forces in zip(labelled, known, strict=True)]
        scale = max(float(np.sqrt(np.mean(np.square(np.concatenate(apart), dtype=np.float64)))), _LEAST)
        correction = begun.params[CORRECTION]
        held = [name for name in ("last_scale", "energy_scale") if name in correction.get(CONSTANTS, {})]
        if not held:  # a model of another's, which keeps the scale that it was standardised with
            return begun
        return replace(begun, params=begun.params | {CORRECTION: with_constants(correction, **{held[0]: scale})})


def corrected(
    base: Potential,
    structures: Sequence[Atoms],
    model: ModelSettings | Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Potential:
    """A potential with a correction that is zero: it predicts what it did.

    Arguments and errors are those of `Corrected.of`.
    """
    correction = _checked(base, model)
    settings = DeltaSettings(base=base.settings, base_isolated=tuple(sorted(base.isolated)), correction=correction)
    members = EnsembleSettings(**base.member_settings.model_dump())
    ensemble = build_ensemble(settings, members, base.species, base.isolated)
    assert isinstance(ensemble, Ensemble)
    params = jax.jit(ensemble.init)(named_key(seed, "correction"))
    bare = Potential(settings, base.species, params, base.reference_energies, members=members, isolated=base.isolated)
    params = standardised(bare, structures)
    learned = params[CORRECTION]
    silent = {name: jax.tree.map(np.zeros_like, learned[name]) for name in _delta(ensemble.model).last_names}
    params = params | {CORRECTION: learned | silent, CONSTANTS: params[CONSTANTS] | {BASE: base.params}}
    dtype = np.dtype(base.precision)
    return Potential(
        settings,
        base.species,
        jax.tree.map(lambda x: np.asarray(x, dtype), params),
        base.reference_energies,
        metadata=dict(base.metadata),
        members=members,
        isolated=base.isolated,
    )


def _checked(base: Potential, model: ModelSettings | Mapping[str, Any] | None) -> ModelSettings:
    """Settings of the correction."""
    if not isinstance(base, Potential):
        raise InputError(
            f"{type(base).__name__} is no potential: a correction and its base are one compiled program. "
            "Distil the method into a potential first (`almlip distil`, or section teacher of a campaign), and "
            "correct that."
        )
    ensemble = base.ensemble
    if not isinstance(ensemble, Ensemble):
        raise InputError("a committee of architectures cannot be corrected member by member; take one architecture.")
    if not ensemble.heads.plain:
        raise InputError(
            "the base of a correction has ensemble.heads or ensemble.likelihood, which are of its own labels; take one "
            "without."
        )
    correction = base.settings if model is None else given_settings(ModelSettings, model, "model")
    if isinstance(correction, DeltaSettings):
        correction = correction.correction
    check_correction(correction, base.species)
    return correction


def check_correction(settings: ModelSettings, species: SpeciesTable) -> None:
    """Whether a model can be a correction, which begins at zero.

    Raises:
        InputError: it cannot be built for these species, or does not name the parameters of its last layer.
    """
    model = settings.build(species)
    named = model.last_names if isinstance(model, LinearLast) else ()
    of = f"'{settings.function}'" if isinstance(settings, UserModelSettings) else f"kind '{settings.kind}'"
    if not named:
        raise InputError(
            f"a correction of {of} has no last layer that could begin at zero: it does not say which parameters those "
            "are; let `last_names` of the model (below `almlip_jax.models.LinearLast`) name them, or take another."
        )
    learned = jax.eval_shape(model.init, jax.random.key(0))
    if strange := [name for name in named if name not in learned]:
        raise InputError(
            f"`last_names` of a correction of {of} names '{strange[0]}', but `init` gives {', '.join(sorted(learned))}."
        )


def _delta(model: Model) -> LinearLast:
    """The correction in a model."""
    while isinstance(model, Around):
        model = model.inner
    assert isinstance(model, Delta) and isinstance(model.correction, LinearLast)
    return model.correction
