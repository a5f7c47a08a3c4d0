"""Thresholds from true errors against closed forms, and against the coverage that they promise."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import dimer, explorer
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from almlip_jax.dynamics import Knowledge
from almlip_jax.dynamics.gates import AbsoluteGate
from almlip_jax.dynamics.knowledge import errors_and_scores, structure_scores
from almlip_jax.dynamics.thresholds import (
    AtomErrors,
    CalibratedThresholds,
    ConformalThresholds,
    FixedThresholds,
    RelativeThresholds,
    calibrated_record,
    conformal_factor,
)
from almlip_jax.errors import InputError
from almlip_jax.potential.novelty import fit_latent_distance


def not_asked() -> None:
    pytest.fail("not needed")


def of_hydrogen(errors: np.ndarray, scores: np.ndarray) -> AtomErrors:
    return AtomErrors(errors, scores, np.ones(len(errors), int))


def test_relative_thresholds_are_a_quantile_above_a_floor():
    scores = np.linspace(0, 1, 101)
    rule = RelativeThresholds(quantile=0.8, record_factor=2.0, floor=0.1)
    assert rule.resolve(lambda: scores, not_asked).record == pytest.approx(1.6)
    assert rule.resolve(lambda: 0.01 * scores, not_asked).record == 0.1
    assert rule.resolve(lambda: scores, not_asked).levels == pytest.approx((1.6, 6.4))


def test_calibrated_thresholds_follow_the_least_squares_slope():
    rng = np.random.default_rng(0)
    sigma, errors = rng.uniform(0.1, 1, 500), rng.uniform(0, 2, 500)
    slope = np.linalg.lstsq(sigma[:, None], errors, rcond=None)[0][0]
    assert calibrated_record(errors, sigma, 0.3) == pytest.approx(0.3 / slope)
    assert calibrated_record(2.5 * sigma, sigma, 0.3) == pytest.approx(0.12)
    assert calibrated_record(0 * sigma, sigma, 0.3) == math.inf
    rule = CalibratedThresholds(tolerance=0.3, stop_factor=3.0)
    assert rule.resolve(not_asked, lambda _: of_hydrogen(2.5 * sigma, sigma)).levels == pytest.approx((0.12, 0.36))


def test_the_conformal_factor_is_the_promised_order_statistic():
    sigma = np.full(19, 0.5)
    errors = 0.5 * np.random.default_rng(1).permutation(np.arange(1.0, 20.0))
    assert conformal_factor(errors, sigma, 0.05) == 19  # ceil(20 * 0.95) = 19, of 19
    assert conformal_factor(errors, sigma, 0.1) == 18
    assert conformal_factor(errors, sigma, 0.5) == 10
    rule = ConformalThresholds(tolerance=0.9, alpha=0.1, stop_factor=2.0)
    assert rule.resolve(not_asked, lambda _: of_hydrogen(errors, sigma)).levels == pytest.approx((0.05, 0.1))
    with pytest.raises(InputError, match=r"alpha 0\.05 need at least 19 labelled atoms, not 18\.$"):
        conformal_factor(errors[1:], sigma[1:], 0.05)
    for n in range(2, 200):  # n = 1 / alpha - 1 is enough, whatever the rounding
        assert conformal_factor(np.ones(n), np.ones(n), 1 / (n + 1)) == 1


def test_conformal_coverage_is_at_least_what_was_asked_for():
    """Over many calibration sets, a further pair is covered with probability ceil((n + 1)(1 - alpha)) / (n + 1)."""
    rng, alpha, n, trials = np.random.default_rng(2), 0.1, 25, 20_000
    sigma = rng.uniform(0.1, 2, (trials, n + 1))
    errors = np.abs(rng.standard_t(3, (trials, n + 1))) * sigma
    covered = [
        error[-1] <= conformal_factor(error[:-1], one[:-1], alpha) * one[-1]
        for error, one in zip(errors, sigma, strict=True)
    ]
    expected = math.ceil((n + 1) * (1 - alpha)) / (n + 1)
    assert abs(np.mean(covered) - expected) < 4 * math.sqrt(expected * (1 - expected) / trials)


@pytest.mark.parametrize("kind", [CalibratedThresholds, ConformalThresholds])
def test_each_species_has_the_threshold_of_its_own_errors(kind):
    """Hydrogen is wrong by twice its score, oxygen by five times; of carbon there are too few atoms to say."""
    numbers = np.repeat([1, 8, 6], [40, 20, 1])
    scores = np.random.default_rng(4).uniform(0.1, 1, len(numbers))
    errors = scores * np.repeat([2.0, 5.0, 3.0], [40, 20, 1])
    found = kind(tolerance=0.3, stop_factor=2.0).resolve(not_asked, lambda _: AtomErrors(errors, scores, numbers))
    assert found.stop == 2 * found.record and set(found.relative) == {"H", "O"}
    assert found.record * found.relative["H"] == pytest.approx(0.15)
    assert found.record * found.relative["O"] == pytest.approx(0.06)


def test_coverage_holds_for_each_species():
    """Atoms of a further exploration with a score below the threshold of their species are right to the tolerance."""
    rng, rule = np.random.default_rng(5), ConformalThresholds(tolerance=1.0, alpha=0.1)

    def explored(atoms: int) -> AtomErrors:
        numbers = rng.choice([1, 8], atoms, p=[0.7, 0.3])
        scores = rng.uniform(0.1, 2, atoms)
        return AtomErrors(np.abs(rng.standard_t(3, atoms)) * scores * np.where(numbers == 8, 4, 1), scores, numbers)

    missed, seen = {1: 0, 8: 0}, {1: 0, 8: 0}
    for _ in range(300):
        found, new = rule.resolve(not_asked, lambda _: explored(200)), explored(200)
        for number, symbol in ((1, "H"), (8, "O")):
            mine = new.numbers == number
            factor = rule.tolerance / (found.record * found.relative[symbol])
            seen[number] += np.sum(mine)
            missed[number] += np.sum(new.errors[mine] > factor * new.scores[mine])
    assert all(0.07 < missed[number] / seen[number] < 0.105 for number in seen)


def test_novelty_has_scores_of_structures_and_of_atoms():
    """The farthest atom counts: Mahalanobis distance in units of the 99 % quantile of the training atoms."""
    rng = np.random.default_rng(3)
    known, seen = rng.normal(size=(1, 400, 3)) * [1, 2, 3], rng.normal(size=(1, 5, 3)) * 4
    frames = [Atoms("H2", np.eye(3)[:2]), Atoms("H3", np.eye(3))]
    knowledge = Knowledge({"latent_distance": fit_latent_distance(known, np.zeros(400, int), 1)})
    truth = [rng.normal(size=(len(frame), 3)) for frame in frames]
    for frame, forces in zip(frames, truth, strict=True):
        frame.calc = SinglePointCalculator(frame, forces=forces)

    def scored(_, novelty):
        of_atoms = {name: np.split(one.of_features(seen, np.zeros(5, int)), [2]) for name, one in novelty.items()}
        of_all = {name: [part.max() for part in parts] for name, parts in of_atoms.items()}
        zeros = [np.zeros_like(forces) for forces in truth]
        return SimpleNamespace(forces=zeros, scores=of_all, atom_scores=of_atoms)

    potential = SimpleNamespace(scored=scored)

    def distance(atoms: np.ndarray) -> np.ndarray:
        moved = atoms - known[0].mean(axis=0)
        return np.sqrt(np.einsum("ai,ij,aj->a", moved, np.linalg.inv(np.cov(known[0].T, bias=True)), moved))

    expected = distance(seen[0]) / np.quantile(distance(known[0]), 0.99)
    scores = structure_scores("latent_distance", potential, frames, knowledge)
    np.testing.assert_allclose(scores, [expected[:2].max(), expected[2:].max()], rtol=2e-3)
    found = errors_and_scores("latent_distance", potential, frames, knowledge)
    np.testing.assert_allclose(found.scores, expected, rtol=2e-3)
    assert list(found.numbers) == [1] * 5
    np.testing.assert_allclose(found.errors, np.linalg.norm(np.concatenate(truth), axis=1))


def test_what_calibrates_nothing_is_refused():
    ones = np.ones(30)
    with pytest.raises(InputError, match="members agree"):
        calibrated_record(ones, 0 * ones, 0.1)
    with pytest.raises(InputError, match="not a number"):
        conformal_factor(np.append(ones, np.nan), np.append(ones, 1.0), 0.1)
    half = np.repeat([0.0, 1.0], 15)  # half of the atoms have errors and no spread
    rule = ConformalThresholds(tolerance=0.1, alpha=0.1)
    with pytest.raises(InputError, match="errors but no spread"):
        rule.resolve(not_asked, lambda _: of_hydrogen(ones, half))
    assert FixedThresholds(record=1, stop=2).resolve(not_asked, not_asked).levels == (1, 2)


def test_what_is_found_of_elements_is_carried_into_the_gate():
    """As thresholds of elements in the settings of the gate are, and on top of them."""

    def factors(gate: AbsoluteGate, relative: Any) -> tuple[bool, np.ndarray]:
        runner = explorer(gate=gate)
        known = runner._known(Knowledge(relative=relative))
        _, setup, loop = runner._prepare([dimer()] * 3, runner._thresholds((1.0, 2.0)), jax.random.key(0), known)
        return loop.by_species, np.asarray(setup.gate_factors)

    assert factors(AbsoluteGate(), None)[0] is False
    for gate, relative, expected in (
        (AbsoluteGate(species={"H": 0.5}), None, [1, 2]),
        (AbsoluteGate(), {"H": 0.5}, [1, 2]),
        (AbsoluteGate(species={"H": 0.5}), {"H": 0.5, "O": 2.0}, [0.5, 4]),
        (AbsoluteGate(), {}, [1, 1]),
    ):
        told_apart, found = factors(gate, relative)
        assert told_apart and np.allclose(found, [expected] * 3)
    of_each = {"H": 0.5}, {}, {"O": 2.0}
    assert np.allclose(factors(AbsoluteGate(), of_each)[1], [[1, 2], [1, 1], [0.5, 1]]), "walkers may have their own"


def test_models_of_unlike_widths_count_alike_in_the_latent_distance():
    """Padding to the widest model's features dilutes no model's distance, wherever it stands."""
    rng = np.random.default_rng(5)
    wide, narrow = rng.normal(size=(1, 400, 12)), rng.normal(size=(1, 400, 3))
    far = rng.normal(size=(2, 1, 20, 12)) * 4
    species = np.zeros(400, int)

    def distance(features, atoms):
        fitted = fit_latent_distance(features, species, 1)
        found = fitted.of_features(jnp.asarray(atoms), jnp.zeros(atoms.shape[1], int))
        return np.asarray(found) * float(fitted.unit[0])

    with jax.enable_x64(True):
        apart = [distance(wide, far[0]), distance(narrow, far[1][..., :3])]
        padded = np.concatenate([wide, np.pad(narrow, ((0, 0), (0, 0), (0, 9)))])
        of_both = np.concatenate([far[0], np.pad(far[1][..., :3], ((0, 0), (0, 0), (0, 9)))])
        both = [distance(padded, of_both), distance(padded[::-1], of_both[::-1])]
        expected = np.sqrt((apart[0] ** 2 + apart[1] ** 2) / 2)
        for found in both:
            np.testing.assert_allclose(found, expected, rtol=1e-9)
        assert np.allclose(distance(padded[1:], of_both[1:]), apart[1])
