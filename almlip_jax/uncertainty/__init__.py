"""Uncertainty: how a committee's spread relates to its errors."""

from almlip_jax.uncertainty.calibration import (
    auroc,
    ause,
    calibration_metrics,
    crps,
    ence,
    force_calibration,
    miscalibration_area,
    nll,
    nll_scale,
    reliability,
    slope,
)

__all__ = [
    "auroc",
    "ause",
    "calibration_metrics",
    "crps",
    "ence",
    "force_calibration",
    "miscalibration_area",
    "nll",
    "nll_scale",
    "reliability",
    "slope",
]
