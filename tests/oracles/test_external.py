"""Labels made elsewhere: structures go out, the run stops with instructions, results come in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ase.io
import pytest
from ase import Atoms

from almlip_jax.errors import InputError
from almlip_jax.oracles import Label, Labeller, LabelStore, PendingLabels, TBLiteSettings
from almlip_jax.oracles.sources.external import ExternalSettings
from almlip_jax.structures.io import read_structures, write_structures

Waters = Callable[..., list[Atoms]]
TRAIN = {"purpose": "train"}


def _labelled_elsewhere(frames: list[Atoms]) -> list[Atoms]:
    label = TBLiteSettings().build()
    return [Label("", *label(frame)).attach(frame) for frame in frames]


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
