"""Unlike systems in one campaign: their shares of the first labels."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc100, molecule
from tiny_campaign import tiny_config

from almlip_jax.campaign.inputs import Inputs
from almlip_jax.campaign.sparse import SparseSettings, sparse
from almlip_jax.campaign.teacher import FromTeacherSettings, TeacherSettings
from almlip_jax.campaign.teaching import Teacher, first_choice
from almlip_jax.ensembles import EnsembleSettings, build_ensemble
from almlip_jax.models import SharedDensitySettings
from almlip_jax.oracles import CalculatorSettings, Labeller, LabelStore, rattle
from almlip_jax.potential import Potential
from almlip_jax.progress import SilentProgress
from almlip_jax.structures.carried import system_of
from almlip_jax.structures.io import write_structures
from almlip_jax.structures.species import SpeciesTable

STARTS = {
    "water": molecule("H2O"),
    "metal": bulk("Cu", cubic=True),
    "slab": fcc100("Cu", (2, 1, 2), vacuum=6, periodic=True),
}
STARTS["slab"].pbc = [True, True, False]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Start geometries of three systems that have nothing in common."""
    for name, start in STARTS.items():
        write_structures(tmp_path / f"{name}.extxyz", [start])
    return {name: str(tmp_path / f"{name}.extxyz") for name in STARTS}


def displaced(**counts: int) -> list[Atoms]:
    """Structures of the systems, so many of each."""
    frames = []
    for name, count in counts.items():
        for frame in rattle(STARTS[name], count, np.random.default_rng(len(name)), stdev=0.05):
            frame.info["system"] = name
            frames.append(frame)
    return frames


def counted(frames: list[Atoms]) -> dict[str | None, int]:
    return dict(Counter(system_of(frame) for frame in frames))


EQUAL = {"water": 1.0, "metal": 1.0, "slab": 1.0}


@pytest.mark.parametrize("selector", [{"kind": "bait"}, {"kind": "top_k", "score": "force_std_max"}])
def test_first_labels_of_a_teacher_are_shared(selector: dict[str, Any], tmp_path: Path) -> None:
    """Whatever the selector prefers, which without shares is one system nearly always."""
    frames = displaced(slab=9, water=12, metal=6)
    model, members, species = SharedDensitySettings(size="tiny", cutoff=4.0), EnsembleSettings(size=2), (1, 8, 29)
    params = jax.jit(build_ensemble(model, members, SpeciesTable(species)).init)(jax.random.key(0))
    potential = Potential(model, SpeciesTable(species), params, dict.fromkeys(species, 0.0), members=members)
    source = CalculatorSettings(calculator="ase.calculators.emt:EMT")

    def first(count: int, shares: dict[str, float]) -> list[Atoms]:
        asked = FromTeacherSettings.model_validate({"count": count, "selector": selector})
        return first_choice(asked, teacher, potential, frames, 1, SilentProgress(), shares)

    with LabelStore(tmp_path / "labels.db") as store, Labeller(source, store) as labeller:
        teacher = Teacher(TeacherSettings(source=source), labeller, labeller)
        alone, shared = first(6, {}), first(6, EQUAL)
        assert counted(shared) == {"water": 2, "metal": 2, "slab": 2} != counted(alone)
        assert counted(first(8, {**EQUAL, "slab": 2.0})) == {"water": 2, "metal": 2, "slab": 4}
        assert counted(first(24, EQUAL)) == {"water": 9, "metal": 6, "slab": 9}, "what one has not goes to the others"
    assert len({frame.positions.tobytes() for frame in shared}) == 6


def test_a_sparse_sample_is_shared() -> None:
    frames = [*displaced(water=8, metal=5, slab=7), *rattle(molecule("CO"), 4, np.random.default_rng(0), stdev=0.1)]

    def chosen(count: int, **more: Any) -> dict[str | None, int]:
        rows = sparse(frames, SparseSettings(count=count), jax.random.key(0), cutoff=4.0, seed=0, **more)
        assert len(set(rows)) == count
        return counted([frames[row] for row in rows])

    assert chosen(6, shares=EQUAL) == {"water": 2, "metal": 2, "slab": 2}
    assert chosen(8, shares={**EQUAL, "metal": 2.0}) == {"water": 2, "metal": 4, "slab": 2}
    assert chosen(22, shares=EQUAL) == {"water": 8, "metal": 5, "slab": 7, None: 2}, "those of no system come last"
    assert chosen(6, shares=EQUAL, known=frames[:3]) == {"water": 2, "metal": 2, "slab": 2}


def test_first_labels_of_a_pool_are_shared(files: dict[str, str], tmp_path: Path) -> None:
    write_structures(tmp_path / "pool.extxyz", displaced(water=20, metal=6, slab=6))
    pool = {"kind": "pool", "files": str(tmp_path / "pool.extxyz")}
    initial = {"rattle": None, "md": (), "from_pool": {"count": 8}}
    system = {"structures": files, "shares": {**EQUAL, "slab": 2.0}}
    given = {"initial": initial, "test": {"md": (), "from_pool": 6}, "exploration": pool}
    inputs = Inputs(tiny_config(tmp_path, system=system, **given))
    assert counted(inputs.of_pool(inputs.pool_split.initial)) == {"water": 2, "metal": 2, "slab": 4}
    plain = Inputs(tiny_config(tmp_path, **given))
    assert plain.pool_split.test == inputs.pool_split.test, "shares change no test set"
