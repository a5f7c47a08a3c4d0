"""From structures and a potential to a batch: evaluated structures as the pytrees that selectors see."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms

from almlip_jax.potential import Evaluated
from almlip_jax.selection import Candidates, Selector, select


def candidates(frames: Sequence[Atoms], found: Evaluated, capacity: int | None = None) -> Candidates:
    """The pytree that selectors see; the price of a label is taken as the number of atoms.

    Args:
        frames: structures.
        found: what the potential says of them, features included.
        capacity: rows to pad to, so that shapes stay the same from round to round; just enough by default.
    """
    rows = max(capacity or 0, len(frames))
    missing = rows - len(frames)

    def padded(values: np.ndarray) -> jax.Array:
        return jnp.asarray(np.pad(values, [(0, missing)] + [(0, 0)] * (values.ndim - 1)))

    return Candidates(
        features={name: padded(values) for name, values in found.features.items()},
        scores={name: padded(values) for name, values in found.scores.items()},
        cost=padded(np.array([float(len(frame)) for frame in frames], np.float32)),
        valid=padded(np.ones(len(frames), bool)),
        id=jnp.arange(rows, dtype=jnp.int32),
    )


def choose(selector: Selector, key: jax.Array, pool: Candidates, labelled: Candidates) -> list[tuple[int, float]]:
    """Rows of the pool that a selector chose, best first, each with its gain."""
    chosen = select(selector, key, pool, labelled)
    rows = zip(chosen.indices, chosen.valid, chosen.gain, strict=True)
    return [(int(index), float(gain)) for index, valid, gain in rows if valid]
