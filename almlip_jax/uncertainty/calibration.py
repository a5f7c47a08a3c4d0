"""Calibration: how well a spread predicts the size of an error, and the factor that makes it predict better.

All functions take flat numpy arrays of errors and of the standard deviations that were predicted for them, in float64.
For vectors (forces of atoms) the spread s_i = sqrt(mean_m |F_mi - F_i|^2) belongs to the length of the error vector;
each of its three components then has the standard deviation s_i / sqrt(3), which is what `force_calibration` judges.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import mannwhitneyu, norm, spearmanr


def nll_scale(errors: np.ndarray, sigma: np.ndarray) -> float:
    """Factor alpha that minimises the Gaussian negative log-likelihood of alpha * sigma: alpha^2 = <(e / sigma)^2>."""
    return float(np.sqrt(np.mean((errors / sigma) ** 2)))


def slope(errors: np.ndarray, sigma: np.ndarray) -> float:
    """Least-squares slope, through the origin, of the absolute error against sigma."""
    return float(np.sum(np.abs(errors) * sigma) / np.sum(sigma**2))


def reliability(errors: np.ndarray, sigma: np.ndarray, points: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Expected and observed shares of errors within central Gaussian intervals, each [points].

    ``p_obs(p) = mean[|z| <= Phi^-1(1/2 + p/2)]`` with z = error / sigma.
    """
    expected = np.linspace(0, 1, points)
    z = np.sort(np.abs(errors / sigma))
    return expected, np.searchsorted(z, norm.ppf(0.5 + 0.5 * expected), side="right") / len(z)


def miscalibration_area(errors: np.ndarray, sigma: np.ndarray) -> float:
    """Area between the reliability curve and the diagonal: 0 where calibrated, at most 1/2."""
    expected, observed = reliability(errors, sigma)
    return float(np.trapezoid(np.abs(observed - expected), expected))


def ence(errors: np.ndarray, sigma: np.ndarray, bins: int = 15) -> float:
    """Expected normalised calibration error: mean over bins of equal count of |RMV - RMSE| / RMV.

    Source: Levi et al., Sensors 22, 5540 (2022).
    """
    order = np.argsort(sigma, kind="stable")
    parts = [part for part in np.array_split(order, min(bins, len(order))) if len(part)]
    rmv = np.array([np.sqrt(np.mean(sigma[part] ** 2)) for part in parts])
    rmse = np.array([np.sqrt(np.mean(errors[part] ** 2)) for part in parts])
    return float(np.mean(np.abs(rmv - rmse) / rmv))


def nll(errors: np.ndarray, sigma: np.ndarray) -> float:
    """Mean Gaussian negative log-likelihood, in nats."""
    return float(-np.mean(norm.logpdf(errors, scale=sigma)))


def crps(errors: np.ndarray, sigma: np.ndarray) -> float:
    """Mean continuous ranked probability score of Gaussians, in the unit of the errors.

    ``sigma [z (2 Phi(z) - 1) + 2 phi(z) - 1/sqrt(pi)]``.  Source: Gneiting and Raftery, JASA 102, 359 (2007).
    """
    z = errors / sigma
    return float(np.mean(sigma * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))))


def auroc(errors: np.ndarray, sigma: np.ndarray, bound: float) -> float:
    """Probability that an error beyond a bound has the larger sigma than one within; NaN where all are on one side."""
    large = np.abs(errors) > bound
    if large.all() or not large.any():
        return float("nan")
    above, below = sigma[large], sigma[~large]
    return float(mannwhitneyu(above, below).statistic / (len(above) * len(below)))


def ause(errors: np.ndarray, sigma: np.ndarray) -> float:
    """Area under the sparsification error: how much better one could reject by true error than by sigma.

    The root mean square of the errors that are left when the share x of the largest (by sigma, or by true error) is
    left out, each over that of all, integrated over x and subtracted.  0 is perfect.
    """
    squares = np.asarray(errors, np.float64) ** 2
    total = np.sqrt(np.mean(squares))
    if total == 0:
        return 0.0

    def left(order: np.ndarray) -> np.ndarray:
        kept = squares[order][::-1]  # smallest first
        return np.sqrt(np.cumsum(kept) / np.arange(1, len(kept) + 1))[::-1] / total

    by_sigma = left(np.argsort(-sigma, kind="stable"))
    by_error = left(np.argsort(-squares, kind="stable"))
    return float(np.mean(by_sigma - by_error))


def calibration_metrics(errors: np.ndarray, sigma: np.ndarray, bound: float | None = None) -> dict[str, float]:
    """Every metric of this page for signed errors and their standard deviations.

    Args:
        errors: [n].
        sigma: [n]; zeros are raised to the smallest positive number of float32, unless all are zero.
        bound: for `auroc`, in the unit of the errors; left out where not given.

    Returns:
        ``scale``, ``slope``, ``miscalibration_area``, ``ence``, ``zms``, ``nll``, ``crps``, ``sharpness``,
        ``spearman``, ``ause`` and, with a bound, ``auroc``; NaN where there are fewer than 2 values, no spread at all
        (a committee of one), or one that is not finite (a frame that exploded).
    """
    errors = np.asarray(errors, np.float64)
    silent = not np.any(sigma)
    sigma = np.maximum(np.asarray(sigma, np.float64), np.finfo(np.float32).tiny)
    names = ("scale", "slope", "miscalibration_area", "ence", "zms", "nll", "crps", "sharpness", "spearman", "ause")
    if len(errors) < 2 or silent or not (np.isfinite(errors).all() and np.isfinite(sigma).all()):
        return dict.fromkeys([*names, *(["auroc"] if bound is not None else [])], float("nan"))
    constant = np.ptp(sigma) == 0 or np.ptp(np.abs(errors)) == 0
    values = (
        nll_scale(errors, sigma),
        slope(errors, sigma),
        miscalibration_area(errors, sigma),
        ence(errors, sigma),
        float(np.mean((errors / sigma) ** 2)),
        nll(errors, sigma),
        crps(errors, sigma),
        float(np.sqrt(np.mean(sigma**2))),
        float("nan") if constant else float(spearmanr(np.abs(errors), sigma).statistic),
        ause(errors, sigma),
    )
    found = dict(zip(names, values, strict=True))
    if bound is not None:
        found["auroc"] = auroc(errors, sigma, bound)
    return found


def force_calibration(errors: np.ndarray, force_std: np.ndarray, bound: float = 0.1) -> dict[str, float]:
    """Calibration of ``force_std``: components against s_i / sqrt(3), ranks and rejection by vectors.

    Args:
        errors: [n, 3] eV/Angstrom, prediction minus reference.
        force_std: [n] eV/Angstrom.
        bound: eV/Angstrom; an atom whose error vector is longer counts as wrong for ``auroc``.

    Returns:
        as `calibration_metrics`; ``spearman``, ``auroc``, ``ause`` and ``slope`` are those of the error's length.
    """
    components = calibration_metrics(errors.reshape(-1), np.repeat(force_std, 3) / np.sqrt(3.0))
    lengths = calibration_metrics(np.linalg.norm(errors, axis=-1), force_std, bound)
    return components | {name: lengths[name] for name in ("spearman", "auroc", "ause", "slope")}
