"""Replay: which of the structures that a potential remembers a training that goes on from it sees again.

Without them a network forgets: nothing keeps parameters that describe new structures from describing old ones worse.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from ase import Atoms
from ase.geometry import wrap_positions

from almlip_jax.structures.electronic_state import electronic_state
from almlip_jax.structures.labels import label_difference
from almlip_jax.structures.remembered import composition

_SAME = 1e-4  # Angstrom, by which coordinates of one structure may differ: files round
_LEVEL = 10.0  # eV/atom between energies of one composition, more than any arrangement of its atoms makes

_LEAST_RATIO = 0.5
"""Roughly the least number of remembered structures for each new one in a pass over the data.

1000 steps on 900 structures of a molecule, and 54 remembered ones of five: errors on these 13 meV/atom and 343
meV/Angstrom where each comes once (0.06), 1.4 to 3.5 and 53 to 87 with 6, 8 and 16 copies (0.36, 0.48, 0.96); on the
new ones 2.6, and 1.6 to 4.0 meV/atom (single runs)."""

FORGETS = (
    "nothing holds the potential to what it knew; add earlier structures to the data, or train less: with a lower "
    "training.learning_rate and training.max_steps, or by projection with fewer training.projection.iterations"
)
"""What follows where nothing is seen again, and what to do."""


@dataclass(frozen=True)
class Replay:
    """Remembered structures that are trained on again.

    Attributes:
        structures: those that the new data neither hold nor contradict.
        copies: how often each comes in a pass over the data, so that many new structures do not outweigh them.
        remark: what the user should know, a sentence; None where there is nothing to say.
    """

    structures: tuple[Atoms, ...]
    copies: int
    remark: str | None


def replay(
    remembered: Sequence[Atoms], new: Sequence[Atoms], validating: Sequence[Atoms] = (), *, sees_state: bool = False
) -> Replay:
    """Remembered structures that are trained on again together with new data.

    Left out are those that the data hold, and those whose labels these contradict: others for the same structure, or
    another charge or spin of the same composition, unless the potential sees these.  Where that is so for most
    structures that both hold, or where energies of a composition are at another level, labels come from another source,
    and none is trained on again.

    Args:
        remembered: by the potential that the training begins with.
        new: structures that are trained on.
        validating: structures that are validated on.
        sees_state: whether the potential tells structures apart that differ in charge and spin alone.
    """
    data = [*new, *validating]
    if not remembered:
        return Replay((), 0, f"the potential to begin with remembers no structures, so that {FORGETS}.")
    apart = _levels_apart(remembered, data, sees_state)
    if apart is not None:
        reason = f"{apart}; they come from another label source and are not trained on again"
        return Replay((), 0, f"{reason}, so that {FORGETS}.")
    states = {composition(atoms): electronic_state(atoms) for atoms in data}
    looked_up = _Twins(data, sees_state)
    same, other, again = 0, 0, list[Atoms]()
    for atoms in remembered:
        twin = looked_up.of(atoms)
        if twin is not None:
            differs = label_difference(atoms, twin) is not None
            same, other = same + (not differs), other + differs
        elif sees_state or states.get(composition(atoms), electronic_state(atoms)) == electronic_state(atoms):
            again.append(atoms)
    if other > same:
        return Replay(
            (),
            0,
            f"of {same + other} structures that the data share with what the potential remembers, {other} have other "
            f"labels there: those come from another label source and are not trained on again, so that {FORGETS}.",
        )
    states_apart = len(remembered) - same - other - len(again)
    reasons = [f"{other} with other labels"] * bool(other)
    reasons += [f"{states_apart} of a composition with another charge or spin"] * bool(states_apart)
    if not again and not reasons:
        return Replay((), 0, None)  # the data hold them all
    copies = max(1, round(_LEAST_RATIO * len(new) / len(again))) if again else 0
    often = f", {copies} times in each pass over the data" if copies > 1 else ""
    but = f", without {' and '.join(reasons)} than in the data" if reasons else ""
    remark = f"{len(again)} structures that the potential remembers are trained on again{often}{but}."
    return Replay(tuple(again), copies, remark)


def most_replayed(remembered: int, new: int) -> int:
    """Structures that `replay` may have a pass hold besides up to some number of new ones, copies included."""
    return 0 if remembered == 0 else max(remembered, math.ceil(_LEAST_RATIO * new + remembered / 2))


def _levels_apart(remembered: Sequence[Atoms], data: Sequence[Atoms], sees_state: bool) -> str | None:
    """That energies of a composition are too far apart to be of one label source, in words; None where none are."""
    ours = _energy_ranges(data, sees_state)
    for (numbers, state), (low, high) in _energy_ranges(remembered, sees_state).items():
        least, most = ours.get((numbers, state), (low, high))
        gap = max(low - most, least - high)
        if gap > _LEVEL:
            formula = Atoms(numbers).get_chemical_formula()
            return f"energies of {formula} that the potential remembers are {gap:.3g} eV/atom from those of the data"
    return None


def _energy_ranges(structures: Iterable[Atoms], sees_state: bool) -> dict[_Kind, tuple[float, float]]:
    """Lowest and highest energy of each composition, eV/atom; of each of its electronic states where these are seen."""
    found: dict[_Kind, tuple[float, float]] = {}
    for atoms in structures:
        energy = None if atoms.calc is None else atoms.calc.results.get("energy")
        if energy is not None:
            own = float(energy) / len(atoms)
            kind = composition(atoms), electronic_state(atoms) if sees_state else None
            low, high = found.get(kind, (own, own))
            found[kind] = (min(low, own), max(high, own))
    return found


_Kind: TypeAlias = tuple[tuple[int, ...], tuple[int, int] | None]
"""A composition, and its charge and spin where these are seen."""


class _Twins:
    """Finds structures among some: atoms in the same order, up to lattice vectors, and one state where it is seen."""

    def __init__(self, structures: Sequence[Atoms], sees_state: bool) -> None:
        self._sees_state = sees_state
        groups: dict[tuple[Any, ...], list[Atoms]] = {}
        for atoms in structures:
            groups.setdefault(self._kind(atoms), []).append(atoms)
        self._groups = {
            kind: (group, np.stack([a.positions for a in group]), np.stack([a.cell.array for a in group]))
            for kind, group in groups.items()
        }

    def of(self, atoms: Atoms) -> Atoms | None:
        """The same structure; None where there is none."""
        if self._kind(atoms) not in self._groups:
            return None
        group, positions, cells = self._groups[self._kind(atoms)]
        near = np.flatnonzero(np.abs(cells - atoms.cell.array).max(axis=(1, 2)) <= _SAME)
        for some in (slice(1), slice(None)):  # few agree in their first atom
            near = near[_distance(positions[near, some], atoms, some) <= _SAME]
        return group[near[0]] if len(near) else None

    def _kind(self, atoms: Atoms) -> tuple[Any, ...]:
        state = electronic_state(atoms) if self._sees_state else None
        return np.asarray(atoms.numbers, np.int64).tobytes(), np.asarray(atoms.pbc, bool).tobytes(), state


def _distance(positions: np.ndarray, atoms: Atoms, some: slice) -> np.ndarray:
    """Largest difference of a coordinate, up to lattice vectors, [n], between positions [n, N, 3] and some atoms."""
    apart = positions - atoms.positions[some]
    if atoms.pbc.any():
        apart = wrap_positions(apart.reshape(-1, 3), atoms.cell, atoms.pbc, (0, 0, 0)).reshape(apart.shape)
    return np.asarray(np.abs(apart).max(axis=(1, 2), initial=0.0))
