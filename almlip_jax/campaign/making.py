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
from almlip_jax.generation.base import Taken
from almlip_jax.oracles import SourceSettings
from almlip_jax.structures.carried import SYSTEM, carried


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
    """The structures of a generator, with charge, spin and the name of their system, if they have one.

    That is the system of the start geometry that a structure is made of.  What is made of none belongs to the one that
    the generator names, else as `name_systems` says.

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
    given = starts_for(settings, starts)
    owner = {SYSTEM: settings.systems[0]} if len(settings.systems) == 1 else {}
    frames = []
    for made in settings.generate(GenerationInputs(given.starts, generator, given.numbers)):
        frame = carried(made)
        frame.info = owner | frame.info | state_of(frame, system)
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


def starts_for(settings: GeneratorSettings, starts: Sequence[Atoms]) -> Taken:
    """The start geometries that a generator takes; raises InputError where it can make nothing of them."""
    if settings.needs_starts and not starts:
        raise InputError(f"'{settings.kind}' changes start geometries, and system.structures names none.")
    return settings.take(starts)
