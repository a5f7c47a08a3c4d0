"""Sweeps: selectors compared on labelled pools, with everything shared that is not compared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from almlip_jax.sweep.points import parse_only
from almlip_jax.sweep.settings import SweepConfig

if TYPE_CHECKING:
    from almlip_jax.sweep.run import SweepResult, render_result, run_sweep

__all__ = ["SweepConfig", "SweepResult", "parse_only", "render_result", "run_sweep"]


def __getattr__(name: str) -> Any:
    # imported when asked for: reading a config needs none of it
    if name in __all__:
        from almlip_jax.sweep import run

        return getattr(run, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
