"""What a sweep makes of its files and settings before anything is trained: nothing is passed over in silence."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from pydantic import ValidationError
from tiny_sweep import LEAKED, POOL, REPEATED, SECTIONS, config_of, springs, write_sets

from almlip_jax.errors import InputError
from almlip_jax.selection import SelectorSettings
from almlip_jax.structures.io import read_structures, write_structures
from almlip_jax.sweep import SweepConfig, run_sweep
from almlip_jax.sweep.bench import Bench, _without_atoms, check_others
from almlip_jax.sweep.course import _share
from almlip_jax.sweep.points import Point, all_points, first_groups, point_groups
from almlip_jax.sweep.pools import LabelledPool, read_pool
from almlip_jax.sweep.records import PointState, SweepDirectory
from almlip_jax.training import TrainingResult


@pytest.fixture
def files(tmp_path: Path) -> Path:
    write_sets(tmp_path)
    return tmp_path


def configured(folder: Path, changes: dict[str, Any] | None = None, **sections: Any) -> SweepConfig:
    """The tiny sweep, with other keys of its system."""
    system = SECTIONS["systems"]["springs"]
    return config_of(folder, systems={"springs": system | (changes or {})}, **sections)


def pool_of(folder: Path, **changes: Any) -> LabelledPool:
    return read_pool(configured(folder, changes), "springs")


def rewritten(path: Path, change: Any) -> list[Atoms]:
    """The structures of a file, which are changed and written back."""
    frames = read_structures(path)
    frames = change(frames) or frames
    write_structures(path, frames)
    return frames


def with_charge(frame: Atoms, charge: int) -> Atoms:
    charged = frame.copy()
    charged.calc = SinglePointCalculator(charged, energy=frame.get_potential_energy() + 5, forces=frame.get_forces())
    charged.info |= {"charge": charge, "spin": 1 + (int(sum(frame.numbers)) - charge) % 2}
    return charged


ALIKE = {"model": SECTIONS["systems"]["springs"]["model"] | {"electronic_state": True}}


def test_one_geometry_in_two_states_is_two_structures_to_a_model_that_is_told(files: Path) -> None:
    rewritten(files / "pool.extxyz", lambda frames: [*frames, with_charge(frames[0], 1), with_charge(frames[0], 2)])
    told, plain = pool_of(files, **ALIKE), pool_of(files)
    last = POOL + REPEATED + LEAKED
    assert plain.usable == tuple(range(POOL)), "a model that is not told takes them for one"
    assert told.usable == (*range(POOL), last, last + 1)


def test_test_structures_in_other_words_are_not_in_the_pool(files: Path) -> None:
    """A model that is told charges takes the same atoms with another charge for another structure."""
    turned = read_structures(files / "near.extxyz")[0]
    turned.rotate(70, (1, 2, 3))
    turned.calc = SinglePointCalculator(turned, energy=0.0, forces=np.zeros((len(turned), 3)))
    last = POOL + REPEATED + LEAKED
    rewritten(files / "pool.extxyz", lambda frames: [*frames, turned, with_charge(turned, 2)])
    assert pool_of(files).usable == tuple(range(POOL)) and pool_of(files, **ALIKE).usable == (*range(POOL), last + 1)
    (note,) = [note for note in pool_of(files).notes if "turned" in note]
    assert note.startswith("1 structures of the pool are left out: they are test structures, turned, shifted or")


def test_a_test_in_a_state_that_nothing_is_learned_of_is_refused(files: Path) -> None:
    rewritten(files / "near.extxyz", lambda frames: [*frames, with_charge(springs(np.random.default_rng(9), 0.1), 2)])
    with pytest.raises(InputError, match=r"the test sets of springs, frame 3 .* no labelled structure has"):
        pool_of(files, **ALIKE)
    assert len(pool_of(files).tests) == 7


def test_isolated_atoms_are_no_tests(files: Path) -> None:
    """Their energies come from no bond; they belong to what a point is, since its errors follow from them."""
    config = configured(files)
    before = read_pool(config, "springs")
    atom = Atoms("H")
    atom.calc = SinglePointCalculator(atom, energy=-3.0, forces=np.zeros((1, 3)))
    rewritten(files / "near.extxyz", lambda frames: [atom, *frames])
    pool = read_pool(config, "springs")
    assert len(pool.tests) == len(before.tests) and pool.atoms_in_tests == 1 and 1 not in pool.isolated
    assert any("1 isolated atoms are left out of the test sets" in note for note in pool.notes)
    write_structures(files / "near.extxyz", [atom])
    with pytest.raises(InputError, match=r"near.extxyz has no labels, and cannot test anything"):
        read_pool(config, "springs")


def test_an_initial_set_of_a_file_holds_no_tests(files: Path) -> None:
    """What points began with before must not go on as if it were the same."""
    tests, pool = (read_structures(files / name) for name in ("near.extxyz", "pool.extxyz"))
    config = configured(files, {"initial": "initial.extxyz"})
    write_structures(files / "initial.extxyz", pool[:4])
    (group, *_) = point_groups(config, all_points(config))
    clean = Bench(config, SweepDirectory(files / "out")).of(group)
    write_structures(files / "initial.extxyz", [*pool[:4], *tests[:2]])
    found = Bench(config, SweepDirectory(files / "out")).of(group)
    assert len(found.dataset(0)) == 4 == len(clean.dataset(0)) and found.pool.usable == clean.pool.usable
    assert found.pool.notes == ("2 structures of the initial set are left out, as they are in test sets.",)
    assert set(found.identity(group, 0)) - set(clean.identity(group, 0)) == {"tests left out of its initial set"}
    write_structures(files / "initial.extxyz", tests)
    with pytest.raises(InputError, match=r"initial.extxyz holds no structure that is in no test set"):
        read_pool(config, "springs")


def test_a_doubtful_energy_is_told(files: Path) -> None:
    def spoil(frames: list[Atoms]) -> None:
        frames[7].calc.results["energy"] += 1000.0

    assert pool_of(files).notes == ()
    rewritten(files / "pool.extxyz", spoil)
    (note,) = pool_of(files).notes
    assert note.startswith("in the pool, the energy of structure 7 (H")


@pytest.mark.parametrize(
    ("changes", "sections", "message"),
    [
        ({"ensemble": {"size": 7}}, {}, r"systems.springs.ensemble.size is not used here; set ensemble_sizes"),
        ({}, {"monitor": "dipole_std"}, r"monitor on systems.springs looks at dipole_std, but the model gives no dip"),
    ],
)
def test_what_would_not_be_used_is_refused(files: Path, changes: Any, sections: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        configured(files, changes, **sections)
    configured(files, {"ensemble": {"size": 2}})


def test_potentials_know_the_states_that_they_were_trained_on(files: Path) -> None:
    rewritten(files / "pool.extxyz", lambda frames: [with_charge(frame, 1) for frame in frames])
    for name in ("near", "far"):
        rewritten(files / f"{name}.extxyz", lambda frames: [with_charge(frame, 1) for frame in frames])
    config = configured(files, ALIKE, side_by_side=1)
    bench = Bench(config, SweepDirectory(files / "out"))
    (group, *_) = first_groups(config, all_points(config))
    tools = bench.of(group)
    shapes = jax.eval_shape(tools.trainer(2).ensemble.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    dataset = tools.dataset(0)
    states = {(1, int(frame.info["spin"])) for frame in dataset}
    kept = bench.keep(group, 0, 0, TrainingResult(params, ()), dict.fromkeys((1,), 0.0), 1.0, dataset)
    assert kept.states == states and kept.strange_state(Atoms("H2")) is not None


def test_a_table_holds_no_points_of_other_settings(files: Path) -> None:
    """Points that are not asked for stand in the table too; what none of them depends on may change."""
    config, out = configured(files), SweepDirectory(files / "out")
    bench = Bench(config, out)
    (group, *_) = point_groups(config, all_points(config))
    point = group.members[0]
    assert isinstance(point, Point) and point.seed == 0
    out.write_state(point, PointState(identity=bench.of(group).identity(group, 0)), bench.of(group).split(0))
    training = SECTIONS["systems"]["springs"]["training"] | {"max_steps": 11}
    selectors = SECTIONS["selectors"] | {"random": {"kind": "max_dist"}}
    new: Any
    for changes, sections, new, different in (
        ({"training": training}, {"seeds": 3}, {"seed": {"2"}}, "training"),
        ({}, {"selectors": selectors}, {"selector": {"max_det"}}, "selector"),
        ({}, {"monitor": "force_std_max"}, {"selector": {"max_det"}}, "monitor"),
    ):
        with pytest.raises(InputError, match=f"{point.name}/state.json was made with another {different}, which"):
            run_sweep(configured(files, changes, **sections), out.path, only=new)
    further = configured(files, seeds=3, selectors={"another": {"kind": "random"}} | SECTIONS["selectors"])
    check_others(Bench(further, out), [one for one in all_points(further) if one.selector == "another"])
    rewritten(files / "near.extxyz", lambda frames: frames[:2])
    with pytest.raises(InputError, match="another content of its files"):
        run_sweep(configured(files, seeds=3), out.path, only={"seed": {"2"}})


def test_time_before_a_kill_counts() -> None:
    """The reports of a training that goes on know how long it has taken in all."""
    results: Any = [SimpleNamespace(history=[SimpleNamespace(seconds=seconds)]) for seconds in (5.0, 6.0)]
    assert _share(2.0, results[:1]) == 5.0 and _share(7.0, results[:1]) == 7.0
    assert _share(8.0, results) == 4.0


def test_keys_that_earlier_versions_did_not_know_change_no_point():
    mine = {"kind": "user", "function": "a:b"}
    settings = SelectorSettings.parse({"kind": "chain", "filters": [mine], "selector": mine})
    kept = _without_atoms(settings.model_dump(mode="json"))
    assert "atom_features" not in kept["selector"] and "atom_features" not in kept["filters"][0]
    asking = SelectorSettings.parse(mine | {"atom_features": ["latent"]})
    assert _without_atoms(asking.model_dump(mode="json"))["atom_features"] == ["latent"]
