"""From structures and a potential to a batch: evaluated structures as the pytrees that selectors see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms

from almlip_jax.potential import Evaluated
from almlip_jax.selection import WEIGHT, AdaptiveSettings, Candidates, Selector, SelectorSettings, adapt, select
from almlip_jax.training import VALIDATION_ERROR


def candidates(
    frames: Sequence[Atoms],
    evaluated: Evaluated,
    capacity: int | None = None,
    *,
    cost: np.ndarray | None = None,
    scalars: Mapping[str, float] | None = None,
) -> Candidates:
    """The pytree that selectors see.

    Args:
        frames: structures.
        evaluated: what the potential gives for them, features included.
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
        features={name: padded(values) for name, values in evaluated.features.items()},
        scores={name: padded(values) for name, values in evaluated.scores.items()},
        cost=padded(price.astype(np.float32)),
        valid=padded(np.ones(len(frames), bool)),
        id=jnp.arange(rows, dtype=jnp.int32),
        scalars={name: jnp.asarray(value) for name, value in (scalars or {}).items()},
    )


def adaptive_part(settings: SelectorSettings) -> AdaptiveSettings | None:
    """The selector that follows progress inside some settings, if there is one."""
    return settings.innermost if isinstance(settings.innermost, AdaptiveSettings) else None


def selection_scalars(settings: SelectorSettings, errors: Sequence[float]) -> dict[str, float]:
    """Numbers that a selector takes from the rounds so far: for `adaptive` the weight of uncertainty, from errors."""
    adaptive = adaptive_part(settings)
    return {} if adaptive is None else {WEIGHT: uncertainty_weight(adaptive.alpha, errors)}


def validation_error(metadata: Mapping[str, Any]) -> float:
    """Force error on the structures kept for validation, eV/Angstrom, as noted with a potential; NaN where none is."""
    error = metadata.get(VALIDATION_ERROR)
    return float("nan") if error is None else float(error)


def uncertainty_weight(alpha: float, errors: Sequence[float]) -> float:
    """Weight of uncertainty after the validation errors of all rounds, the first weight given; see `adapt`.

    A round without an error (not a number) is passed over.
    """
    known = [error for error in errors if np.isfinite(error)]
    for before, after in zip(known[:-1], known[1:], strict=True):
        alpha = float(adapt(alpha, 1 - after / before if before > 0 else float("nan")))
    return alpha


def undecided(gains: Sequence[float | None], candidates: int) -> str | None:
    """A sentence that a selector could not tell candidates apart, so that their order decided; None where it could."""
    if len(gains) >= candidates or not gains or any(gain != 0 for gain in gains):
        return None
    return (
        f"the selector finds nothing in which the {candidates} candidates differ (all gains are 0) and has taken "
        "some of them in their order; other features or another score may tell more."
    )


@dataclass(frozen=True)
class Chooser:
    """A selector that is asked again and again, with arrays that keep their shapes.

    Attributes:
        settings: of the selector.
        batch: structures in a batch.
        candidates: rows for the structures to choose from.
        labelled: rows for those that are labelled.
    """

    settings: SelectorSettings
    batch: int
    candidates: int
    labelled: int

    @cached_property
    def selector(self) -> Selector:
        """Chooses a batch."""
        return self.settings.build(self.batch)


def choose(selector: Selector, key: jax.Array, pool: Candidates, labelled: Candidates) -> list[tuple[int, float]]:
    """Rows of the pool that a selector chose, best first, each with its gain."""
    chosen = select(selector, key, pool, labelled)
    rows = zip(chosen.indices, chosen.valid, chosen.gain, strict=True)
    return [(int(index), float(gain)) for index, valid, gain in rows if valid]
