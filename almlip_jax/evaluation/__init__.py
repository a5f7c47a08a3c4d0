"""Evaluation: error metrics of a potential on labelled structures."""

from almlip_jax.evaluation.metrics import error_metrics

__all__ = ["error_metrics"]
