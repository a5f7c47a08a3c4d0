"""Small pools of structures with rows of atoms, and the selectors that look at these."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from almlip_jax.selection import Candidates, Environments, Selector, cover, environment_entropy

K = 4
ROOM = {"structures": 16, "atoms": 80, "largest": 6}
COVER, ENTROPY = cover(K, "x", radius=0.6), environment_entropy(K, "x", bandwidth=0.6)
SELECTORS: dict[str, Selector] = {"cover": COVER, "entropy": ENTROPY, "cover_by_quantile": cover(K, "x", quantile=0.8)}
Structure = tuple[np.ndarray, np.ndarray]


def structures(seed: int, number: int = 12) -> list[Structure]:
    """Rows and elements of the atoms of structures of unlike size; a rare element, and rows that lie in clusters."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(scale=2.0, size=(6, 3))
    found = []
    for size in rng.integers(1, 7, size=number):
        rows = centres[rng.integers(0, 6, size=size)] + rng.normal(scale=0.1, size=(size, 3))
        found.append((rows, rng.choice([1, 8, 78], size=size, p=[0.5, 0.4, 0.1])))
    return found


def candidates(given: list[Structure], *, order: Any = None, room: dict[str, int] = ROOM, **changes: Any) -> Candidates:
    """Candidates of some structures, their ids in the order they were given in, among rows that hold rubbish."""
    if not given:
        nobody = np.zeros(room["structures"], bool)
        return candidates(structures(0, 1), room=room, valid=nobody, **changes)
    order = np.arange(len(given)) if order is None else np.asarray(order)
    atoms = Environments.of({"x": [given[n][0] for n in order]}, [given[n][1] for n in order], **room)
    used = int(np.sum(atoms.members >= 0))
    rubbish = {"x": jnp.asarray(atoms.rows["x"]).at[used:].set(jnp.nan)}
    missing = room["structures"] - len(given)
    made = Candidates(
        features={},
        scores={},
        cost=np.pad(np.ones(len(given)), (0, missing), constant_values=np.nan),
        valid=np.pad(np.ones(len(given), bool), (0, missing)),
        id=np.pad(order, (0, missing), constant_values=-1),
        environments=atoms.replace(rows=rubbish),
    )
    return made.replace(**changes)
