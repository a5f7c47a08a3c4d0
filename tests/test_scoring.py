"""Scoring pools: running statistics against those of whole arrays, and what an interruption leaves behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ase.io
import jax
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator

from almlip_jax.evaluation import error_metrics
from almlip_jax.evaluation.pairs import label_pairs
from almlip_jax.figures.command import draw_errors
from almlip_jax.potential import Calibration, Potential
from almlip_jax.scores import names, scores
from almlip_jax.scoring import PoolSummary, score_pool
from almlip_jax.structures.io import read_structures, write_structures


@pytest.fixture(scope="module")
def potential(committee) -> Potential:
    return committee


@pytest.fixture
def pool(tmp_path, monkeypatch):
    monkeypatch.setattr("almlip_jax.potential.evaluator._CHUNK_FRAMES", 8)
    frames = [molecule("H2O") for _ in range(30)]
    for n, frame in enumerate(frames):
        frame.rattle(0.1, seed=n)
        frame.info["name"] = f"water {n}"
    write_structures(tmp_path / "pool.extxyz", frames)
    return tmp_path / "pool.extxyz"


@pytest.mark.parametrize("missing", [None, 5, 12])
def test_running_statistics_are_those_of_the_whole(missing):
    known = names(scores(fitted=False))
    values = np.random.default_rng(0).normal(size=(20, len(known))).astype(np.float32)
    if missing is not None:
        values[missing] = np.nan
    summary = PoolSummary()
    for rows in (slice(0, 7), slice(7, 8), slice(8, 20)):
        summary.add({name: values[rows, n] for n, name in enumerate(known)})
    assert summary.number == 20
    assert summary.most_uncertain == np.argmax(values[:, known.index("force_std_max")])
    assert [frame for _, frame in summary.largest.values()] == np.argmax(values, axis=0).tolist()
    np.testing.assert_allclose(list(summary.mean.values()), values.mean(axis=0), rtol=1e-5, atol=1e-6)


def test_a_scored_pool_holds_what_the_potential_says(potential, pool):
    steps = []
    summary = score_pool(potential, pool, pool.with_name("out.extxyz"), steps.append)
    frames = read_structures(pool)
    found = potential.evaluate(frames)
    for n, (frame, scored) in enumerate(zip(frames, read_structures(pool.with_name("out.extxyz")), strict=True)):
        np.testing.assert_array_equal(scored.positions, frame.positions)
        np.testing.assert_array_equal(scored.arrays["force_std"], found.atom_scores["force_std"][n].astype(float))
        assert scored.info["name"] == f"water {n}" and scored.calc is None
        assert scored.info["predicted_energy"] == found.energy[n] and "predicted_stress" not in scored.info
        np.testing.assert_array_equal(scored.arrays["predicted_forces"], found.forces[n])
        assert all(scored.info[name] == float(values[n]) for name, values in found.scores.items())
    assert sum(steps) == summary.number == 30 and len(steps) > 1
    assert summary.most_uncertain == found.scores["force_std_max"].argmax() and summary.left_out == ()
    told = score_pool(potential, pool, pool.with_name("out.cfg"))
    assert told.left_out == ("predicted_forces",)
    again = read_structures(pool.with_name("out.cfg"), type_numbers=[1, 6, 8])
    np.testing.assert_array_equal(again[2].arrays["force_std"], found.atom_scores["force_std"][2].astype(float))
    assert [frame.info["predicted_energy"] for frame in again] == found.energy.tolist()
    assert again[3].info["name"] == "water 3" and str(again[0].symbols) == str(frames[0].symbols)


def odd_frames() -> list[Atoms]:
    """Whatever a file may hold: atoms alone, crystals beside molecules, films, frames with some labels or none."""
    alone, water, cell = Atoms("O", [[0, 0, 0]]), molecule("H2O"), molecule("H2O", vacuum=2.0)
    cell.pbc = True
    film = cell.copy()
    film.pbc = (True, True, False)
    rng = np.random.default_rng(0)
    labels = {"energy": -5.0, "forces": rng.normal(size=(3, 3)), "stress": rng.normal(size=6)}
    atom = {"energy": -1.0, "forces": np.zeros((1, 3))}
    frames = [with_labels(alone, **atom), water, with_labels(water, energy=-4.0)]
    frames += [with_labels(cell, **labels), with_labels(film, **labels), with_labels(cell, stress=labels["stress"])]
    return frames


def with_labels(atoms: Atoms, **labels: Any) -> Atoms:
    frame = atoms.copy()
    frame.calc = SinglePointCalculator(frame, **labels)
    return frame


def test_labels_stay_labels_and_predictions_are_none(potential, tmp_path):
    """Also where a frame was scored before: what an earlier potential said goes."""
    frames = odd_frames()
    frames[0].info.update(predicted_energy=1.0, predicted_stress=np.ones(6))
    frames[0].arrays["force_error"] = np.ones(1)
    write_structures(tmp_path / "pool.extxyz", frames)
    calibrated = potential.with_fitted(calibration=Calibration({"slope": 2.0}))
    for sure in (potential, calibrated):
        score_pool(sure, tmp_path / "pool.extxyz", tmp_path / "out.extxyz")
        written = read_structures(tmp_path / "out.extxyz")
        found = sure.evaluate(frames)
        for n, (frame, scored) in enumerate(zip(frames, written, strict=True)):
            kept, own = ({} if one.calc is None else one.calc.results for one in (scored, frame))
            assert kept.keys() == own.keys()
            assert all(np.array_equal(kept[name], own[name]) for name in own)
            np.testing.assert_array_equal(scored.arrays["predicted_forces"], found.forces[n])
            assert ("predicted_stress" in scored.info) == bool(frame.pbc.all())
            if frame.pbc.all():
                np.testing.assert_array_equal(scored.info["predicted_stress"], found.stress[n])
            assert ("force_error" in scored.arrays) == (sure is calibrated)
        if sure is calibrated:
            np.testing.assert_allclose(
                written[3].arrays["force_error"], 2 * found.atom_scores["force_total"][3], rtol=1e-6
            )
        assert not {"force_total", "force_epistemic"} & written[0].arrays.keys(), "they are force_std here"


@pytest.mark.parametrize("name", ["out.extxyz", "out.cfg", "out.db"])
def test_predictions_may_be_the_labels(potential, tmp_path, name):
    """Of structures with other labels, with labels that failed, and with none; the file tells of no other ones."""
    frames = odd_frames()
    frames[1].info.update(REF_energy=-3.25, label_error="no luck", EFS_by="another")
    frames[1].arrays["REF_forces"] = np.ones((len(frames[1]), 3))
    frames[2].info["virial"] = np.eye(3)
    write_structures(tmp_path / "pool.extxyz", frames)
    score_pool(potential, tmp_path / "pool.extxyz", tmp_path / name, labels="predicted")
    written = read_structures(tmp_path / name, type_numbers=[1, 6, 8], require_labels=True)
    found = potential.evaluate(frames)
    for n, (frame, scored) in enumerate(zip(frames, written, strict=True)):
        assert scored.get_potential_energy() == pytest.approx(found.energy[n], rel=1e-14)
        np.testing.assert_array_equal(scored.get_forces(), found.forces[n])
        assert ("stress" in scored.calc.results) == bool(frame.pbc.all())
        if frame.pbc.all():
            np.testing.assert_allclose(scored.get_stress(), found.stress[n], rtol=1e-12, atol=1e-14)
        assert scored.info["force_std_max"] == pytest.approx(found.scores["force_std_max"][n])
        left = {"REF_energy", "label_error", "EFS_by", "virial", "predicted_energy", "predicted_stress"}
        assert not left & scored.info.keys() and "predicted_forces" not in scored.arrays


def test_labels_under_other_names_are_kept_unseen(potential, tmp_path):
    frame = molecule("H2O")
    frame.info.update(REF_energy=-3.25, DFT_energy="lost", virial=np.eye(3))
    frame.arrays["REF_forces"] = np.ones((3, 3))
    write_structures(tmp_path / "pool.extxyz", [frame])
    score_pool(potential, tmp_path / "pool.extxyz", tmp_path / "out.extxyz")
    scored = ase.io.read(tmp_path / "out.extxyz")
    assert (scored.info["REF_energy"], scored.info["DFT_energy"]) == (-3.25, "lost")
    np.testing.assert_array_equal(scored.info["virial"], np.eye(3))
    np.testing.assert_array_equal(scored.arrays["REF_forces"], np.ones((3, 3)))


def test_frames_that_lack_labels_take_part_in_what_they_have(potential, tmp_path):
    """Against sums over what is said of each frame alone."""
    frames = odd_frames()
    found = potential.evaluate(frames)
    metrics = error_metrics(frames, found)
    energy, forces, stress = [], [], []
    for frame in frames:
        own = {} if frame.calc is None else frame.calc.results
        alone = potential.evaluate([frame], shape=potential.batch_shape(frames))
        if "energy" in own:
            energy.append((alone.energy[0] - own["energy"]) / len(frame))
        if "forces" in own:
            forces.append(alone.forces[0] - own["forces"])
        if "stress" in own and frame.pbc.all():
            stress.append(alone.stress[0] - own["stress"])
    assert (len(energy), len(forces), len(stress)) == (4, 3, 2)
    assert metrics["energy_mae"] == pytest.approx(np.abs(energy).mean(), rel=1e-5)
    assert metrics["forces_rmse"] == pytest.approx(np.sqrt(np.mean(np.concatenate(forces) ** 2)), rel=1e-4)
    assert metrics["stress_rmse"] == pytest.approx(np.sqrt(np.mean(np.square(stress))), rel=1e-4)
    assert metrics["num_structures"] == 6 and metrics["num_atoms"] == 7
    pairs = label_pairs(frames, found)
    shapes = {name: (one.label.shape, one.predicted.shape, one.sigma.shape) for name, one in pairs.items()}
    assert shapes == {
        "energy": ((4, 1), (4, 1), (4,)),
        "forces": ((7, 3), (7, 3), (7,)),
        "stress": ((2, 6), (2, 6), (2,)),
    }
    assert np.sqrt(np.mean((pairs["forces"].predicted - pairs["forces"].label) ** 2)) == metrics["forces_rmse"]
    drawn, notes = draw_errors(frames, found, tmp_path / "figures")
    assert sorted(path.name for path in drawn) == ["calibration.pdf", "calibration.png", "parity.pdf", "parity.png"]
    assert notes == []


def test_a_potential_in_float64_says_the_same_in_more_digits(potential):
    frames = odd_frames()
    single = potential.evaluate(frames)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), potential.params)
        double = replace(potential, params=params).evaluate(frames)
    assert {part.dtype for part in (*double.forces, *double.atom_scores["force_std"], double.stress)} == {
        np.dtype(np.float64)
    }
    for one, other in zip(single.forces, double.forces, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(single.stress, double.stress, rtol=1e-3, atol=1e-5)
    coarse, fine = (error_metrics(frames, found) for found in (single, double))
    for name in ("energy_rmse", "forces_rmse", "stress_rmse"):
        assert coarse[name] == pytest.approx(fine[name], rel=1e-3)


def test_a_potential_that_is_alone_has_no_calibration_to_draw(potential, tmp_path):
    frames = odd_frames()
    found = potential.evaluate(frames)
    nothing = {name: np.zeros(len(frames)) for name in found.scores}
    of_atoms = {"force_total": [np.zeros(len(frame)) for frame in frames]}
    single = replace(found, atom_scores=of_atoms, scores=nothing)
    drawn, notes = draw_errors(frames, single, tmp_path)
    assert {path.stem for path in drawn} == {"parity"}
    assert notes == ["calibration is not drawn: there is no uncertainty larger than 0 to draw."]


def test_an_interruption_leaves_what_was_there(potential, pool):
    out = pool.with_name("out.extxyz")
    out.write_text("of old")

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_pool(potential, pool, out, interrupt)
    assert out.read_text() == "of old"
    assert sorted(file.name for file in pool.parent.iterdir()) == ["out.extxyz", "pool.extxyz"]
