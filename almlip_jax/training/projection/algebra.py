"""The small matrices of variable projection, on the host in float64: linear parameters, gradient, steps.

A linear least-squares problem with columns for the linear parameters (Phi), for the derivatives of its predictions by
the others (J, Kaufman's approximation) and for the labels (y) is kept as the triangular factor R of a QR decomposition
of [Phi J y], which has the same inner products whatever the number of rows.  What Phi can describe is projected out of
J and y; what is left is a nonlinear least-squares problem for the other parameters alone (Golub and Pereyra, SIAM J.
Numer. Anal. 10, 413, 1973; Kaufman, BIT 15, 49, 1975).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Solved:
    """A point of a search, its linear parameters being the best ones there.

    Attributes:
        loss: sum of squares that is left.
        objective: the same with what the ridge adds.
        linear: [N] parameters.
        gradient: [P] of half the objective by the others, with its sign turned: uphill for what is explained.
        curvature: [P, P] Gauss and Newton's approximation of its second derivatives.
        response: [N, P] how the linear parameters follow the others, to first order.
    """

    loss: float
    objective: float
    linear: np.ndarray
    gradient: np.ndarray
    curvature: np.ndarray
    response: np.ndarray

    @property
    def finite(self) -> bool:
        """Whether all of it are numbers."""
        return bool(np.isfinite(self.objective) and np.isfinite(self.curvature).all())


def solve(factor: np.ndarray, linear: int, ridge: float) -> Solved:
    """The linear parameters, and what is left to the others.

    Columns are brought to length one, so that a ridge is relative to them.  Parameters on which nothing depends stay 0,
    and where several do the same they share it.

    Args:
        factor: [M, M] triangular factor of [Phi J y].
        linear: number N of columns of Phi.
        ridge: penalty on the linear parameters, in units of their columns' length.
    """
    if not np.isfinite(factor).all():
        nan, others = np.nan, factor.shape[1] - linear - 1
        return Solved(
            nan, nan, np.full(linear, nan), *(np.full(s, nan) for s in ((others,), (others, others), (linear, others)))
        )  # type: ignore[arg-type]
    phi, slopes, labels = factor[:, :linear], factor[:, linear:-1], factor[:, -1]
    length = np.linalg.norm(phi, axis=0)
    length[length == 0] = 1.0
    u, s, vt = np.linalg.svd(phi / length, full_matrices=False)
    s = np.where(s > np.finfo(float).eps * len(factor) * s[0], s, 0.0)  # less is noise of the decomposition
    kept = s**2 / (s**2 + ridge**2)
    inverse = (vt.T * (s / (s**2 + ridge**2))) / length[:, None]
    explained, follow = u.T @ labels, u.T @ slopes
    rest, across = labels - u @ (kept * explained), slopes - u @ follow
    found = inverse @ explained
    loss = float(rest @ rest)
    curvature = across.T @ across + (follow.T * (1 - kept)) @ follow
    penalty = float(np.sum((ridge * found * length) ** 2))
    return Solved(loss, loss + penalty, found, slopes.T @ rest, curvature, -inverse @ follow)


@dataclass(frozen=True)
class Step:
    """A step of the other parameters.

    Attributes:
        others: [P] by how much they change.
        linear: [N] what the linear ones come to, to first order.
        gain: by how much the objective falls, to second order.
    """

    others: np.ndarray
    linear: np.ndarray
    gain: float


def damped_step(point: Solved, scale: np.ndarray, damping: float) -> Step:
    """The step of Levenberg and Marquardt.

    Args:
        point: where it begins.
        scale: [P] squares of what each parameter counts by.
        damping: of the step, relative to the curvature.
    """
    root = np.sqrt(scale)
    values, vectors = np.linalg.eigh(point.curvature / np.outer(root, root))
    values = np.maximum(values, 0)
    along = vectors.T @ (point.gradient / root)
    step = (vectors @ (along / (values + damping))) / root
    gain = float(2 * point.gradient @ step - step @ point.curvature @ step)
    return Step(step, point.linear + point.response @ step, gain)
