"""Labels made elsewhere: structures go out, the run stops with instructions, results come in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms

from almlip_jax.errors import InputError
from almlip_jax.oracles import Label, Labeller, LabelStore, PendingLabels, TBLiteSettings
from almlip_jax.oracles.base import IDENTITY_KEY
from almlip_jax.oracles.sources.external import ExternalSettings
from almlip_jax.structures.io import read_structures, write_structures

Waters = Callable[..., list[Atoms]]
TRAIN = {"purpose": "train"}


def _labelled_elsewhere(frames: list[Atoms]) -> list[Atoms]:
    label = TBLiteSettings().build()
    return [Label("", *label(frame)[:3]).attach(frame) for frame in frames]


def test_structures_go_out_and_labels_come_back(waters: Waters, tmp_path: Path) -> None:
    oracle = ExternalSettings(method="xtb by hand", folder=tmp_path / "elsewhere")
    frames = waters(3)
    with LabelStore(tmp_path / "labels.db") as store, Labeller(oracle, store) as labeller:
        with pytest.raises(PendingLabels, match="3 structure") as signal:
            labeller.label(frames, TRAIN)
        assert signal.value.count == 3 and store.count_calls() == 0
        with pytest.raises(PendingLabels) as again:
            labeller.label(frames, TRAIN)
        assert again.value.requested == signal.value.requested
    requested = read_structures(signal.value.requested)
    assert [frame.info["charge"] for frame in requested] == [0, 0, 0]
    # Labelled by some script that keeps info; in another order, and only two of them yet.
    write_structures(signal.value.results / "part.extxyz", _labelled_elsewhere([requested[2], requested[0]]))
    with LabelStore(tmp_path / "labels.db") as store, Labeller(oracle, store) as labeller:
        with pytest.raises(PendingLabels, match="1 structure") as rest:
            labeller.label(frames, TRAIN)
        assert store.count_calls() == 2
        # The last comes back without its identity, and with the rounded positions of a plain extxyz.
        (last,) = _labelled_elsewhere(read_structures(rest.value.requested))
        last.info = {}
        ase.io.write(rest.value.results / "rest.xyz", last, format="extxyz")
        results = labeller.label(frames, TRAIN)
        assert store.count_calls() == 3
    for result, expected in zip(results, _labelled_elsewhere(frames), strict=True):
        assert result.atoms is not None
        assert result.atoms.get_potential_energy() == pytest.approx(expected.get_potential_energy(), abs=1e-7)
    assert list(tmp_path.glob("elsewhere/requested/*.tmp")) == []


def test_failures_elsewhere_are_failed_labels(waters: Waters, tmp_path: Path) -> None:
    oracle = ExternalSettings(method="by hand", folder=tmp_path)
    frames = waters(2)
    with LabelStore(tmp_path / "labels.db") as store, Labeller(oracle, store) as labeller:
        with pytest.raises(PendingLabels) as signal:
            labeller.label(frames, TRAIN)
        requested = read_structures(signal.value.requested)
        requested[0].info["error"] = "no convergence"
        write_structures(signal.value.results / "all.extxyz", requested)
        results = labeller.label(frames, TRAIN)
        assert [result.error for result in results] == ["no convergence", "the frame has no energy or no forces"]


@pytest.mark.parametrize("named", [True, False])
def test_a_file_of_failures_alone_needs_no_keys_and_a_second_try_replaces_them(
    named: bool, waters: Waters, tmp_path: Path
) -> None:
    told = {IDENTITY_KEY: "a"} if named else {}
    oracle = ExternalSettings(method="by hand", folder=tmp_path, energy_key="dft_energy", forces_key="dft_forces")
    (frame,), results = waters(1), tmp_path / "results"
    results.mkdir()
    frame.info |= {**told, "label_error": "no convergence"}
    write_structures(results / "b.extxyz", [frame])
    failed = oracle.delivery().label("a", frame)
    assert failed is not None and failed.error == "no convergence"
    for name, energy in (("a", -1.0), ("c", -1.0)):
        tried = waters(1)[0]
        tried.info |= {**told, "dft_energy": energy}
        tried.arrays["dft_forces"] = np.zeros((3, 3))
        write_structures(results / f"{name}.extxyz", [tried])
    label = oracle.delivery().label("a", frame)
    assert label is not None and label.energy == -1.0
    tried.info["dft_energy"] = -2.0
    write_structures(results / "c.extxyz", [tried])
    with pytest.raises(InputError, match=r"frame 0 of .*a.extxyz and frame 0 of .*c.extxyz are labels of one str"):
        oracle.delivery()


def test_labels_of_other_geometries_are_refused(waters: Waters, tmp_path: Path) -> None:
    oracle = ExternalSettings(method="by hand", folder=tmp_path)
    with LabelStore(tmp_path / "labels.db") as store, Labeller(oracle, store) as labeller:
        with pytest.raises(PendingLabels) as signal:
            labeller.label(waters(1), TRAIN)
        (relaxed,) = read_structures(signal.value.requested)
        relaxed.positions[1, 1] += 0.1
        write_structures(signal.value.results / "relaxed.extxyz", _labelled_elsewhere([relaxed]))
        with pytest.raises(InputError, match=r"not within 0\.0001 Angstrom"):
            labeller.label(waters(1), TRAIN)


def _cells() -> list[Atoms]:
    """A crystal of three elements and one that differs, all atoms within the cell."""
    cell = [[5, 0, 0], [0.5, 5, 0], [0, 0.3, 5]]
    positions = np.array([[0.1, 0.2, 0.1], [0.1, 0.96, 4.6], [0.1, 4.3, 4.6], [2.5, 2.5, 2.5]])
    frames = [
        Atoms("OHHNe", positions + shift, cell=cell, pbc=True) for shift in (0.0, [[0.02, 0, 0], *[[0, 0, 0]] * 3])
    ]
    for frame in frames:
        frame.info = {"charge": 0, "spin": 1}
    return frames


def _forces(atoms: Atoms) -> np.ndarray:
    """Forces that tell the atoms of `_cells` apart wherever they lie."""
    turns = atoms.positions @ np.linalg.inv(atoms.cell.array)
    return np.asarray(np.sin(2 * np.pi * turns) * atoms.numbers[:, None])


def test_other_images_and_orders_are_the_same_structure(tmp_path: Path) -> None:
    oracle = ExternalSettings(method="by hand", folder=tmp_path)
    asked = _cells()
    with LabelStore(tmp_path / "labels.db") as store, Labeller(oracle, store) as labeller:
        with pytest.raises(PendingLabels):
            labeller.label(asked, TRAIN)
        delivered = []
        for n, frame in enumerate(asked):
            moved = frame[[3, 2, 0, 1]]
            moved.positions += np.array([[1, 0, 0], [0, -2, 0], [0, 0, 1], [1, 1, 1]]) @ frame.cell.array
            moved.info = {}
            delivered.append(Label("", float(n), _forces(moved), np.arange(6.0)).attach(moved))
        write_structures(tmp_path / "results" / "moved.extxyz", delivered)
        results = labeller.label(asked, TRAIN)
    for n, (result, frame) in enumerate(zip(results, asked, strict=True)):
        assert result.atoms is not None and result.atoms.get_potential_energy() == n
        np.testing.assert_allclose(result.atoms.get_forces(), _forces(frame), atol=1e-9)


def test_molecules_may_come_back_in_another_order_but_not_elsewhere(waters: Waters, tmp_path: Path) -> None:
    oracle = ExternalSettings(method="by hand", folder=tmp_path)
    with LabelStore(tmp_path / "labels.db") as store, Labeller(oracle, store) as labeller:
        with pytest.raises(PendingLabels) as signal:
            labeller.label(waters(3), TRAIN)
        requested = read_structures(signal.value.requested)
        labelled = _labelled_elsewhere(requested)
        swapped = Label("", -1.0, labelled[0].get_forces()[[2, 0, 1]]).attach(requested[0][[2, 0, 1]])
        shifted = labelled[1]
        shifted.positions += 0.5
        swapped.info, shifted.info = {}, {}
        write_structures(
            signal.value.results / "some.extxyz", [swapped, shifted, Label("", 0, [[0, 0, 0]]).attach(Atoms("He"))]
        )
        with pytest.raises(
            PendingLabels, match=r"2 structure.* 2 frame.*match no structure.*frame 1 \(0\.5 Angstrom from"
        ):
            labeller.label(waters(3), TRAIN)
        first = store.get(labeller.identity(waters(1)[0]))
        assert first is not None and first.energy == -1
        np.testing.assert_array_equal(first.forces, labelled[0].get_forces())
        # what has its label already is not strange
        (tmp_path / "results" / "some.extxyz").unlink()
        write_structures(signal.value.results / "first.extxyz", [swapped])
        with pytest.raises(PendingLabels) as rest:
            labeller.label(waters(3), TRAIN)
        assert "were read" not in str(rest.value)
