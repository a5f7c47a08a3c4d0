"""Several systems in one campaign: names, groups of the test set, labels, shares."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixCom, Hookean
from pydantic import ValidationError
from tiny_campaign import Killed, KillingProgress, result_of, run_or_resume, tiny_config

from almlip_jax.campaign import preparation
from almlip_jax.campaign.batch import choose_for_systems
from almlip_jax.campaign.buckets import Size, buckets, shared_programs
from almlip_jax.campaign.checks import check_campaign
from almlip_jax.campaign.inputs import Inputs
from almlip_jax.campaign.preparation import Source, held_out_set, initial_set, start_geometries
from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.campaign.settings import InitialSettings, MdExploration, RattleSettings, SystemSettings
from almlip_jax.campaign.starts import Beginnings, FileStarts, LabelledStarts, further_starts, walker_starts
from almlip_jax.campaign.status import campaign_status
from almlip_jax.campaign.systems import name_systems, systems_of_walkers
from almlip_jax.dynamics import ExplorationSettings, Explorer, dealt_further
from almlip_jax.dynamics.seen import Thresholds
from almlip_jax.dynamics.side_by_side import side_by_side
from almlip_jax.ensembles import EnsembleSettings, build_ensemble
from almlip_jax.errors import InputError, LabelError
from almlip_jax.files import read_csv, read_npz, write_json
from almlip_jax.models import SharedDensitySettings
from almlip_jax.oracles import CalculatorSettings, Labeller, LabelStore
from almlip_jax.potential import Potential
from almlip_jax.progress import SilentProgress
from almlip_jax.settings import from_here
from almlip_jax.structures.io import read_structures, write_structures
from almlip_jax.structures.species import SpeciesTable


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Start geometries of two systems that EMT knows."""
    write_structures(tmp_path / "pair.extxyz", [molecule("N2")])
    write_structures(tmp_path / "metal.extxyz", [bulk("Cu", cubic=True)])
    return {name: str(tmp_path / f"{name}.extxyz") for name in ("pair", "metal")}


def labelled(atoms, **info):
    """The structure with the labels of EMT."""
    atoms.calc = EMT()
    results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    atoms.calc = SinglePointCalculator(atoms, **results)
    atoms.info.update(info)
    return atoms


def test_strata_of_systems_are_those_that_there_are(files, tmp_path):
    """What no candidate could have is refused before a label is paid for."""
    strata = {"kind": "stratified", "by": "system", "selector": {"kind": "max_dist"}}
    for structures, more, why in (
        (files["pair"], {}, "stratified by 'system', but the systems have no names"),
        (files, {"shares": {"pair": 1, "metall": 2}}, "shares name 'metall'; the systems are: pair, metal"),
    ):
        config = tiny_config(
            tmp_path,
            system={"structures": structures},
            oracle={"kind": "ase", "calculator": "ase.calculators.emt:EMT"},
            selection={"selector": strata | more},
        )
        with pytest.raises(InputError, match=why):
            check_campaign(config)


def test_start_geometries_carry_the_names_of_their_systems(files):
    named = start_geometries(SystemSettings(structures=files))
    assert [frame.info["system"] for frame in named] == ["pair", "metal"]
    assert [list(frame.info) for frame in start_geometries(SystemSettings(structures=tuple(files.values())))] == [
        ["charge", "spin"]
    ] * 2, "nothing is named where systems have no names"


def test_paths_of_systems_hold_wherever_the_config_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = from_here(SystemSettings.model_validate({"structures": {"a": "a.xyz", "b": ["b.xyz", "c.xyz"]}}))
    assert settings.named == {"a": (tmp_path / "a.xyz",), "b": (tmp_path / "b.xyz", tmp_path / "c.xyz")}
    assert hash(settings) == hash(SystemSettings.model_validate(settings.model_dump(mode="json")))
    given = SystemSettings.model_validate({"structures": {"a": "a.xyz"}}, context={"folder": tmp_path / "inputs"})
    assert given.named == {"a": (tmp_path / "inputs" / "a.xyz",)}


@pytest.mark.parametrize(
    ("structures", "reason"),
    [
        ({"a b": "x.xyz"}, "'a b' cannot name a system"),
        ({"T": "x.xyz"}, "read 'T' back"),
        ({"a": []}, "system 'a' of structures names no file"),
    ],
)
def test_names_that_cannot_serve_are_refused(structures, reason):
    with pytest.raises(ValueError, match=reason):
        SystemSettings.model_validate({"structures": structures})


def test_a_file_without_structures_is_refused(files, tmp_path):
    (tmp_path / "none.extxyz").write_text("")
    with pytest.raises(InputError, match=r"none\.extxyz"):
        start_geometries(SystemSettings.model_validate({"structures": {**files, "void": tmp_path / "none.extxyz"}}))


def test_structures_belong_to_the_system_they_name_or_whose_composition_they_have(files):
    starts = start_geometries(SystemSettings(structures=files))
    stated, alike, other = bulk("Cu"), molecule("N2"), molecule("O2")
    stated.info["system"] = "metal"
    named = name_systems([stated, alike, other], starts, "some file")
    assert [frame.info.get("system") for frame in named] == ["metal", "pair", None]
    stated.info["system"] = "slab"
    with pytest.raises(InputError, match=r"some file, frame 0 belongs to system 'slab', .* pair, metal"):
        name_systems([stated], starts, "some file")
    polymorph = bulk("Cu", "bcc", 2.9, cubic=True) * (2, 1, 1)
    polymorph.info["system"] = "bcc"
    unsure = bulk("Cu", cubic=True)
    assert "system" not in name_systems([unsure], [*starts, polymorph], "some file")[0].info, "it may be either"


@pytest.mark.usefixtures("labels_here")
def test_groups_of_the_test_set_and_labels_are_told_of_each_system(files, tmp_path):
    system = SystemSettings(structures=files)
    further = tmp_path / "test.extxyz"
    write_structures(further, [labelled(bulk("Cu", a=3.7, cubic=True)), labelled(molecule("O2"))])
    settings = preparation.TestSettings(
        md=[{"temperature": 300, "steps": 2, "every": 1, "equilibration": 0}],
        files=[preparation.TestFileSettings(path=further, group="far")],
    )
    oracle = CalculatorSettings(calculator="ase.calculators.emt:EMT")
    with LabelStore(tmp_path / "labels.db") as store, Labeller(oracle, store) as labeller:
        source = Source(start_geometries(system), system, labeller, 0, {"campaign": "two"}, print)
        test = held_out_set(settings, source, [], [])
        calls = store.calls_by_system()
    groups = [frame.info["group"] for frame in test]
    assert groups == ["pair 300K"] * 2 + ["metal 300K"] * 2 + ["metal far", "far"]
    assert [frame.info.get("system") for frame in test] == ["pair"] * 2 + ["metal"] * 3 + [None]
    assert calls == {"pair": {"test": 3}, "metal": {"test": 3}}, "two steps and the start of each"
    assert set(groups) <= set(settings.groups(("pair", "metal")))
    write_structures(tmp_path / "again.extxyz", test)
    assert [frame.info.get("system") for frame in read_structures(tmp_path / "again.extxyz")][:3] == [
        "pair",
        "pair",
        "metal",
    ]


@pytest.mark.usefixtures("labels_here")
def test_a_system_whose_labels_all_fail_is_told_of(files, tmp_path):
    """Or the campaign waits for its labels: its walkers would end at once, and none would ever be bought for it."""
    write_structures(tmp_path / "metal_only.extxyz", [labelled(bulk("Cu", a=3.7, cubic=True))])
    system, said = SystemSettings(structures=files), list[str]()
    settings = InitialSettings(dataset=tmp_path / "metal_only.extxyz", rattle=None, md=())
    oracle = CalculatorSettings(calculator="ase.calculators.emt:EMT")
    with LabelStore(tmp_path / "labels.db") as store, Labeller(oracle, store) as labeller:
        source = Source(start_geometries(system), system, labeller, 0, {"campaign": "two"}, said.append)
        assert len(initial_set(settings, source, ())) == 1
        assert said == ["the initial set holds no structure of system 'pair': the first potential sees no label of it."]
        with pytest.raises(LabelError, match="no structure of system 'pair' in the initial set could be labelled"):
            initial_set(settings, source, (), needed=("pair",))
        rattled = settings.model_copy(update={"rattle": RattleSettings(count=2)})
        assert len(initial_set(rattled, source, (), needed=("pair",))) == 3
    assert len(said) == 1


@pytest.mark.parametrize(
    ("initial", "why"),
    [
        ({"rattle": None}, "no structure of system 'pair', and .*count: 5, systems: \\[pair\\]} to initial.generated"),
        ({"rattle": None, "dataset": None, "generated": [{"kind": "strained"}]}, "no structure of system 'pair'"),
        ({"dataset": None, "rattle": {"count": 1}}, "of system 'metal', .*rattle.count to at least the 2 start geom"),
        ({"dataset": None, "rattle": {"count": 2}}, None),
        ({"rattle": {"count": 1}}, None),
        ({"rattle": None, "md": [{"temperature": 300}]}, None),
        ({"rattle": None, "generated": [{"kind": "rattled", "systems": ["pair"]}]}, None),
        ({"rattle": None, "generated": [{"kind": "rattled"}], "from_generated": {"count": 1}}, None),
        (
            {"rattle": None, "dataset": None, "generated": [{"kind": "rattled"}], "from_generated": {"count": 1}},
            "no structure of system 'metal'",
        ),
    ],
)
def test_a_system_that_nothing_would_be_known_of_is_refused(files, tmp_path, initial, why):
    """Before a label is paid, with what to add; a teacher, or candidates without walkers, do as well."""
    write_structures(tmp_path / "metal_only.extxyz", [labelled(bulk("Cu", a=3.7, cubic=True))])
    sections = {
        "system": {"structures": files},
        "oracle": {"kind": "ase", "calculator": "ase.calculators.emt:EMT"},
        "initial": {"dataset": str(tmp_path / "metal_only.extxyz"), "md": (), **initial},
        "test": {"md": ()},
    }
    if why is None:
        return check_campaign(tiny_config(tmp_path, **sections))
    with pytest.raises(InputError, match=why):
        check_campaign(tiny_config(tmp_path, **sections))
    teacher = {"source": {"kind": "ase", "calculator": "ase.calculators.lj:LennardJones"}}
    made = {"kind": "generated", "of": [{"kind": "rattled"}]}
    for other in ({"teacher": teacher}, {"exploration": made}):
        check_campaign(tiny_config(tmp_path, **sections, **other))


def test_a_target_names_a_group_of_one_system(tmp_path, files):
    system = {"structures": files}
    for group in ("pair 300K", None):
        tiny_config(tmp_path, system=system, stopping={"target_error": {"value": 0.1, "group": group}})
    with pytest.raises(ValueError, match="'300K' is not a group of the test set, which has: pair 300K, metal 300K"):
        tiny_config(tmp_path, system=system, stopping={"target_error": {"value": 0.1, "group": "300K"}})


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"shares": {"pair": 1, "slab": 2}}, "shares name 'slab'; the systems are: pair, metal"),
        ({"shares": {"pair": 1}}, "shares leave 'metal' out"),
        ({"shares": {"pair": 1, "metal": 0}}, "greater than 0"),
        ({"shares": {"pair": 1, "metal": 9}}, "system 'pair' would get none of the 2 walkers"),
        ({"structures": "pair.extxyz", "shares": {"pair": 1}}, "shares are of systems with names"),
    ],
)
def test_shares_that_cannot_be_given_are_refused(tmp_path, files, section, reason):
    with pytest.raises(ValueError, match=reason):
        tiny_config(tmp_path, system={"structures": files, **section})


def test_shared_hills_are_refused_for_unlike_systems(tmp_path, files):
    hills = {"kind": "metadynamics", "variables": [{"kind": "distance", "points": [0, 1]}], "widths": [0.1]}
    biases = [{**hills, "height": 0.01, "pace": 10, "shared": True}]
    with pytest.raises(ValueError, match="fill one landscape"):
        tiny_config(tmp_path, system={"structures": files}, exploration={"biases": biases})


def test_walkers_begin_at_structures_of_their_system(files):
    geometries = start_geometries(SystemSettings(structures=files))
    systems = systems_of_walkers({"pair": 1, "metal": 2}, [()] * 6)
    assert systems == ["metal", "pair", "metal", "metal", "pair", "metal"]
    pairs = [labelled(molecule("N2"), system="pair", tag=n) for n in range(2)]
    foreign = labelled(bulk("Cu", cubic=True), tag=9)
    given = Beginnings(geometries, [], [*pairs, foreign], [300.0] * 6, 0, 0, systems)
    starts = walker_starts(LabelledStarts(), given, {0: geometries[0], 2: geometries[1]})
    assert [start.info["system"] for start in starts] == systems, "a walker of another system does not go on"
    assert all(start.info.get("tag") != 9 for start in starts), "what belongs to no system is no start"
    listed = [frame.copy() for frame in (geometries[0], geometries[1], geometries[1], geometries[1])]
    for number, frame in enumerate(listed):
        frame.info["tag"] = number
    settings = FileStarts(path=Path("listed.extxyz"))
    for round_index, tags in ((0, [1, 0, 2, 3, 0, 1]), (1, [2, 0, 3, 1, 0, 2])):
        given = Beginnings(geometries, listed, [], [300.0] * 6, 0, round_index, systems)
        first = walker_starts(settings, given, {})
        assert [start.info["tag"] for start in first] == tags
        others = [[start.info["tag"] for start in own] for own in further_starts(settings, given, 2, first)]
        turned = {1: [2, 3], 2: [3, 1], 3: [1, 2]}  # of the metal's, in the order of the file; the pair has one
        assert others == [turned.get(tag, [0, 0]) for tag in tags]


def test_walkers_of_groups_are_of_the_systems_that_these_name():
    """By shares among them, whatever stands before or after; the other groups deal as if they were alone."""
    shares = {"pair": 1, "metal": 1, "slab": 2}
    free, some = [()] * 4, [("slab", "pair")] * 3
    dealt = ["slab", "pair", "metal", "slab"]
    assert systems_of_walkers(shares, free) == dealt
    assert systems_of_walkers(shares, [*some, *free]) == ["slab", "pair", "slab", *dealt]
    assert systems_of_walkers(shares, [*free, ("pair", "slab"), *some]) == [*dealt, "slab", "pair", "slab", "slab"]
    assert systems_of_walkers({}, [(), ()]) == [None, None]


NPT = {"integrator": {"kind": "npt"}}


@pytest.mark.parametrize(
    ("walkers", "why"),
    [
        ([{"temperature": 300, "count": 2, "systems": ["slab"]}], r"walkers\.0\.systems names 'slab'; the systems are"),
        ([{"temperature": 300, "count": 2, "systems": ["metal"]}], "'pair' would get none of the 2 walkers.*name it"),
        (
            [{"temperature": 300, "count": 2, "pressure": 5.0}],
            r"walkers\.0 are under a pressure, and some are of system 'pair', .*that are \(systems: \[met",
        ),
        (
            [{"temperature": 300, "count": 2}, {"temperature": 900, "pressure": [0, 5], "systems": ["pair"]}],
            r"walkers\.1 are under a pressure.* give 'pair' walkers without",
        ),
    ],
)
def test_walkers_that_systems_cannot_have_are_refused(tmp_path, files, walkers, why):
    oracle = {"kind": "ase", "calculator": "ase.calculators.emt:EMT"}
    with pytest.raises(ValueError, match=why):
        check_campaign(
            tiny_config(
                tmp_path, system={"structures": files}, oracle=oracle, exploration={**NPT, "walkers": walkers}
            )
        )


def test_pressures_are_of_systems_with_names(tmp_path, files):
    oracle = {"kind": "ase", "calculator": "ase.calculators.emt:EMT"}
    walkers = [{"temperature": 300, "count": 2}, {"temperature": 900, "pressure": 5.0, "systems": ["metal"]}]
    given = {"oracle": oracle, "exploration": {**NPT, "walkers": walkers}}
    check_campaign(tiny_config(tmp_path, system={"structures": files}, **given))
    with pytest.raises(ValueError, match="systems names 'metal', but the systems have no names"):
        tiny_config(tmp_path, system={"structures": [*files.values()]}, **given)
    del walkers[1]["systems"]
    with pytest.raises(InputError, match="not every start structure is periodic .* give the systems names"):
        check_campaign(tiny_config(tmp_path, system={"structures": [*files.values()]}, **given))
    check_campaign(tiny_config(tmp_path, system={"structures": files["metal"]}, **given))


def test_groups_without_systems_are_those_of_any_exploration():
    plain = ExplorationSettings.model_validate({"walkers": [{"temperature": 300, "count": 3}]})
    assert MdExploration(walkers=plain.walkers).walkers_to_deal == ((), (), ())
    assert MdExploration().temperatures == ExplorationSettings().temperatures
    with pytest.raises(ValueError, match="systems"):
        ExplorationSettings.model_validate({"walkers": [{"temperature": 300, "systems": ["metal"]}]})


def test_walkers_begin_again_at_others_of_their_atoms(files):
    geometries = start_geometries(SystemSettings(structures=files))
    systems = ["metal", "pair"]
    pairs = [labelled(molecule("N2"), system="pair", tag=n) for n in range(40)]
    given = Beginnings(geometries, [], pairs, [300.0] * 2, 0, 0, systems)
    first = walker_starts(LabelledStarts(), given, {})
    metal, pair = further_starts(LabelledStarts(), given, 6, first)
    assert all(start.info["system"] == "metal" for start in metal), "it has no others"
    tags = [start.info["tag"] for start in (first[1], *pair)]
    assert len(set(tags)) > 4, "drawn anew each time"
    assert tags[0] == walker_starts(LabelledStarts(), given, {})[1].info["tag"]
    assert further_starts(LabelledStarts(), given, 0, first) == []
    frames = [molecule("N2"), molecule("CO"), molecule("N2"), molecule("N2")]
    for number, frame in enumerate(frames):
        frame.info["tag"] = number
    one, two = dealt_further(frames, 2, 3)
    assert [frame.info["tag"] for frame in one] == [2, 3, 2] and [frame.info["tag"] for frame in two] == [1, 1, 1]


@pytest.mark.parametrize("restraint", [Hookean(0, (0.0, 0.0, 0.0), 5.0, 1.0), FixCom()])
def test_other_constraints_hold_no_atom_that_starts_would_have_to_share(restraint):
    """Some name no atoms; whoever runs walkers refuses them, with a sentence."""
    frames = [molecule("N2") for _ in range(3)]
    for frame, constraint in zip(frames, (FixAtoms([0]), FixAtoms([0]), FixAtoms([1])), strict=True):
        frame.set_constraint([constraint, restraint])
    assert dealt_further(frames, 1, 2) == [[frames[1], frames[1]]], "the third holds another atom"


def test_systems_share_a_batch():
    owners = ["a", "b", "b", None, "a", "b", None, "b"]

    def choose_from(system, mine):
        return [(row, float(row)) for row in range(8) if mine[row]]

    shares = {"a": 1.0, "b": 1.0}
    assert [row for row, _ in choose_for_systems(choose_from, owners, shares, 4)] == [0, 1, 4, 2]
    assert [row for row, _ in choose_for_systems(choose_from, owners, shares, 7)] == [0, 1, 4, 2, 5, 7, 3]
    assert [row for row, _ in choose_for_systems(choose_from, owners, {"a": 1.0, "b": 3.0}, 4)] == [1, 0, 2, 5]
    assert len(choose_for_systems(choose_from, owners, shares, 20)) == 8


def test_unlike_systems_share_few_programs():
    """Six of them at most four, those of like sizes first; a molecule never pays for a slab next to it."""
    sizes = {
        "water": Size(4, 3, 2),
        "ethanol": Size(4, 9, 8),
        "cluster": Size(4, 55, 40),
        "crystal": Size(4, 64, 60),
        "slab": Size(4, 144, 50),
        "liquid": Size(4, 192, 60),
    }
    shared = shared_programs(sizes)
    assert len(shared) <= 4 and sorted(name for group in shared for name in group) == sorted(sizes)
    of = {name: group for group in shared for name in group}
    assert of["water"] != of["slab"] and of["cluster"] == of["crystal"]
    assert len(shared_programs(sizes, most=2)) == 2
    assert shared_programs({"a": Size(3, 10, 10), "b": Size(1, 10, 10)}) == [("a", "b")]


def test_programs_hold_every_walker_once(files):
    geometries = start_geometries(SystemSettings(structures=files))
    systems = ["metal", "pair", "metal", "metal"]
    found = buckets(systems, geometries, [], 5.0)
    assert [(one.systems, one.walkers, one.atoms) for one in found] == [
        (("metal",), (0, 2, 3), 4),
        (("pair",), (1,), 2),
    ]
    settings = ExplorationSettings.model_validate({"walkers": [{"temperature": 300, "count": 3}, {"temperature": 600}]})
    assert [one.of(settings).temperatures for one in found] == [(300.0, 300.0, 600.0), (300.0,)]
    assert buckets([None] * 4, geometries, [], 5.0)[0].of(settings) is settings
    held = {"kind": "restraint", "variable": {"kind": "distance", "points": [0, 1]}, "stiffness": 1.0}
    given = {"walkers": [{"temperature": 300, "count": 4}], "biases": [held | {"centre": [1.0, 2.0, 3.0, 4.0]}]}
    umbrellas = ExplorationSettings.model_validate(given)
    assert [one.of(umbrellas).biases[0].centre for one in found] == [(1.0, 3.0, 4.0), (2.0,)]
    with pytest.raises(ValidationError, match=r"biases.0.centre has 2 values for 4 walkers"):
        ExplorationSettings.model_validate(given | {"biases": [held | {"centre": [1.0, 2.0]}]})


def two_systems(number_of_pairs: int, number_of_metals: int) -> list[Atoms]:
    """A pool of a molecule and a crystal."""
    found = []
    for number in range(number_of_pairs + number_of_metals):
        frame = molecule("N2") if number < number_of_pairs else bulk("Cu", cubic=True)
        frame.rattle(0.05, seed=number)
        found.append(labelled(frame))
    return found


def of_pool(folder, files, shares, count, test=0):
    """The config of a campaign on a pool of many molecules and three crystals."""
    if not (folder / "pool.extxyz").exists():
        write_structures(folder / "pool.extxyz", two_systems(30, 3))
    return tiny_config(
        folder,
        system={"structures": files, **({"shares": shares} if shares else {})},
        oracle={"kind": "ase", "calculator": "ase.calculators.emt:EMT"},
        initial={"rattle": None, "md": (), "from_pool": count},
        test={"md": (), "from_pool": test},
        exploration={"kind": "pool", "files": str(folder / "pool.extxyz")},
    )


def initial_systems(config, run=None):
    inputs = Inputs(config, run)
    return Counter(frame.info["system"] for frame in inputs.of_pool(inputs.pool_split.initial))


@pytest.mark.parametrize(
    ("shares", "count", "found", "told"),
    [
        (None, 5, {"pair": 3, "metal": 2}, None),
        ({"pair": 1, "metal": 3}, 4, {"pair": 1, "metal": 3}, None),
        ({"pair": 4, "metal": 1}, 10, {"pair": 8, "metal": 2}, None),
        (None, 8, {"pair": 5, "metal": 3}, "the pool has 3 structures of system 'metal', fewer than the 4 of initial"),
        (None, 33, {"pair": 30, "metal": 3}, "fewer than the 16 of initial.from_pool 33 that are its share; others"),
    ],
)
def test_a_random_draw_of_the_pool_keeps_to_shares(tmp_path, files, shares, count, found, told):
    """By the rounding of batches; what a system has too little of, the others give."""
    config, said = of_pool(tmp_path, files, shares, count), list[str]()
    assert initial_systems(config) == found
    check_campaign(config, said.append)
    assert [told in sentence for sentence in said] == ([] if told is None else [True])


def test_a_draw_stays_when_shares_change(tmp_path, files):
    """And that of an earlier version, which took no note of it."""
    few, many = (of_pool(tmp_path, files, {"pair": one, "metal": 1}, 4, test=3) for one in (1, 3))
    before = Inputs(few).pool_split
    assert Inputs(many).pool_split.test == before.test and initial_systems(many) == {"pair": 3, "metal": 1}
    run = RunDirectory(tmp_path / "run")
    run.round(0).create()
    run.initial_pool.parent.mkdir(exist_ok=True, parents=True)
    write_json(run.initial_pool, {"places": list(before.initial)})
    assert Inputs(many, run).pool_split == before
    run.initial_pool.unlink()
    write_structures(run.round(0).dataset, two_systems(1, 0))
    assert Inputs(many, run).pool_split == preparation.split_pool(33, 4, 3, many.seed)


@pytest.mark.slow
def test_walkers_in_several_programs_do_as_in_one(files):
    """The same random numbers, baths, thresholds and numbering, whatever runs beside them."""
    starts = start_geometries(SystemSettings(structures=files))
    starts = [starts[1], starts[0], starts[1]]
    model, species = SharedDensitySettings(size="tiny"), SpeciesTable((7, 29))
    params = jax.jit(build_ensemble(model, EnsembleSettings(size=2), species).init)(jax.random.key(0))
    potential = Potential(model, species, params, {7: 0.0, 29: 0.0}, members=EnsembleSettings(size=2))
    walkers = [{"temperature": 300, "count": 2}, {"temperature": 600}]
    given = {"walkers": walkers, "steps": 20, "chunk": 10, "trajectory_every": 5, "trace_every": 5, "record_every": 5}
    settings = ExplorationSettings.model_validate(given)

    def run(chosen, some, numbers):
        explorer = Explorer(potential.ensemble.predict, species, potential.cutoff, chosen, dtype=np.float64)
        levels = Thresholds(record=np.full(len(some), 1e-9), stop=np.full(len(some), np.inf))
        return explorer.run(potential.params, [starts[n] for n in some], levels, jax.random.key(3), None, None, numbers)

    with jax.enable_x64(True):
        whole = run(settings, [0, 1, 2], None)
        programs = buckets(["metal", "pair", "metal"], starts[:2], [], potential.cutoff)
        parts = [(one.walkers, run(one.of(settings), one.walkers, one.walkers)) for one in programs]
    assert len(parts) == 2
    joined = side_by_side(parts)
    assert joined.status == whole.status and joined.frames_planned == whole.frames_planned
    assert np.allclose(joined.temperature, whole.temperature, rtol=1e-8, equal_nan=True)
    assert np.array_equal(joined.walker_temperature, whole.walker_temperature)
    places = [(frame.info["walker"], frame.info["step"], frame.info["system"]) for frame in joined.recorded]
    assert places == [(frame.info["walker"], frame.info["step"], frame.info["system"]) for frame in whole.recorded]
    for one, other in zip(joined.final, whole.final, strict=True):
        assert np.allclose(one.positions, other.positions, rtol=0, atol=1e-8)


TETRAHEDRON = 0.85 * np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
"""Positions of four copper atoms, Angstrom."""

SECTIONS = {
    "oracle": {"kind": "ase", "calculator": "ase.calculators.emt:EMT"},
    "initial": {"rattle": {"count": 12, "stdev": 0.05}, "md": []},
    "test": {"md": [{"temperature": 300, "steps": 8, "every": 4, "equilibration": 0}]},
    "training": {"max_steps": 200},
    "exploration": {
        "walkers": [
            {"temperature": 300, "count": 2},
            {"temperature": 600, "pressure": 2.0, "systems": ["metal"]},
        ],
        "integrator": {"kind": "npt"},
        "thresholds": {"kind": "relative", "floor": 1e-6, "record_factor": 0.2, "stop_factor": 8.0},
        "rewind": {"to": "starts", "keep": 2, "limit": 1000},
    },
}


class Counting(SilentProgress):
    """Notes how many programs had been compiled when each stage began."""

    def __init__(self, compiled):
        super().__init__()
        self.compiled, self.seen = compiled, []

    def stage(self, name, total=None, *, unit=""):
        self.seen.append((self.forecast.index, name, len(self.compiled)))
        return super().stage(name, total, unit=unit)


@pytest.mark.slow
def test_a_campaign_of_two_systems(tmp_path, count_compilations):
    """Both get their shares and thresholds of their own, and a killed campaign ends as one that was not."""
    write_structures(tmp_path / "cluster.extxyz", [Atoms("Cu4", positions=TETRAHEDRON)])
    write_structures(tmp_path / "metal.extxyz", [bulk("Cu", cubic=True)])
    files = {name: str(tmp_path / f"{name}.extxyz") for name in ("cluster", "metal")}
    sections = {**SECTIONS, "system": {"structures": files, "shares": {"cluster": 1, "metal": 2}}}
    with count_compilations() as compiled:
        progress = Counting(compiled)
        run_or_resume(tmp_path, tmp_path / "run", progress, **sections)
    run = RunDirectory(tmp_path / "run")
    at = {(index, name): count for index, name, count in reversed(progress.seen)}
    assert at[1, "train"] == at[2, "train"], "nothing is compiled in the second round"
    for folder in run.rounds()[:2]:
        assert [frame.info["system"] for frame in read_structures(folder.starts)] == ["metal", "cluster", "metal"]
        again = [(frame.info["walker"], frame.info["turn"]) for frame in read_structures(folder.further_starts)]
        assert again == [(walker, turn) for walker in range(3) for turn in (1, 2)]
        assert Counter(frame.info["system"] for frame in read_structures(folder.batch)) == {"metal": 2, "cluster": 1}
        arrays = read_npz(folder.walkers)
        assert arrays["restarts"].sum() > 0
        assert arrays["walker_temperature"].tolist() == [300, 300, 600]
        volumes = arrays["volume"]  # [T, W]
        assert np.isnan(volumes[:, 1]).all() and np.nanstd(volumes[:, 0]) > 0, "a cluster has no cell, crystals move"
        of_system = dict(zip(arrays["walker_system"].tolist(), arrays["gate_record"].tolist(), strict=True))
        assert of_system["metal"] != of_system["cluster"]
    assert {frame.info["system"] for frame in read_structures(run.rounds()[-1].dataset)} == {"cluster", "metal"}
    row = read_csv(run.metrics)[0]
    assert {"forces_rmse_cluster 300K", "forces_rmse_metal 300K", "selected_cluster", "candidates_metal"} <= set(row)
    systems = campaign_status(run.path)["systems"]
    assert systems["metal"]["calls"] == {"initial": 6, "test": 9, "train": 4}
    assert systems["metal"]["structures"] == 10 and "forces_rmse_metal 300K" in systems["metal"]["errors"]
    assert systems["metal"]["record"] != systems["cluster"]["record"]
    page = run.report.read_text()
    assert 'id="systems"' in page and "metal 300K" in page and "(metal): 300 K" in page
    with pytest.raises(Killed):
        run_or_resume(tmp_path, tmp_path / "killed", KillingProgress(1, "explore", within=True), **sections)
    run_or_resume(tmp_path, tmp_path / "killed", **sections)
    assert result_of(tmp_path / "killed") == result_of(run.path)
    other = {**sections["system"], "shares": {"cluster": 1, "metal": 1}}
    assert run_or_resume(tmp_path, run.path, **{**sections, "system": other}).finished, "shares may change"


@pytest.mark.slow
def test_other_temperatures_and_pressures_of_systems_compile_nothing(files, count_compilations):
    """They are numbers, like those of all walkers."""
    starts = start_geometries(SystemSettings(structures=files))
    model, species = SharedDensitySettings(size="tiny"), SpeciesTable((7, 29))
    params = jax.jit(build_ensemble(model, EnsembleSettings(size=2), species).init)(jax.random.key(0))
    potential = Potential(model, species, params, {7: 0.0, 29: 0.0}, members=EnsembleSettings(size=2))

    def run(temperature, pressure):
        hot = {"temperature": temperature, "pressure": pressure, "count": 2, "systems": ["metal"]}
        given = {**NPT, "walkers": [{"temperature": 300, "count": 2}, hot], "steps": 20, "chunk": 10}
        settings = MdExploration.model_validate({**given, "trace_every": 5, "trajectory_every": 5})
        systems = systems_of_walkers({"pair": 1, "metal": 1}, settings.walkers_to_deal)
        found = []
        for bucket in buckets(systems, starts, [], potential.cutoff):
            explorer = Explorer(potential.ensemble.predict, species, potential.cutoff, bucket.of(settings))
            begun = [starts[0] if systems[walker] == "pair" else starts[1] for walker in bucket.walkers]
            levels = Thresholds(*(np.full(len(begun), np.inf) for _ in range(2)))
            key = jax.random.key(3)
            found.append(explorer.run(potential.params, begun, levels, key, None, None, bucket.walkers))
        return found

    before = run(600, 1.0)
    with count_compilations() as compiled:
        after = run([900, 1200], 30.0)
    assert not compiled and [len(one.status) for one in after] == [1, 3]
    assert np.array_equal(before[0].energy, after[0].energy), "of molecules nothing has changed"
    assert not np.array_equal(before[1].energy, after[1].energy)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "atoms"),
    [
        ([{"kind": "rattled", "count": 12}], [76, 130, 184]),
        (
            [{"kind": "rattled", "count": n, "systems": [name]} for n, name in ((1, "pair"), (12, "metal"))],
            [76, 158, 240],
        ),
    ],
    ids=["half", "nearly all"],
)
def test_shares_of_large_structures_compile_nothing_later(tmp_path, files, count_compilations, made, atoms):
    """A first set of many small structures and one large one, and batches of which half are large.

    Or nearly all, where the small system runs out of candidates.
    """
    large = bulk("Cu", cubic=True) * (2, 2, 1)
    write_structures(tmp_path / "large.extxyz", [large])
    first = two_systems(30, 0)
    first.append(labelled(large.copy()))
    write_structures(tmp_path / "first.extxyz", first)
    sections = {
        "system": {"structures": {"pair": files["pair"], "metal": str(tmp_path / "large.extxyz")}},
        "oracle": {"kind": "ase", "calculator": "ase.calculators.emt:EMT"},
        "initial": {"rattle": None, "md": (), "dataset": str(tmp_path / "first.extxyz")},
        "test": {"md": ()},
        "training": {"max_steps": 20, "validate_every": 10, "validation_fraction": 0.0},  # trainings alone compile
        "exploration": {"kind": "generated", "of": made},
        "selection": {"batch": 6},
    }
    with count_compilations() as compiled:
        progress = Counting(compiled)
        run_or_resume(tmp_path, tmp_path / "run", progress, **sections)
    run = RunDirectory(tmp_path / "run")
    sizes = [sum(map(len, read_structures(folder.dataset))) for folder in run.rounds()]
    assert sizes == atoms
    at = {(index, name): count for index, name, count in reversed(progress.seen)}
    assert at[1, "train"] == at[1, "explore"] and at[2, "train"] == len(compiled)
    assert "capacities of the training grow" not in run.log.read_text()
