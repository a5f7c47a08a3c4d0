"""A few structures of many, before there is a potential: by what can be said of their surroundings alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import jax
from ase import Atoms
from pydantic import Field, model_validator

from almlip_jax.campaign.batch import Looked, choose_shared, features_of, shown
from almlip_jax.features import described, unlearned_names
from almlip_jax.keys import named_stream
from almlip_jax.selection import MaxDistSettings, SelectorSettings
from almlip_jax.settings import Settings
from almlip_jax.structures.species import SpeciesTable


class SparseSettings(Settings):
    """A few structures of many that a selector chooses before there is a potential."""

    count: int = Field(ge=1, le=10**8)
    """Structures."""
    selector: SelectorSettings = MaxDistSettings(features="power_spectrum")
    """How they are chosen; looks at features that need no potential, and at no scores."""

    @model_validator(mode="after")
    def _nothing_is_learned_yet(self) -> Self:
        asked = (*self.selector.feature_names, *self.selector.atom_feature_names)
        learned = [name for name in asked if name not in unlearned_names()]
        if self.selector.score_names:
            raise ValueError(
                f"selector '{self.selector.kind}' looks at {self.selector.score_names[0]}, but before the first label "
                "nothing is known of uncertainties; choose one that looks at features alone, as max_dist does."
            )
        if learned:
            raise ValueError(
                f"selector '{self.selector.kind}' looks at {learned[0]}, which needs a potential; before the first "
                f"label there are: {', '.join(unlearned_names())}."
            )
        return self


def sparse(
    frames: Sequence[Atoms],
    settings: SparseSettings,
    key: jax.Array,
    *,
    cutoff: float,
    seed: int,
    known: Sequence[Atoms] = (),
    shares: Mapping[str, float] | None = None,
) -> list[int]:
    """Places of the structures that are chosen, in the order of their choice; named systems take turns.

    Args:
        frames: to choose from, at least one.
        settings: how many, and how.
        key: of the choice.
        cutoff: Angstrom, up to which surroundings are looked at.
        seed: of sketches.
        known: what is labelled already.
        shares: of named systems in what is chosen.
    """
    selector = settings.selector
    request, species = features_of(selector, seed), SpeciesTable.of([*frames, *known])
    around = Looked(known, described(known, request, cutoff, species)) if known else None
    pair = shown(selector, Looked(frames, described(frames, request, cutoff, species)), around)
    count = min(settings.count, len(frames))

    def key_of(*system: str) -> jax.Array:
        return named_stream(key, *system) if system else key

    chosen = choose_shared(selector.build(count), key_of, frames, pair, shares or {}, count)
    return [row for row, _ in chosen]
