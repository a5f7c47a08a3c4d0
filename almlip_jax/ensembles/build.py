"""From settings to an ensemble: one architecture, or several in turn."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pydantic import ValidationError

from almlip_jax.ensembles.ensemble import Ensemble
from almlip_jax.ensembles.heads import Heads
from almlip_jax.ensembles.mixed import AnyEnsemble, joined
from almlip_jax.ensembles.settings import EnsembleSettings, VariantSettings
from almlip_jax.errors import InputError
from almlip_jax.models import ModelSettings, build_model
from almlip_jax.structures.species import SpeciesTable


def member_models(model: ModelSettings, ensemble: EnsembleSettings) -> list[tuple[ModelSettings, VariantSettings, int]]:
    """The architectures of an ensemble, each with the variant it comes from and the number of models it has.

    Args:
        model: what the variants change.
        ensemble: settings of the members.

    Raises:
        InputError: a variant does not give a valid model.

    >>> from almlip_jax.ensembles import EnsembleSettings, member_models
    >>> from almlip_jax.models import SharedDensitySettings
    >>> committee = EnsembleSettings(size=3, variants=[{}, {"model": {"kind": "nequip"}}])
    >>> [(model.kind, count) for model, _, count in member_models(SharedDensitySettings(), committee)]
    [('shared_density', 2), ('nequip', 1)]
    """
    variants = ensemble.variants or (VariantSettings(),)
    counts = [len(range(n, ensemble.size, len(variants))) for n in range(len(variants))]
    changed = [_changed(model, variant.model, n) for n, variant in enumerate(variants)]
    return list(zip(changed, variants, counts, strict=True))


def build_ensemble(
    model: ModelSettings, ensemble: EnsembleSettings, species: SpeciesTable, isolated: Collection[int] = ()
) -> AnyEnsemble:
    """The ensemble that some settings describe, for a species table; ``isolated`` as for `build_model`.

    Raises:
        InputError: a variant does not give a valid model.

    >>> import jax
    >>> from almlip_jax.ensembles import EnsembleSettings, build_ensemble
    >>> from almlip_jax.models import SharedDensitySettings
    >>> from almlip_jax.structures.species import SpeciesTable
    >>> ensemble = build_ensemble(SharedDensitySettings(size="tiny"), EnsembleSettings(size=4), SpeciesTable((1, 8)))
    >>> shapes = jax.eval_shape(ensemble.init, jax.random.key(0))  # of the parameters, a leading axis of members
    >>> {leaf.shape[0] for leaf in jax.tree.leaves(shapes)}
    {4}
    """
    heads = Heads(ensemble.heads, ensemble.likelihood)
    return joined(
        [
            Ensemble(build_model(one, species, isolated), count, heads=heads)
            for one, _, count in member_models(model, ensemble)
        ]
    )


def _changed(model: ModelSettings, changes: dict[str, Any], position: int) -> ModelSettings:
    if not changes:
        return model
    try:
        return model.changed(changes)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])  # after the kind
        raise InputError(f"ensemble.variants, entry {position}, model.{where}: {first['msg']}.") from error
