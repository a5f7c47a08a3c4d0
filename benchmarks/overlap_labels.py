"""GFN2-xTB labels, and an exploration, that take as long as they are told to without a core being busy."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from ase import Atoms

from almlip_jax.oracles import Results, TBLiteSettings

if TYPE_CHECKING:
    from almlip_jax.campaign.choice import Beginning

CANDIDATES = 64
"""Structures that the exploration finds in a round."""


def make(seconds: float) -> Callable[[Atoms], Results]:
    """A label source of so many seconds a label."""
    label = TBLiteSettings().build()

    def asleep(atoms: Atoms) -> Results:
        end = time.monotonic() + seconds
        found = label(atoms)
        time.sleep(max(0.0, end - time.monotonic()))
        return found

    return asleep


def wander(seconds: float) -> Callable[[Beginning], list[Atoms]]:
    """An exploration that takes so many seconds, without a core being busy, and finds displaced start geometries."""

    def explore(given: Beginning) -> list[Atoms]:
        import jax  # label workers import none

        time.sleep(seconds)
        generator = np.random.default_rng(np.asarray(jax.random.key_data(given.key)).tolist())
        found = [given.starts[0].copy() for _ in range(CANDIDATES)]
        for frame in found:
            frame.positions += generator.normal(scale=0.08, size=frame.positions.shape)
        return found

    return explore
