"""Error metrics against explicit sums; structures without a label do not count."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from almlip_jax.errors import InputError
from almlip_jax.evaluation import error_metrics
from almlip_jax.evaluation.metrics import Labels, plain_errors
from almlip_jax.evaluation.pairs import label_pairs
from almlip_jax.evaluation.tables import partly_labelled


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
        further={},
        atom_scores={"force_total": [np.ones(n) for n in (3, 2, 2)]},
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
    assert found["num_labelled"] == {"energy": 2, "forces": 3, "stress": 1}
    assert found["by_group"]["b"]["num_labelled"] == {"energy": 0, "forces": 1, "stress": 0}
    assert partly_labelled(found) == [
        "2 of 3 structures have the label energy; its errors are of these alone.",
        "1 of 3 structures have the label stress; its errors are of these alone.",
    ]
    assert partly_labelled(found["by_group"]["b"]) == ["no structure has the label energy to compare with."]
    numbers = np.concatenate([f.numbers for f in frames])
    assert found["by_species"]["H"]["forces_mae"] == pytest.approx(np.abs(everything[numbers == 1]).mean())
    assert set(found["by_group"]) == {"a", "b"}
    assert np.isnan(found["by_group"]["b"]["energy_rmse"])
    assert found["by_group"]["b"]["forces_rmse"] == pytest.approx(np.sqrt(np.mean(errors[2] ** 2)))
    assert found["calibration"]["forces"]["zms"] == pytest.approx(3 * np.mean(everything**2))
    assert found["stress_mae"] == pytest.approx(0.1) and found["by_group"]["a"]["stress_mae"] == pytest.approx(0.1)
    assert np.isnan(found["by_group"]["b"]["stress_rmse"]), "a molecule has no stress"


def predictions_of(frames: list[Atoms], errors: list[np.ndarray], spread: list[np.ndarray]) -> SimpleNamespace:
    """Predictions that are off by given errors of the forces, and by nothing else."""
    return SimpleNamespace(
        energy=np.array([f.calc.results.get("energy", 0.0) for f in frames]),
        forces=[f.calc.results["forces"] + e for f, e in zip(frames, errors, strict=True)],
        stress=np.full((len(frames), 6), np.nan),
        further={},
        atom_scores={"force_total": spread},
        scores={"energy_total": np.ones(len(frames))},
    )


def test_elements_have_their_own_errors_spreads_and_calibration():
    """Errors of oxygen are told right, those of hydrogen are twice as large as told."""
    rng = np.random.default_rng(1)
    frames = [labelled("OH2", "a", n, energy=0.0, forces=np.zeros((3, 3))) for n in range(400)]
    spread = [rng.uniform(0.1, 0.5, size=3) for _ in frames]
    factor = np.array([1.0, 2.0, 2.0])
    errors = [rng.normal(size=(3, 3)) * (factor * s / np.sqrt(3))[:, None] for s in spread]
    found = error_metrics(frames, predictions_of(frames, errors, spread))["by_species"]
    assert {symbol: one["num_atoms"] for symbol, one in found.items()} == {"H": 800, "O": 400}
    assert found["O"]["calibration"]["scale"] == pytest.approx(1, abs=0.05)
    assert found["H"]["calibration"]["scale"] == pytest.approx(2, abs=0.1)
    of_hydrogen = np.concatenate([s[1:] for s in spread])
    assert found["H"]["force_total_mean"] == pytest.approx(of_hydrogen.mean())


def test_atoms_alone_in_open_space_tell_nothing_of_calibration():
    """Their forces are 0 to every member: a spread of 0, next to which the rounding of a label is infinite."""
    rng = np.random.default_rng(2)
    frames = [labelled("OH2", "a", n, energy=0.0, forces=np.zeros((3, 3))) for n in range(4)]
    errors, spread = [rng.normal(size=(3, 3)) for _ in frames], [rng.uniform(0.5, 2, size=3) for _ in frames]
    alone = [labelled(symbol, "a", 0, energy=0.0, forces=np.zeros((1, 3))) for symbol in ("O", "H")]
    without = error_metrics(frames, predictions_of(frames, errors, spread))
    more = predictions_of([*frames, *alone], [*errors, *2 * [np.full((1, 3), 1e-7)]], [*spread, *2 * [np.zeros(1)]])
    more.scores["energy_total"][4:] = 0
    found = error_metrics([*frames, *alone], more)
    for kind in ("forces", "energy"):
        assert found["calibration"][kind] == pytest.approx(without["calibration"][kind], nan_ok=True)
    of_oxygen = [one["by_species"]["O"]["calibration"] for one in (found, without)]
    assert of_oxygen[0] == pytest.approx(of_oxygen[1], nan_ok=True)
    assert found["num_atoms"] == 14 and found["forces_mae"] < without["forces_mae"]


def test_what_one_structure_cannot_tell_is_no_number():
    frames = [labelled("H", name, 0, energy=1.0, forces=np.zeros((1, 3))) for name in ("one", "two")]
    errors, spread = [np.ones((1, 3)), np.zeros((1, 3))], [np.ones(1), np.full(1, np.inf)]
    found = error_metrics(frames, predictions_of(frames, errors, spread))
    one, two = found["by_group"]["one"], found["by_group"]["two"]
    assert one["forces_rmse"] == pytest.approx(1) and one["energy_rmse"] == 0
    assert np.isnan(one["energy_offset_free_rmse"]), "nothing is left of one error without its mean"
    for group in (two, found):  # a spread that is not finite is no estimate, and no traceback
        assert np.isnan(list(group["calibration"]["forces"].values())).all()
        assert np.isnan(list(group["by_species"]["H"]["calibration"].values())).all()


def test_a_stress_alone_can_be_compared_also_as_a_matrix():
    crystal = labelled("Cu", "a", 0, stress=np.diag([1.0, 2.0, 3.0]))
    crystal.set_cell(3 * np.eye(3))
    crystal.pbc = True
    film = crystal.copy()
    film.pbc = (True, True, False)
    film.calc = crystal.calc
    predicted = SimpleNamespace(
        energy=np.zeros(2),
        forces=[np.zeros((1, 3))] * 2,
        stress=np.array([[1.0, 2.0, 3.0, 0.0, 0.0, 0.6], np.full(6, np.nan)]),
        further={},
        atom_scores={"force_total": [np.ones(1)] * 2},
        scores={"energy_total": np.ones(2)},
    )
    found = error_metrics([crystal, film], predicted)
    assert found["stress_mae"] == pytest.approx(0.1) and np.isnan(found["forces_rmse"])
    with pytest.raises(InputError, match="periodic in three directions"):
        error_metrics([film, film], predicted)


def test_predictions_for_others_are_refused():
    """Position tells which prediction belongs to which structure, so that numbers have to agree at least."""
    frames = [labelled("OH", "a", 1, **zeros(2)), labelled("HHO", "a", 2, **zeros(3))]
    predicted = Labels(frames)
    for reference, refusal in (
        (frames[:1], "there are 1 structures, but predictions for 2"),
        ([*frames, frames[0]], "there are 3 structures, but predictions for 2"),
        (frames[::-1], "structure 0 has 3 atoms, but the forces predicted for it are of 2"),
    ):
        for compare in (error_metrics, plain_errors, label_pairs):
            with pytest.raises(InputError, match=refusal):
                compare(reference, predicted)


def zeros(atoms: int) -> dict[str, Any]:
    return {"energy": 0.0, "forces": np.zeros((atoms, 3))}


def test_nothing_to_compare_with():
    nothing = SimpleNamespace(
        energy=np.zeros(1),
        forces=[np.zeros((1, 3))],
        stress=np.zeros((1, 6)),
        further={},
        atom_scores={"force_total": [np.zeros(1)]},
        scores={"energy_total": np.zeros(1)},
    )
    with pytest.raises(InputError, match="no structure has an energy"):
        error_metrics([Atoms("H")], nothing)
    with pytest.raises(InputError, match="no structure to compare"):
        error_metrics([], nothing)


def test_labels_of_one_method_are_held_against_those_of_another():
    rng = np.random.default_rng(3)

    def labelled(stress):
        frames = [Atoms("Si2", rng.normal(size=(2, 3)), cell=[4, 4, 4], pbc=True) for _ in range(3)]
        for frame in frames:
            results = {"energy": rng.normal(), "forces": rng.normal(size=(2, 3))}
            frame.calc = SinglePointCalculator(frame, **results, **({"stress": rng.normal(size=6)} if stress else {}))
        return frames

    target, teacher, bare = labelled(True), labelled(True), labelled(False)
    errors = plain_errors(target, Labels(teacher))
    difference = [b.get_forces() - a.get_forces() for a, b in zip(target, teacher, strict=True)]
    assert errors["forces_mae"] == pytest.approx(np.mean(np.abs(difference)))
    energies = np.array(
        [b.get_potential_energy() - a.get_potential_energy() for a, b in zip(target, teacher, strict=True)]
    )
    assert errors["energy_rmse"] == pytest.approx(np.sqrt(np.mean(energies**2)) / 2)
    assert errors["energy_offset_free_rmse"] == pytest.approx(np.std(energies) / 2)
    stresses = [b.get_stress() - a.get_stress() for a, b in zip(target, teacher, strict=True)]
    assert errors["stress_rmse"] == pytest.approx(np.sqrt(np.mean(np.square(stresses))))
    assert np.isnan(plain_errors(target, Labels(bare))["stress_rmse"])
    assert plain_errors(target, Labels(target))["forces_rmse"] == 0
