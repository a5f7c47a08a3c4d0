"""From structures and a potential to a batch: evaluated structures as the pytrees that selectors see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms

from almlip_jax.potential import Evaluated
from almlip_jax.selection import WEIGHT, AdaptiveSettings, Candidates, Selector, SelectorSettings, adapt, select
from almlip_jax.training import TrainingResult


def candidates(
    frames: Sequence[Atoms],
    found: Evaluated,
    capacity: int | None = None,
    *,
    cost: np.ndarray | None = None,
    scalars: Mapping[str, float] | None = None,
) -> Candidates:
    """The pytree that selectors see.

    Args:
        frames: structures.
        found: what the potential says of them, features included.
        capacity: rows to pad to, so that shapes stay the same from round to round; just enough by default.
        cost: [n] expected price of each label; the number of atoms by default.
        scalars: what goes with the structures as a whole.
    """
    rows = max(capacity or 0, len(frames))
    missing = rows - len(frames)
    price = np.array([len(frame) for frame in frames]) if cost is None else cost

    def padded(values: np.ndarray) -> jax.Array:
        return jnp.asarray(np.pad(values, [(0, missing)] + [(0, 0)] * (values.ndim - 1)))

    return Candidates(
        features={name: padded(values) for name, values in found.features.items()},
        scores={name: padded(values) for name, values in found.scores.items()},
        cost=padded(price.astype(np.float32)),
        valid=padded(np.ones(len(frames), bool)),
        id=jnp.arange(rows, dtype=jnp.int32),
        scalars={name: jnp.asarray(value) for name, value in (scalars or {}).items()},
    )


def adaptive_part(settings: SelectorSettings) -> AdaptiveSettings | None:
    """The selector that follows progress inside some settings, if there is one."""
    return settings.innermost if isinstance(settings.innermost, AdaptiveSettings) else None


def selection_scalars(settings: SelectorSettings, errors: Sequence[float]) -> dict[str, float]:
    """What a selector asks of the rounds so far: `adaptive` the weight of uncertainty, after some validation errors."""
    adaptive = adaptive_part(settings)
    return {} if adaptive is None else {WEIGHT: uncertainty_weight(adaptive.alpha, errors)}


VALIDATION_ERROR = "validation_forces_rmse"
"""Name in a potential's metadata of its force error on the structures kept for validation."""


def validation_error(metadata: Mapping[str, Any]) -> float:
    """Force error on the structures kept for validation, eV/Angstrom, as noted with a potential; NaN where none is."""
    found = metadata.get(VALIDATION_ERROR)
    return float("nan") if found is None else float(found)


def validation_note(result: TrainingResult) -> dict[str, float | None]:
    """What a potential's metadata say of the validation of its training.

    The lowest root mean square error of force components that a model had in any validation, eV/Angstrom, averaged over
    the models that are left; None without structures kept for validation.
    """
    reports = [report.validation_forces_rmse for report in result.history]
    errors = np.stack(reports).astype(np.float64) if reports else np.full((1, 1), np.nan)  # [reports, L]
    lowest = np.min(np.where(np.isfinite(errors), errors, np.inf), axis=0)
    lowest = np.delete(lowest, result.left_out)
    known = lowest[np.isfinite(lowest)]
    return {VALIDATION_ERROR: float(np.mean(known)) if known.size else None}


def uncertainty_weight(alpha: float, errors: Sequence[float]) -> float:
    """Weight of uncertainty after the validation errors of all rounds, the first weight given; see `adapt`.

    A round without an error (not a number) is passed over.
    """
    known = [error for error in errors if np.isfinite(error)]
    for before, after in zip(known[:-1], known[1:], strict=True):
        alpha = float(adapt(alpha, 1 - after / before if before > 0 else float("nan")))
    return alpha


def choose(selector: Selector, key: jax.Array, pool: Candidates, labelled: Candidates) -> list[tuple[int, float]]:
    """Rows of the pool that a selector chose, best first, each with its gain."""
    chosen = select(selector, key, pool, labelled)
    rows = zip(chosen.indices, chosen.valid, chosen.gain, strict=True)
    return [(int(index), float(gain)) for index, valid, gain in rows if valid]
