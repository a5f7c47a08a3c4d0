"""Cells of silicon made without any potential, for a teacher to label."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms
from ase.build import bulk

from almlip_jax.generation import (
    GenerationInputs,
    GeneratorSettings,
    RandomSearchSettings,
    RattledSettings,
    StrainedSettings,
    SurfacesSettings,
    VacanciesSettings,
)
from almlip_jax.structures.carried import carried

LATTICE = 5.469  # Angstrom, PBE


def made() -> list[Atoms]:
    """1,080 cells of 8 to 64 atoms: strained, displaced, with vacancies, with surfaces, and random ones."""
    cubic = bulk("Si", a=LATTICE, cubic=True)
    large = cubic.repeat(2)
    generator = np.random.default_rng(0)

    def of(start: Atoms, *settings: GeneratorSettings) -> list[Atoms]:
        return [frame for one in settings for frame in one.generate(GenerationInputs([start], generator))]

    return [
        *of(large, *(RattledSettings(count=80, stdev=stdev) for stdev in (0.05, 0.15, 0.25))),
        *of(cubic, *(StrainedSettings(count=80, strain=0.08, stdev=stdev) for stdev in (0.0, 0.1, 0.2))),
        *of(large, *(StrainedSettings(count=60, strain=0.06, stdev=stdev) for stdev in (0.05, 0.2))),
        *of(cubic, *(VacanciesSettings(count=80, repeat=(2, 2, 2), missing=2, stdev=s) for s in (0.1, 0.25))),
        *of(cubic, SurfacesSettings(count=120, layers=3, vacuum=6, stdev=0.1, periodic_normal=True)),
        *of(cubic, RandomSearchSettings(count=200, composition={"Si": 1}, units=(8, 20), volume=(15, 26), relax=None)),
    ]


def around(pool: Sequence[Atoms]) -> list[Atoms]:
    """Cells of a pool, whose labels are not looked at, and three displaced copies of each."""
    bare, generator = [carried(frame) for frame in pool], np.random.default_rng(1)
    moved = (RattledSettings(count=len(bare), stdev=stdev, closest=0.5) for stdev in (0.05, 0.1, 0.2))
    return [*bare, *(frame for one in moved for frame in one.generate(GenerationInputs(bare, generator)))]
