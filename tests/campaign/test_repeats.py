"""A structure with two labels is told, in labelled sets, in files that serve as label source, and in sweeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from tiny_campaign import tiny_config

from almlip_jax.campaign.checks import check_campaign
from almlip_jax.campaign.preparation import Source, held_out_set, initial_set
from almlip_jax.campaign.settings import InitialSettings, SystemSettings
from almlip_jax.campaign.settings import TestSettings as HeldOut
from almlip_jax.errors import LabelError
from almlip_jax.oracles.sources.labelled_file import FileSettings
from almlip_jax.structures.io import write_structures
from almlip_jax.sweep.pools import read_pool
from almlip_jax.sweep.settings import DATA_VARIABLE, SweepConfig


def water(place: float, energy: float = -14.0, force: float = 0.0) -> Atoms:
    """One of a row of structures, whose label does not tell them apart."""
    atoms = molecule("H2O")
    atoms.positions[2, 1] += place
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.full((3, 3), force))
    return atoms


ROW = [water(0.0), water(0.1), water(0.0, -14.03, 0.2), water(0.1), water(0.1, force=5e-5), water(0.0, -13.0)]
"""Structure 0 comes with three labels, structure 1 with one, thrice (once rounded)."""


def source(said: list[str]) -> Source:
    return Source((), SystemSettings(), cast(Any, None), 0, {}, said.append, lambda _: None)


def test_labels_that_differ_are_kept_and_told(tmp_path: Path) -> None:
    write_structures(tmp_path / "row.extxyz", ROW)
    said: list[str] = []
    frames = initial_set(InitialSettings(dataset=tmp_path / "row.extxyz"), source(said), ())
    assert [frame.get_potential_energy() for frame in frames] == [-14.0, -14.0, -14.03, -13.0]
    assert said == [
        "the initial set: the same structure has different labels in frames 0 of dataset and 2 of dataset (energy "
        "10 meV/atom and forces up to 200 meV/Angstrom apart), 0 of dataset and 5 of dataset (energy 333 meV/atom "
        "apart). All of them are kept; remove those that are wrong."
    ]
    said.clear()
    write_structures(tmp_path / "row.extxyz", ROW[:2])
    initial_set(InitialSettings(dataset=tmp_path / "row.extxyz"), source(said), ())
    assert said == []


def test_a_test_set_that_contradicts_the_training_is_told(tmp_path: Path) -> None:
    write_structures(tmp_path / "row.extxyz", [*ROW, water(0.2)])
    said: list[str] = []
    settings = HeldOut.model_validate({"files": [{"path": tmp_path / "row.extxyz"}]})
    frames = held_out_set(settings, source(said), (), [water(0.0, -14.03, 0.2)])
    assert len(frames) == 2
    assert (
        "test group test: 2 structures are trained on with another label, the first of them number 0 (energy" in said[0]
    )
    assert said[1:] == ["5 structures of test group test are trained on or come twice; they were left out."]


def test_a_label_source_does_not_choose_between_labels(tmp_path: Path) -> None:
    path = tmp_path / "row.extxyz"
    write_structures(path, ROW)
    label = FileSettings(path=path).build()
    assert label(water(0.1)).energy == -14.0
    with pytest.raises(
        LabelError, match=r"frames 0 and 2 of .*row.extxyz are the same structure with different labels"
    ):
        label(water(0.0))


def test_sweeps_tell_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    write_structures(tmp_path / "row.extxyz", [*ROW, water(0.2), water(0.3)])
    write_structures(tmp_path / "test.extxyz", [water(0.3, -15.0)])
    system = {"pool": "row.extxyz", "tests": {"test": "test.extxyz"}, "initial": 1}
    content = {
        "systems": {"water": system},
        "selectors": {"random": {"kind": "random"}},
        "rounds": 1,
        "batch_sizes": [1],
    }
    pool = read_pool(SweepConfig.model_validate(content).based(tmp_path), "water")
    assert pool.usable == (0, 1, 6)
    assert pool.notes == (
        "structure 2 of the pool is left out: it came before with another label (energy 10 meV/atom and forces up "
        "to 200 meV/Angstrom apart).",
        "2 further structures are left out for the same reason.",
    )


def test_atoms_in_another_order_are_told(tmp_path: Path) -> None:
    """No walker starts at such a structure; a file from another code is often sorted otherwise."""
    other = water(0.1)[[1, 0, 2]]
    other.calc = SinglePointCalculator(other, energy=-14.0, forces=np.zeros((3, 3)))
    write_structures(tmp_path / "data.extxyz", [water(0.0), other])
    said: list[str] = []
    check_campaign(tiny_config(tmp_path, initial={"dataset": str(tmp_path / "data.extxyz")}), said.append)
    assert any(
        "1 of 2 structures of initial.dataset with the composition of start geometry 0 have their atoms" in one
        for one in said
    )


def test_a_contradiction_is_told_once() -> None:
    """Structures of a test group that are trained on are left out, whatever labels they have among themselves."""
    said: list[str] = []
    row = [water(0.0), water(0.0, -14.5), water(0.3), water(0.3, -15.0)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("almlip_jax.campaign.preparation.test_file", lambda *_: row)
        settings = HeldOut.model_validate({"files": [{"path": "row.extxyz"}]})
        frames = held_out_set(settings, source(said), (), [water(0.0, -13.0)])
    assert [frame.get_potential_energy() for frame in frames] == [-14.0, -15.0]
    assert [sentence.count("another label") for sentence in said] == [1, 0, 0]
    assert [sentence.count("different labels in frames") for sentence in said] == [0, 1, 0], said
    assert "2 of file and 3 of file (energy 333" in said[1], "of those that stay, by their places in the file"
