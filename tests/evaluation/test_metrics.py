"""Error metrics against explicit sums; structures without a label do not count."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from almlip_jax.errors import InputError
from almlip_jax.evaluation import error_metrics


def labelled(symbols: str, group: str, seed: int, **results) -> Atoms:
    atoms = Atoms(symbols, np.random.default_rng(seed).normal(size=(len(Atoms(symbols)), 3)), info={"group": group})
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def test_metrics_are_their_definitions():
    rng = np.random.default_rng(0)
    frames = [
        labelled("OH2", "a", 0, energy=-10.0, forces=rng.normal(size=(3, 3))),
        labelled("OH", "a", 1, energy=-6.0, forces=rng.normal(size=(2, 3))),
        labelled("H2", "b", 2, forces=rng.normal(size=(2, 3))),
    ]
    frames[0].set_cell(np.eye(3) * 4)
    frames[0].pbc = True
    frames[0].calc.results["stress"] = np.arange(6.0)
    errors = [rng.normal(size=(n, 3)) for n in (3, 2, 2)]
    predicted = SimpleNamespace(
        energy=np.array([-9.7, -6.4, 5.0]),
        forces=[f.calc.results["forces"] + e for f, e in zip(frames, errors, strict=True)],
        stress=np.array([np.arange(6.0) + 0.1, np.full(6, np.nan), np.full(6, np.nan)]),
        force_total=[np.ones(n) for n in (3, 2, 2)],
        scores={"energy_total": np.ones(3)},
    )
    found = error_metrics(frames, predicted)
    per_atom = np.array([0.3 / 3, -0.4 / 2])
    assert found["energy_mae"] == pytest.approx(np.abs(per_atom).mean())
    assert found["energy_rmse"] == pytest.approx(np.sqrt(np.mean(per_atom**2)))
    assert found["energy_offset_free_rmse"] == pytest.approx(per_atom.std())
    assert found["energy_mae_structure"] == pytest.approx(0.35)
    everything = np.concatenate(errors)
    assert found["forces_rmse"] == pytest.approx(np.sqrt(np.mean(everything**2)))
    assert found["forces_mae"] == pytest.approx(np.abs(everything).mean())
    assert found["stress_rmse"] == pytest.approx(0.1) and found["num_structures"] == 3
    numbers = np.concatenate([f.numbers for f in frames])
    assert found["by_species"]["H"]["forces_mae"] == pytest.approx(np.abs(everything[numbers == 1]).mean())
    assert set(found["by_group"]) == {"a", "b"}
    assert np.isnan(found["by_group"]["b"]["energy_rmse"])
    assert found["by_group"]["b"]["forces_rmse"] == pytest.approx(np.sqrt(np.mean(errors[2] ** 2)))
    assert found["calibration"]["forces"]["zms"] == pytest.approx(3 * np.mean(everything**2))


def test_nothing_to_compare_with():
    nothing = SimpleNamespace(
        energy=np.zeros(1),
        forces=[np.zeros((1, 3))],
        stress=np.zeros((1, 6)),
        force_total=[np.zeros(1)],
        scores={"energy_total": np.zeros(1)},
    )
    with pytest.raises(InputError, match="no structure has an energy"):
        error_metrics([Atoms("H")], nothing)
    with pytest.raises(InputError, match="no structure to compare"):
        error_metrics([], nothing)
