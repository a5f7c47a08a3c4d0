"""Errors of what models give besides the energy, in reports and tables of trainings."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from small_training import MODEL, SPECIES, same_bits, settings_of, water

from almlip_jax.ensembles import Ensemble
from almlip_jax.models import build_model
from almlip_jax.training import (
    EnsembleSettings,
    EpochReport,
    Job,
    SideBySideTrainer,
    Trainer,
    TrainingResult,
    plan_capacity,
    reference_energies,
)
from almlip_jax.training.loss import Residuals
from almlip_jax.training.program import root_mean_squares
from almlip_jax.training.trainer import mended_report

DIPOLE = "validation_dipole_rmse"


def test_errors_are_roots_of_means_and_none_where_nothing_is_labelled():
    sums = {"energy": 4.0, "forces": 0.0, "virial": 3.0, "dipole": 18.0}
    counts = {"energy": 4.0, "forces": 0.0, "virial": 1.0, "dipole": 2.0}
    found = root_mean_squares(
        Residuals(*({name: jnp.full(2, one) for name, one in part.items()} for part in (sums, counts)))
    )
    assert list(found) == ["validation_energy_rmse", "validation_forces_rmse", DIPOLE]
    assert [values.tolist()[0] for values in found.values()] == pytest.approx([1.0, np.nan, 3.0], nan_ok=True)


def test_tables_and_models_trained_twice_have_them():
    ones, zeros = np.ones(2), np.zeros(2, bool)
    report = EpochReport(1, 60, 60, ones, ones, ones, 2 * ones, zeros, ~zeros, 1.0, {DIPOLE: np.array([0.5, np.nan])})
    row = TrainingResult(None, (report,)).rows()[0]
    assert list(row)[-4:] == ["validation_forces_rmse_0", "validation_forces_rmse_1", f"{DIPOLE}_0", f"{DIPOLE}_1"]
    assert row[f"{DIPOLE}_0"] == 0.5 and report.errors == {"forces_rmse": 2.0, "dipole_rmse": 0.5}
    second = mended_report(report, replace(report, further={DIPOLE: np.array([9.0, 0.7])}), np.array([False, True]))
    assert second.step == 120 and second.further[DIPOLE].tolist() == [0.5, 0.7]
    assert "dipole_rmse" not in replace(report, further={}).errors


def with_dipole(atoms: Atoms) -> Atoms:
    """That of point charges."""
    atoms.calc.results["dipole"] = np.where(atoms.numbers == 8, -0.8, 0.4) @ atoms.positions
    return atoms


@pytest.mark.slow
def test_dipoles_are_learned_and_an_interrupted_training_tells_the_same_errors(tmp_path):
    dataset = [with_dipole(water(seed)) for seed in range(16)]
    model, settings = MODEL.model_copy(update={"dipole": True}), settings_of(max_steps=120)
    ensemble = Ensemble(build_model(model, SPECIES), 2)
    capacity = plan_capacity(dataset, model.cutoff, settings)
    trainer = Trainer(ensemble, SPECIES, capacity, settings, EnsembleSettings(size=2))
    references = reference_energies(dataset, SPECIES)
    whole = trainer.train(dataset, None, jax.random.key(0), reference_energies=references)
    first, last = (report.further[DIPOLE] for report in (whole.history[0], whole.history[-1]))
    assert np.all(last < 0.5 * first) and np.all(last > 0)

    def interrupt(report: EpochReport) -> None:
        if report.step > 60:
            raise KeyboardInterrupt

    options = {"reference_energies": references, "checkpoint": tmp_path / "state", "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        trainer.train(dataset, None, jax.random.key(0), on_epoch=interrupt, **options)
    resumed = trainer.train(dataset, None, jax.random.key(0), **options)
    assert same_bits(resumed.params, whole.params) and resumed.rows() == whole.rows()
    (beside,) = SideBySideTrainer(trainer).train([Job(dataset, jax.random.key(0), references)])
    np.testing.assert_allclose(beside.history[-1].further[DIPOLE], last, rtol=0.05)
