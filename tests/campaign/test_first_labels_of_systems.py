"""Dynamics for first labels, tests and teachers that are of some systems alone, and tests from a pool by system."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from rich.console import Console
from tiny_campaign import tiny_config

from almlip_jax.campaign.checks import check_campaign
from almlip_jax.campaign.choice import ExplorationInputs
from almlip_jax.campaign.inputs import Inputs
from almlip_jax.campaign.preparation import Source, held_out_set, initial_set, planned_calls, start_geometries
from almlip_jax.campaign.round import Round
from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.campaign.settings import InitialSettings, LabelMdSettings, SystemSettings
from almlip_jax.campaign.settings import TestSettings as HeldOutSettings
from almlip_jax.campaign.teacher import TeacherSettings
from almlip_jax.campaign.teaching import Teacher, make_frames
from almlip_jax.errors import InputError
from almlip_jax.files import write_json
from almlip_jax.oracles import CalculatorSettings, Labeller, LabelStore
from almlip_jax.progress import LineProgress, SilentProgress
from almlip_jax.structures.io import read_structures, write_structures
from almlip_jax.structures.repeats import geometry_key

ORACLE = {"kind": "ase", "calculator": "ase.calculators.emt:EMT"}
SPRINGS = {"kind": "ase", "calculator": "moody_calculator:Moody", "parameters": {"length": 2.5}}
"""Between all pairs of four atoms: six vibrations, whatever the cell."""
TETRAHEDRON = 0.85 * np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
"""Positions of four copper atoms, Angstrom."""
LONG = {"steps": 160, "every": 4, "equilibration": 80, "timestep": 5.0}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Start geometries of a cluster and a crystal of four atoms each, at rest."""
    write_structures(tmp_path / "cluster.extxyz", [Atoms("Cu4", positions=TETRAHEDRON)])
    write_structures(tmp_path / "metal.extxyz", [bulk("Cu", a=3.59, cubic=True)])
    return {name: str(tmp_path / f"{name}.extxyz") for name in ("cluster", "metal")}


def config_with(folder: Path, files: Any, **sections: Any) -> Any:
    given = {"initial": {"rattle": {"count": 2}, "md": ()}, "test": {"md": ()}}
    return tiny_config(folder, system={"structures": files}, oracle=ORACLE, **{**given, **sections})


def kelvin(frames: list[Atoms]) -> float:
    """The temperature of four atoms on springs, by the mean of the energy of their six vibrations."""
    return float(np.mean([frame.get_potential_energy() for frame in frames]) / (6 / 2 * units.kB))


@pytest.mark.usefixtures("labels_here")
def test_dynamics_for_first_labels_are_of_the_systems_they_name(tmp_path: Path, files: dict[str, str]) -> None:
    """At their temperatures; what is given for one system changes nothing of another."""
    system, oracle = SystemSettings(structures=files), CalculatorSettings.model_validate(SPRINGS)
    starts = start_geometries(system)
    everyone = LabelMdSettings(temperature=100, **LONG)
    hot = LabelMdSettings(temperature=400, systems=("metal",), **LONG)
    with LabelStore(tmp_path / "labels.db") as store, Labeller(oracle, store) as labeller:
        advanced: list[int] = []
        source = Source(starts, system, labeller, 0, {"campaign": "two"}, print, advanced.append)
        settings = InitialSettings(rattle=None, md=(everyone, hot))
        frames = initial_set(settings, source, ())
        alone = source.dynamics((everyone,), "initial")[0][1]
        calls = store.calls_by_system()
    kept = Counter((frame.info["system"], frame.info["origin"]) for frame in frames)
    assert kept == {("cluster", "md-100K"): 40, ("metal", "md-100K"): 40, ("metal", "md-400K"): 40}
    assert calls == {"cluster": {"initial": 241}, "metal": {"initial": 481}}
    assert sum(advanced[:3]) == 720 and planned_calls(settings, starts) == 722
    of = {key: [one for one in frames if (one.info["system"], one.info["origin"]) == key] for key in kept}
    cold, warm = (kelvin(of["metal", f"md-{t}K"]) for t in (100, 400))
    assert 60 < cold < 150 and 250 < warm < 600
    unchanged = {one.positions.tobytes() for one in alone}
    assert {one.positions.tobytes() for one in frames if one.info["origin"] == "md-100K"} == unchanged


@pytest.mark.usefixtures("labels_here")
def test_groups_of_the_test_set_are_those_of_named_systems(tmp_path: Path, files: dict[str, str]) -> None:
    system, oracle = SystemSettings(structures=files), CalculatorSettings.model_validate(SPRINGS)
    short = {"steps": 4, "every": 2, "equilibration": 0}
    runs = [
        {"temperature": 300, "systems": ["cluster"], **short},
        {"temperature": 600, **short},
        {"temperature": 900, "systems": ["metal", "cluster"], **short},
    ]
    settings = HeldOutSettings(md=runs)
    with LabelStore(tmp_path / "labels.db") as store, Labeller(oracle, store) as labeller:
        source = Source(start_geometries(system), system, labeller, 0, {"campaign": "two"}, print)
        test = held_out_set(settings, source, [], [])
    named = ("cluster 300K", "cluster 600K", "metal 600K", "metal 900K", "cluster 900K")
    assert Counter(frame.info["group"] for frame in test) == dict.fromkeys(named, 2)
    assert settings.groups(("cluster", "metal")) == named
    assert all(frame.info["group"].split()[0] == frame.info["system"] for frame in test)
    stopping = {"target_error": {"value": 0.1, "group": "metal 300K"}}
    with pytest.raises(ValueError, match="'metal 300K' is not a group of the test set, which has: cluster 300K"):
        config_with(tmp_path, files, test={"md": runs}, stopping=stopping)


@pytest.mark.usefixtures("labels_here")
def test_a_teacher_has_temperatures_for_systems(tmp_path: Path, files: dict[str, str]) -> None:
    """Frames are shared out evenly among the trajectories that there are, each of the system and temperature named."""
    system = SystemSettings(structures=files)
    given = {"source": SPRINGS, "executor": {"kind": "local", "workers": 1}, "every": 4, "equilibration": 80}
    given |= {"timestep": 5.0, "frames": 120, "temperatures": [100, {"temperature": 400, "systems": ["metal"]}]}
    settings, run = TeacherSettings.model_validate(given), RunDirectory(tmp_path / "run")
    run.path.mkdir()
    teacher = Teacher.open(settings, run)
    try:
        source = Source(start_geometries(system), system, teacher.driver, 0, {"campaign": "two"}, print)
        make_frames(teacher, source, run, SilentProgress())
    finally:
        teacher.close()
    frames = read_structures(run.teacher.frames)
    kept = Counter((frame.info["system"], frame.info["bath_temperature"]) for frame in frames)
    assert kept == {("cluster", 100.0): 40, ("metal", 100.0): 40, ("metal", 400.0): 40}
    hot = [one for one in frames if one.info["bath_temperature"] == 400.0]
    assert 250 < kelvin(hot) < 600
    written = settings.model_dump(mode="json")["temperatures"]
    assert written == [100.0, {"temperature": 400.0, "systems": ["metal"]}]
    assert TeacherSettings.model_validate(settings.model_dump(mode="json")) == settings


HOT = {"temperature": 900, "systems": ["slab"]}
TEACHER = {"source": {"kind": "ase", "calculator": "ase.calculators.lj:LennardJones"}}


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"initial": {"md": [HOT]}}, r"initial\.md\.0\.systems names 'slab'; the systems are: cluster, metal"),
        ({"test": {"md": [{"temperature": 300}, HOT]}}, r"test\.md\.1\.systems names 'slab'; the systems are"),
        ({"test": {"from_pool": {"slab": 3}}}, r"test\.from_pool names 'slab'; the systems are: cluster, metal"),
        ({"teacher": {**TEACHER, "temperatures": [300, HOT]}}, r"teacher\.temperatures\.1\.systems names 'slab'"),
        ({"initial": {"md": [{"temperature": [300, 600]}]}}, "one temperature each; ramps are for exploration.walkers"),
        ({"test": {"md": [{"temperature": 300, "pressure": 1.0}]}}, "'pressure': dynamics with a label source keep"),
        ({"teacher": {**TEACHER, "temperatures": [{"temperature": 300, "count": 2}]}}, "'count': dynamics with"),
        (
            {"teacher": {**TEACHER, "temperatures": [{"temperature": 300, "systems": ["metal"]}]}},
            "no structure of system 'cluster'",
        ),
    ],
)
def test_what_systems_cannot_have_is_refused(tmp_path: Path, files: Any, sections: Any, why: str) -> None:
    """With the key that says it; a system that its teacher never meets has to be labelled first."""
    if "teacher" in sections:
        sections = {"initial": {"rattle": None, "md": (), "from_teacher": {"count": 4}}, **sections}
    with pytest.raises((ValueError, InputError), match=why):
        check_campaign(config_with(tmp_path, files, **sections))


def test_systems_without_names_have_no_dynamics_of_their_own(tmp_path: Path, files: dict[str, str]) -> None:
    hot = {"temperature": 900, "systems": ["metal"]}
    for sections in ({"initial": {"md": [hot]}}, {"teacher": {**TEACHER, "temperatures": [hot]}}):
        with pytest.raises(ValueError, match="names 'metal', but the systems have no names"):
            config_with(tmp_path, list(files.values()), **sections)


def test_a_teacher_of_one_system_says_so(tmp_path: Path, files: dict[str, str]) -> None:
    said: list[str] = []
    teacher = {**TEACHER, "temperatures": [{"temperature": 300, "systems": ["metal"]}]}
    check_campaign(config_with(tmp_path, files, teacher=teacher), said.append)
    assert "teacher.temperatures name none for system 'cluster', of which the teacher teaches nothing." in said


def labelled(atoms: Atoms, **info: Any) -> Atoms:
    """The structure with the labels of EMT."""
    atoms.calc = EMT()
    results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    atoms.calc = SinglePointCalculator(atoms, **results)
    atoms.info.update(info)
    return atoms


def of_pool(folder: Path, test: Any, initial: int = 4) -> Any:
    """The config of a campaign on a pool of thirty molecules, five crystals and three structures of no system."""
    write_structures(folder / "pair.extxyz", [molecule("N2")])
    write_structures(folder / "crystal.extxyz", [bulk("Cu", cubic=True)])
    pool = []
    for number in range(38):
        frame = molecule("N2") if number < 30 else bulk("Cu", cubic=True) if number < 35 else molecule("NO")
        frame.rattle(0.05, seed=number)
        pool.append(labelled(frame))
    write_structures(folder / "pool.extxyz", pool)
    return config_with(
        folder,
        {name: str(folder / f"{name}.extxyz") for name in ("pair", "crystal")},
        initial={"rattle": None, "md": (), "from_pool": initial},
        test={"md": (), "from_pool": test},
        exploration={"kind": "pool", "files": str(folder / "pool.extxyz")},
    )


def test_a_pool_gives_the_test_set_counts_by_system(tmp_path: Path) -> None:
    """Drawn at random of each; a larger draw holds the smaller, and changes nothing of other systems."""
    few, more = (Inputs(of_pool(tmp_path, {"crystal": n, "pair": 6})) for n in (2, 3))
    drawn = [set(inputs.pool_split.test) for inputs in (few, more)]
    for inputs, crystals in ((few, 2), (more, 3)):
        split = inputs.pool_split
        assert Counter(one.info["system"] for one in inputs.of_pool(split.test)) == {"crystal": crystals, "pair": 6}
        assert inputs.test_of_pool == split.test and sorted((*split.test, *split.outside_test)) == list(range(38))
        assert Counter(one.info.get("system") for one in inputs.of_pool(split.initial)) == {"pair": 2, "crystal": 2}
    assert drawn[0] < drawn[1] and len(drawn[1] - drawn[0]) == 1
    assert few.pool_split.test != tuple(sorted(few.pool_split.test)), "drawn, not the first of the file"
    groups = HeldOutSettings(from_pool={"crystal": 2, "pair": 6}).groups(("pair", "crystal"))
    assert groups == ("crystal pool", "pair pool")


@pytest.mark.parametrize(
    ("test", "told"),
    [
        ({"crystal": 2, "pair": 4}, []),
        ({"crystal": 5}, ["takes all 5 structures of system 'crystal'", "the pool has 0 structures of system 'cry"]),
        (1, ["test.from_pool 1 draws no structure of system 'crystal', of which the pool has 5; counts by system"]),
    ],
)
def test_what_a_system_has_too_little_of_is_told(tmp_path: Path, test: Any, told: list[str]) -> None:
    said: list[str] = []
    check_campaign(of_pool(tmp_path, test), said.append)
    assert len(said) == len(told) and all(one in sentence for one, sentence in zip(told, said, strict=True)), said


def test_more_than_a_system_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has 5 structures of system 'crystal', fewer than test.from_pool.crystal 6"):
        check_campaign(of_pool(tmp_path, {"crystal": 6}))
    with pytest.raises(InputError, match="too few for test.from_pool 30 and initial.from_pool 9"):
        check_campaign(of_pool(tmp_path, {"pair": 30}, initial=9))


def test_what_is_in_the_test_set_is_never_a_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor copies of it, shifted, turned or with atoms in another order; other structures all are.

    What takes long shows how far it is, once.
    """
    monkeypatch.setattr("almlip_jax.progress._LONG", -1.0)
    config = of_pool(tmp_path, {"crystal": 2, "pair": 6})
    frames = read_structures(tmp_path / "pool.extxyz")
    copies = [frame[::-1] for frame in frames]
    for frame in copies[::2]:
        frame.positions += [1.0, -2.0, 0.5]
        frame.rotate(50, (1, 2, 3), rotate_cell=True)
    write_structures(tmp_path / "pool.extxyz", [*frames, *map(labelled, copies)])
    run = RunDirectory(tmp_path / "run").create()
    split = Inputs(config).pool_split
    run.round(0).create()
    write_json(run.initial_pool, {"places": list(split.initial)})
    inputs = Inputs(config, run)
    held_out = inputs.of_pool(split.test)
    write_structures(run.test, [labelled(frame.copy()) for frame in held_out])
    scored: list[int] = []

    def evaluate(name: str, frames: Any, advance: Any) -> Any:
        scored.extend(frame.info["pool_index"] for frame in frames)
        return SimpleNamespace(scores={}, atom_scores={"force_std": [np.zeros(len(frame)) for frame in frames]})

    nothing: Any = None
    trained: Any = SimpleNamespace(evaluate=evaluate)
    out = io.StringIO()
    progress = LineProgress(Console(file=out, width=80))
    here, withheld = Round(run, 0, "by hand", 7, progress), frozenset(map(geometry_key, held_out))
    given = ExplorationInputs(here, trained, inputs, withheld, explorers=nothing, budget=nothing)
    config.exploration.stage(given)
    twins = {(place + 38) % 76 for place in split.test}
    assert set(scored) == set(range(76)) - {*split.test, *twins, *split.initial} and len(twins - {*split.test}) > 4
    config.exploration.stage(given)
    assert out.getvalue().count("compare with test set: 76 structures in") == 1


def test_test_structures_that_are_trained_on_in_other_words_are_left_out(tmp_path: Path, files: Any) -> None:
    system, said = SystemSettings(structures=files), list[str]()
    test = [Atoms("Cu4", positions=TETRAHEDRON * scale) for scale in (1.0, 1.05, 1.1)]
    trained = [labelled(frame[[2, 0, 3, 1]]) for frame in test[1:2]]
    trained[0].rotate(33, (1, 1, 3))
    write_structures(tmp_path / "test.extxyz", [labelled(frame) for frame in test])
    settings = HeldOutSettings.model_validate({"files": [{"path": tmp_path / "test.extxyz"}]})
    nothing: Any = None
    source = Source(start_geometries(system), system, nothing, 0, {}, said.append)
    kept = held_out_set(settings, source, [], trained)
    assert [round(frame.positions[0, 0] / 0.85, 2) for frame in kept] == [1.0, 1.1]
    assert said == ["1 structures of test group cluster test are trained on or come twice; they were left out."]


def test_a_correction_needs_all_elements_taught(tmp_path: Path) -> None:
    """Of others there is nothing to correct; a source that cannot label what it never meets may teach the rest."""
    write_structures(tmp_path / "metal.extxyz", [bulk("Cu", cubic=True)])
    write_structures(tmp_path / "ion.extxyz", [molecule("OH")])
    files = {name: str(tmp_path / f"{name}.extxyz") for name in ("metal", "ion")}
    teacher = {**TEACHER, "temperatures": [{"temperature": 300, "systems": ["metal"]}]}
    check_campaign(config_with(tmp_path, files, teacher=teacher))
    correction = {"kind": "shared_density", "size": "tiny"}
    with pytest.raises(InputError, match="what the teacher taught, which holds no H; give it dynamics"):
        check_campaign(config_with(tmp_path, files, teacher={**teacher, "correction": correction}))
