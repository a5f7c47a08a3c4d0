"""The mean of label sources: what it is, what its labels belong to, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule

from almlip_jax.errors import LabelError
from almlip_jax.oracles import (
    Labeller,
    LabelStore,
    LocalSettings,
    MeanSettings,
    SourceSettings,
    TBLiteSettings,
    structure_identity,
)
from almlip_jax.oracles.finite_differences import check_derivatives
from almlip_jax.oracles.sources.calculator import CalculatorSettings

GFN1, GFN2 = {"kind": "tblite", "method": "GFN1-xTB"}, {"kind": "tblite", "dipole": True}
EMT = {"kind": "ase", "calculator": "ase.calculators.emt:EMT"}


def mean(*of: dict[str, Any], **more: Any) -> MeanSettings:
    settings = SourceSettings.parse({"kind": "mean", "of": of, **more})
    assert isinstance(settings, MeanSettings)
    return settings


@pytest.fixture
def rattled_copper() -> Atoms:
    crystal = bulk("Cu", cubic=True)
    crystal.rattle(0.1, seed=0)
    return crystal


@pytest.mark.parametrize(("weights", "first"), [(None, 0.5), ((1, 3), 0.25)])
def test_every_quantity_is_the_weighted_mean(weights: Any, first: float, rattled_copper: Atoms) -> None:
    found = mean(GFN1, EMT, weights=weights).build()(rattled_copper)
    one, other = (SourceSettings.parse(part).build()(rattled_copper) for part in (GFN1, EMT))
    assert found.energy == pytest.approx(first * one.energy + (1 - first) * other.energy, abs=1e-10)
    np.testing.assert_allclose(found.forces, first * one.forces + (1 - first) * other.forces, atol=1e-10)
    assert found.stress is not None and one.stress is not None and other.stress is not None
    np.testing.assert_allclose(found.stress, first * one.stress + (1 - first) * other.stress, atol=1e-12)


def test_forces_belong_to_the_energy_in_worker_processes(zundel: Atoms) -> None:
    oracle = mean(GFN1, GFN2 | {"dipole": False})
    compared = check_derivatives(zundel, oracle, LocalSettings(workers=1), components=2)
    assert max(abs(one.force - one.difference) for one in compared.compared) < 1e-3


def test_what_not_all_give_is_not_there(rattled_copper: Atoms, tmp_path: Path) -> None:
    water = molecule("H2O")
    both, one = mean(GFN2, {**GFN2, "accuracy": 0.1}), mean(GFN1, GFN2)
    assert both.gives("dipole") and not one.gives("dipole")
    alone = TBLiteSettings(dipole=True).build()(water).further["dipole"]
    np.testing.assert_allclose(both.build()(water).further["dipole"], alone, atol=1e-4)
    assert not one.build()(water).further


def test_labels_belong_to_all_parts_and_their_shares(zundel: Atoms) -> None:
    parts = mean(GFN1, GFN2)
    others = [
        mean(GFN2, GFN1, weights=(1, 2)),
        mean(GFN1, GFN2, weights=(1, 2)),
        mean(GFN1, GFN2 | {"accuracy": 0.1}),
        mean(GFN1, GFN1),
        TBLiteSettings(),
    ]
    identities = [structure_identity(zundel, one) for one in (parts, *others)]
    assert len(set(identities)) == len(identities)
    same = mean(GFN1 | {"max_force": 30}, GFN2, weights=(2, 2), timeout=5)
    assert structure_identity(zundel, same) == identities[0]
    assert mean(GFN1, GFN2).bound_to() is None  # as of either alone


def test_labels_are_bound_to_what_parts_are_bound_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_method.py").write_text("def make():\n    return lambda atoms: (0.0, 0 * atoms.positions)\n")
    monkeypatch.syspath_prepend(tmp_path)
    own = mean(GFN1, {"kind": "user", "function": "own_method:make"})
    alone = own.of[1].bound_to()
    assert alone and alone in str(own.bound_to()) and alone in own.version()


def test_a_part_that_fails_is_named(zundel: Atoms, tmp_path: Path) -> None:
    with pytest.raises(LabelError, match=r"^ase: .*charge"):
        mean(GFN1, EMT).check(zundel)
    failing = mean(GFN2, GFN1 | {"max_iterations": 1})
    with LabelStore(tmp_path / "labels.db") as store, Labeller(failing, store, LocalSettings(workers=1)) as labeller:
        (result,) = labeller.label([zundel], {"purpose": "test"})
    assert result.error is not None and result.error.startswith("tblite: TBLiteRuntimeError: SCF not")
    small = mean(GFN1 | {"max_force": 1e-3}, GFN2)
    with pytest.raises(LabelError, match=r"tblite: a force component of .* exceeds max_force = 0.001"):
        small.build()(zundel)


@pytest.mark.parametrize(
    ("of", "more", "reason"),
    [
        ([GFN1], {}, "at least 2"),
        ([GFN1, GFN2], {"weights": [1, 1, 1]}, "3 weights of 2 label sources"),
        ([GFN1, GFN2], {"weights": [1, 0]}, "greater than 0"),
        ([GFN1, GFN2 | {"timeout": 5}], {}, "timeout is a key of the mean"),
        ([GFN1, GFN2 | {"attempts": 2}], {}, "attempts is a key of the mean"),
        ([GFN1, {"kind": "file", "path": "labelled.extxyz"}], {}, "'file' calculates no labels here"),
        ([GFN1, {"kind": "external", "method": "pbe", "folder": "x"}], {}, "'external' calculates no labels here"),
        ([EMT | {"scratch": "a"}, EMT | {"scratch": "b"}], {}, "scratch is a and b"),
    ],
)
def test_what_would_not_be_looked_at_is_refused(of: list[Any], more: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        mean(*of, **more)


def test_a_dry_run_shows_every_part(zundel: Atoms) -> None:
    told = mean(GFN1, GFN2, weights=(3, 1)).preview(zundel)
    assert told.index("0.75 of the mean: H5O2, charge 1") < told.index("GFN1-xTB") < told.index("0.25 of the mean")


def test_files_of_parts_are_in_their_folder(tmp_path: Path) -> None:
    assert mean(GFN1, EMT | {"scratch": str(tmp_path)}).files_below() == tmp_path
    assert mean(GFN1, GFN2).files_below() is None
    assert isinstance(mean(GFN1, EMT).of[1], CalculatorSettings)
