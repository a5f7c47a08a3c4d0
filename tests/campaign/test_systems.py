"""Several systems in one campaign: names, groups of the test set, labels, shares."""

from __future__ import annotations

from pathlib import Path

import pytest
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from tiny_campaign import tiny_config

from almlip_jax.campaign.preparation import Source, held_out_set, start_geometries
from almlip_jax.campaign.settings import SystemSettings, TestFileSettings, TestSettings
from almlip_jax.campaign.systems import name_systems
from almlip_jax.errors import InputError
from almlip_jax.oracles import CalculatorSettings, Labeller, LabelStore
from almlip_jax.settings import from_here
from almlip_jax.structures.io import read_structures, write_structures


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


def test_groups_of_the_test_set_and_labels_are_told_of_each_system(files, tmp_path):
    system = SystemSettings(structures=files)
    further = tmp_path / "test.extxyz"
    write_structures(further, [labelled(bulk("Cu", a=3.7, cubic=True)), labelled(molecule("O2"))])
    settings = TestSettings(
        md=[{"temperature": 300, "steps": 2, "every": 1, "equilibration": 0}],
        files=[TestFileSettings(path=further, group="far")],
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


def test_a_target_names_a_group_of_one_system(tmp_path, files):
    system = {"structures": files}
    for group in ("pair 300K", None):
        tiny_config(tmp_path, system=system, stopping={"target_error": {"value": 0.1, "group": group}})
    with pytest.raises(ValueError, match="'300K' is not a group of the test set, which has: pair 300K, metal 300K"):
        tiny_config(tmp_path, system=system, stopping={"target_error": {"value": 0.1, "group": "300K"}})
