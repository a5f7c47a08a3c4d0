"""Structures made by generators for a campaign, with charge and spin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms

from almlip_jax.campaign.preparation import state_of
from almlip_jax.campaign.settings import StateReading
from almlip_jax.campaign.systems import name_systems
from almlip_jax.errors import InputError, LabelError
from almlip_jax.generation import GenerationInputs, GeneratorSettings
from almlip_jax.oracles import SourceSettings
from almlip_jax.structures.carried import carried


@dataclass(frozen=True)
class Made:
    """A structure that was generated.

    Attributes:
        kind: of its generator.
        frame: the structure, with charge and spin.
    """

    kind: str
    frame: Atoms


def make(
    settings: GeneratorSettings,
    starts: Sequence[Atoms],
    system: StateReading,
    oracle: SourceSettings,
    generator: np.random.Generator,
) -> list[Atoms]:
    """The structures of a generator, with charge and spin.

    Args:
        settings: of the generator.
        starts: start geometries.
        system: charge and spin of structures that do not say.
        oracle: the label source; where it refuses a multiplicity that the number of electrons does not allow, and takes
            the nearest that is possible, that is given.
        generator: source of all that is drawn at random.

    Raises:
        InputError: nothing can be made of the start geometries, or there are no such structures.
    """
    check_starts(settings, starts)
    frames = []
    for made in settings.generate(GenerationInputs(starts, generator)):
        frame = carried(made)
        frame.info |= state_of(frame, system)
        frames.append(_with_possible_spin(frame, oracle))
    return name_systems(frames, starts, f"what '{settings.kind}' makes")


def _with_possible_spin(frame: Atoms, oracle: SourceSettings) -> Atoms:
    electrons, spin = int(frame.numbers.sum()) - int(frame.info.get("charge", 0)), frame.info.get("spin")
    if spin is None or (electrons - int(spin)) % 2 or _accepts(oracle, frame):
        return frame
    other = frame.copy()
    other.info["spin"] = 2 if int(spin) == 1 else int(spin) - 1
    return other if _accepts(oracle, other) else frame


def _accepts(oracle: SourceSettings, frame: Atoms) -> bool:
    try:
        oracle.check(frame)
    except LabelError:
        return False
    return True


def check_starts(settings: GeneratorSettings, starts: Sequence[Atoms]) -> None:
    """Refuses start geometries that a generator can make nothing of; raises InputError."""
    if settings.needs_starts and not starts:
        raise InputError(f"'{settings.kind}' changes start geometries, and system.structures names none.")
    settings.check(starts)
