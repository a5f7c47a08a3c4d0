"""Statistics of comparisons against closed forms, enumeration and made-up data of known outcome."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from almlip_jax.errors import InputError
from almlip_jax.evaluation.statistics import (
    SeedCurves,
    final_errors,
    holm,
    labels_ratio,
    labels_to_target,
    log_error_area,
    paired,
    paired_curves,
    performance_ratios,
    profile,
    seeds_needed,
    t_interval,
)

LABELS = np.array([20.0, 40.0, 80.0, 160.0])


def power_law(factor: float = 1.0, exponent: float = 0.7) -> np.ndarray:
    """Errors of a selector that saves ``factor`` labels."""
    return 0.5 * (factor * LABELS) ** -exponent


# -------------------------------------------------------------------------------------------------------------- curves


def test_curves_of_different_labels_meet_on_one_grid_without_extrapolation():
    curves = SeedCurves.from_points({3: (LABELS, power_law()), 1: ([40.0, 160.0], power_law()[[1, 3]])})
    assert curves.seeds == (1, 3)
    np.testing.assert_array_equal(curves.labels, LABELS)
    np.testing.assert_array_equal(curves.errors[1], power_law())  # measured points, to the last bit
    assert np.isnan(curves.errors[0, 0])
    np.testing.assert_allclose(curves.errors[0, 1:], power_law()[1:], rtol=1e-12)  # a power law is straight in logs
    np.testing.assert_array_equal(curves.common().labels, LABELS[1:])


def test_the_later_of_two_points_counts_and_missing_errors_are_none():
    curves = SeedCurves.from_points({0: ([20.0, 40.0, 40.0, 80.0], [0.3, 0.2, 0.1, np.nan])})
    np.testing.assert_array_equal(curves.labels, [20.0, 40.0])
    np.testing.assert_array_equal(curves.errors, [[0.3, 0.1]])
    with pytest.raises(InputError, match="seed 0 .* not positive"):
        SeedCurves.from_points({0: ([20.0], [0.0])})


def test_area_of_a_power_law_in_closed_form():
    # in ln(labels) ln e is straight, and the trapezoidal rule exact: the mean of its ends
    logs = np.log(power_law())
    assert log_error_area(LABELS, power_law()) == pytest.approx(0.5 * (logs[0] + logs[-1]), rel=1e-12)
    ratio = np.exp(log_error_area(LABELS, 0.8 * power_law()) - log_error_area(LABELS, power_law()))
    assert ratio == pytest.approx(0.8, rel=1e-12)
    # of any curve: the trapezoids by hand, and labels between two points add nothing where the curve is straight
    bent, x = np.array([0.3, 0.1, 0.09]), np.log([10.0, 20.0, 80.0])
    by_hand = np.sum(0.5 * (np.log(bent)[1:] + np.log(bent)[:-1]) * np.diff(x)) / (x[-1] - x[0])
    assert log_error_area(np.exp(x), bent) == pytest.approx(by_hand, rel=1e-12)


# ----------------------------------------------------------------------------------------------------------- intervals


def test_t_interval_is_that_of_scipy():
    values = np.array([[0.1, 3.0], [0.12, np.nan], [0.15, 5.0], [0.09, 4.0]])
    found = t_interval(values)
    for column, own in enumerate((values[:, 0], values[[0, 2, 3], 1])):
        logs = np.log(own)
        low, high = stats.t.interval(0.95, len(own) - 1, logs.mean(), stats.sem(logs))
        assert found.center[column] == pytest.approx(stats.gmean(own))
        assert (found.low[column], found.high[column]) == pytest.approx((np.exp(low), np.exp(high)))
    np.testing.assert_array_equal(found.count, [4, 3])
    assert np.isnan(t_interval(values[:1]).low).all()


def test_an_interval_as_text():
    """Of the logarithms 0 and 0.2: mean 0.1, half width 12.706 times the standard error 0.1."""
    low, high = np.exp(0.1 - 1.27062), np.exp(0.1 + 1.27062)
    assert f"{t_interval([1.0, np.exp(0.2)]):.3f}" == f"1.105 ({low:.3f} to {high:.3f})"
    assert f"{t_interval([2.5]):.2f}" == "2.50"


def test_intervals_cover_the_truth_as_often_as_they_say():
    values = np.exp(np.log(0.04) + 0.2 * np.random.default_rng(0).normal(size=(8, 4000)))  # 8 seeds
    found = t_interval(values)
    assert 0.93 <= np.mean((found.low <= 0.04) & (found.high >= 0.04)) <= 0.97


# ---------------------------------------------------------------------------------------------------- labels to target


def test_labels_to_target_of_a_power_law_in_closed_form():
    goal = 0.5 * 100.0**-0.7
    found = labels_to_target(LABELS, power_law(), goal)
    assert (float(found.low), float(found.high)) == pytest.approx((100.0, 100.0), rel=1e-12)
    never = labels_to_target(LABELS, power_law(), 1e-6)
    assert (float(never.low), float(never.high)) == (160.0, np.inf)
    at_once = labels_to_target(LABELS, power_law(), 1.0)
    assert (float(at_once.low), float(at_once.high)) == (0.0, 20.0)


def test_bounds_of_labels():
    """A curve that comes to its target, one that never does, one that is there with its first labels."""
    found = labels_to_target([10, 40], [[2.0, 1.0], [2.0, 1.5], [1.0, 0.5]], 1.0)
    np.testing.assert_allclose(found.finite, [40, 40, 10])
    np.testing.assert_allclose(found.low, [40, 40, 0])
    assert found.beyond.tolist() == [False, True, False]


@given(
    errors=st.lists(st.floats(1e-3, 1.0), min_size=4, max_size=4),
    target=st.floats(1e-3, 1.0),
)
def test_a_curve_is_above_its_target_until_there(errors, target):
    curve = np.array(errors)
    found = labels_to_target(LABELS, curve, target)
    before = float(found.low) * (1 - 1e-9) > LABELS
    assert (curve[before] > target).all()
    if np.isfinite(found.high):
        assert (curve[float(found.high) * (1 - 1e-9) <= LABELS] <= target * (1 + 1e-9)).any()


def test_a_known_saving_is_found_and_lies_in_its_interval():
    rng = np.random.default_rng(1)
    own = [np.exp(rng.normal(0, 0.3)) for _ in range(8)]  # shared by the pair
    noisy = [
        {n: (LABELS, f * power_law(k) * np.exp(0.02 * rng.normal(size=4))) for n, f in enumerate(own)} for k in (1, 1.6)
    ]
    ours, theirs = paired_curves(SeedCurves.from_points(noisy[1]), SeedCurves.from_points(noisy[0]))
    found, interval = labels_ratio(ours, theirs)
    assert float(interval.low) < 1.6 < float(interval.high)
    assert 1.4 < float(found.low) <= float(found.high) < 1.8
    np.testing.assert_array_equal(final_errors(theirs), theirs.errors[:, -1])


# --------------------------------------------------------------------------------------------------------- paired tests


def test_paired_is_what_scipy_says_of_the_logarithms():
    a, b = np.random.default_rng(2).normal(size=(2, 8))
    found = paired(a, b)
    assert found.p_t == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert found.ratio == pytest.approx(np.exp(np.mean(a - b)))
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((np.exp(low), np.exp(high)))
    assert found.least_p == 2**-7
    with pytest.raises(InputError, match="at least 2"):
        paired(a[:1], b[:1])


@settings(max_examples=25)
@given(differences=st.lists(st.integers(-4, 4), min_size=2, max_size=7))
def test_wilcoxon_is_the_enumeration_of_all_signs_ties_or_not(differences):
    d = np.array(differences, float)
    found = paired(d, np.zeros(len(d)))
    d = d[d != 0]
    if not len(d):
        assert found.p_wilcoxon == 1.0
        return
    ranks = stats.rankdata(np.abs(d))
    total = ranks.sum()
    extreme = abs(ranks[d > 0].sum() - total / 2)
    sums = [abs(np.dot(ranks, signs) - total / 2) for signs in product((0, 1), repeat=len(d))]
    assert found.p_wilcoxon == pytest.approx(np.mean(np.array(sums) >= extreme - 1e-9))


def test_holm_in_a_worked_example():
    # sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1, and never falling
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.01, np.nan, 0.6]), [0.02, np.nan, 0.6])
    assert holm([0.7, 0.8]).max() == 1.0


def test_seeds_that_significance_needs():
    # six selectors after Holm: 6 * 2^(1 - n) < 0.05
    assert seeds_needed(6) == 8
    assert 6 * 2.0 ** (1 - seeds_needed(6)) <= 0.05 < 6 * 2.0 ** (2 - seeds_needed(6))
    assert seeds_needed(1) == 6


# ------------------------------------------------------------------------------------------------------------- profiles


def test_performance_profile_by_hand():
    ratios = performance_ratios([[10.0, 20.0], [30.0, 15.0], [np.inf, 40.0], [np.inf, np.inf]])
    np.testing.assert_array_equal(ratios, [[1, 2], [2, 1], [np.inf, 1], [np.inf, np.inf]])
    np.testing.assert_allclose(profile(ratios, [1.0, 1.9, 2.0]), [[0.25, 0.5], [0.25, 0.5], [0.5, 0.75]])
