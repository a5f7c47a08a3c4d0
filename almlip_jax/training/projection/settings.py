"""Settings of trainings by variable projection."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from almlip_jax.settings import Settings


class ProjectionSettings(Settings):
    """How models are trained whose energy is linear in most of their parameters (``kind: mtp``).

    Linear parameters are the best ones, by least squares, wherever the others stand; these are improved by the method
    of Levenberg and Marquardt, a pass over all structures each time.  Where it ends depends on where it began, so that
    several starts are tried.
    """

    iterations: int = Field(default=200, ge=1, le=10**6)
    """Passes over the data at most; of trainings that start warm, `warm_steps` where that is given."""
    starts: int = Field(default=4, ge=1, le=256)
    """Random starts, of which the worse half ends time and again until, after `trial_iterations`, one is left."""
    trial_iterations: int = Field(default=20, ge=1, le=10**6)
    """Passes over the data after which one start is left."""
    tolerance: float = Field(default=1e-4, gt=0, lt=1)
    """A search ends where three steps in a row have lowered the loss by less than this share each."""
    members: Literal["shared", "own"] = "shared"
    """``shared``: one search on all structures alike; then every model goes on from there with its own weights of the
    structures (`ensemble.bootstrap`).  ``own``: every model is searched for from a start of its own and with its own
    weights, which takes as many times as long."""
    member_iterations: int = Field(default=2, ge=0, le=10**6)
    """With ``shared`` and several models: passes over the data in which these differ in all parameters; with 0 in
    linear ones alone.  They are the last of all passes, after one for the weights, and at least one of the search."""
    ridge: float | None = Field(default=None, gt=0, lt=1)
    """Penalty on linear parameters, relative to what they multiply.  By default the error that rounding makes in the
    numbers that the potential is used in, 1.2e-7 in float32, so that large coefficients do not cancel to digits that
    are not there; 1e-10 in float64, enough to decide what data leave open."""
