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

ERRORS = ("energy_error", "force_error_mean", "force_error_max")
"""Names of the scores that say how wrong the potential is on a labelled structure."""


def candidates(
    frames: Sequence[Atoms],
    found: Evaluated,
    capacity: int | None = None,
    *,
    labelled: bool = False,
    scalars: Mapping[str, float] | None = None,
) -> Candidates:
    """The pytree that selectors see; the price of a label is taken as the number of atoms.

    Args:
        frames: structures.
        found: what the potential says of them, features included.
        capacity: rows to pad to, so that shapes stay the same from round to round; just enough by default.
        labelled: add the `true_errors` to the scores.
        scalars: what goes with the structures as a whole.
    """
    rows = max(capacity or 0, len(frames))
    missing = rows - len(frames)
    scores = found.scores | (true_errors(frames, found) if labelled else {})

    def padded(values: np.ndarray) -> jax.Array:
        return jnp.asarray(np.pad(values, [(0, missing)] + [(0, 0)] * (values.ndim - 1)))

    return Candidates(
        features={name: padded(values) for name, values in found.features.items()},
        scores={name: padded(values) for name, values in scores.items()},
        cost=padded(np.array([float(len(frame)) for frame in frames], np.float32)),
        valid=padded(np.ones(len(frames), bool)),
        id=jnp.arange(rows, dtype=jnp.int32),
        scalars={name: jnp.asarray(value) for name, value in (scalars or {}).items()},
    )


def true_errors(frames: Sequence[Atoms], found: Evaluated) -> dict[str, np.ndarray]:
    """How wrong a potential is on labelled structures, name -> [n]; NaN where a structure lacks the label.

    ``energy_error``: |E - E_label|, eV; ``force_error_mean`` and ``force_error_max``: mean and largest length of the
    force errors of its atoms, eV/Angstrom.
    """
    errors = np.full((len(ERRORS), len(frames)), np.nan)
    for n, frame in enumerate(frames):
        labels = frame.calc.results if frame.calc is not None else {}
        if "energy" in labels:
            errors[0, n] = abs(found.energy[n] - labels["energy"])
        if "forces" in labels:
            lengths = np.linalg.norm(found.forces[n] - labels["forces"], axis=1)
            errors[1:, n] = lengths.mean(), lengths.max()
    return dict(zip(ERRORS, errors.astype(np.float32), strict=True))


def adaptive_part(settings: SelectorSettings) -> AdaptiveSettings | None:
    """The selector that follows progress inside some settings, if there is one."""
    inner: Any = settings
    while hasattr(inner, "selector"):  # inside a chain, or weighed by cost
        inner = inner.selector
    return inner if isinstance(inner, AdaptiveSettings) else None


def selection_scalars(settings: SelectorSettings, errors: Sequence[float]) -> dict[str, float]:
    """What a selector asks of the campaign so far: `adaptive` the weight of uncertainty, after some test errors."""
    adaptive = adaptive_part(settings)
    return {} if adaptive is None else {WEIGHT: uncertainty_weight(adaptive.alpha, errors)}


def uncertainty_weight(alpha: float, errors: Sequence[float]) -> float:
    """Weight of uncertainty after the test errors of all rounds so far, the first weight given; see `adapt`."""
    for before, after in zip(errors[:-1], errors[1:], strict=True):
        alpha = float(adapt(alpha, 1 - after / before if before > 0 else float("nan")))
    return alpha


def choose(selector: Selector, key: jax.Array, pool: Candidates, labelled: Candidates) -> list[tuple[int, float]]:
    """Rows of the pool that a selector chose, best first, each with its gain."""
    chosen = select(selector, key, pool, labelled)
    rows = zip(chosen.indices, chosen.valid, chosen.gain, strict=True)
    return [(int(index), float(gain)) for index, valid, gain in rows if valid]
