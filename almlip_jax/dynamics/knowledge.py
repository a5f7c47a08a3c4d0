"""What an exploration knows of the training set: fitted novelty scores, and the set as the admission sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ase import Atoms

from almlip_jax.dynamics.admission import Context, build_admission, context_of
from almlip_jax.dynamics.novelty import Novelty, fit_latent_distance
from almlip_jax.dynamics.settings import ExplorationSettings
from almlip_jax.potential import Potential


@dataclass(frozen=True)
class Knowledge:
    """The training set in the eyes of the present ensemble; made by `know`.

    Attributes:
        novelty: fitted novelty scores by name.
        context: the training set as the admission to the buffer sees it.
    """

    novelty: Mapping[str, Novelty] = field(default_factory=dict)
    context: Context | None = None


def know(
    settings: ExplorationSettings, potential: Potential, training_set: Sequence[Atoms], seed: int, room: int = 0
) -> Knowledge:
    """What an exploration with some settings needs to know; nothing is evaluated that it does not ask for.

    Args:
        settings: of the exploration.
        potential: whose features count.
        training_set: structures; labels are not looked at.
        seed: decides sketches.
        room: training structures there can be at most, so that a growing set keeps its shape.

    Raises:
        InputError: a structure holds an element that the potential does not know.
    """
    novelty: dict[str, Novelty] = {}
    if settings.novelty:
        features, species = potential.atom_features(training_set)
        number = len(potential.species)
        if "latent_distance" in settings.novelty:
            novelty["latent_distance"] = fit_latent_distance(features, species, number)
    context = None
    if build_admission(settings.admission).looks_at_features:
        rows = potential.evaluate(training_set, features=True).features["last_layer_gradient"]
        context = context_of(settings.admission, rows, seed, room)
    return Knowledge(novelty, context)
