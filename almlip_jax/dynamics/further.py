"""Further starts of walkers: how many there must be, and what they must have in common with the first ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms

from almlip_jax.errors import InputError
from almlip_jax.structures.electronic_state import electronic_state

_SAME_PLACE = 1e-6  # Angstrom; largest distance of a fixed atom from its place in the first start


def check_further(wanted: int, starts: Sequence[Atoms], further: Sequence[Sequence[Atoms]]) -> None:
    """Refuses further starts that walkers cannot begin again at.

    Args:
        wanted: how many each walker is to have.
        starts: first start of each walker.
        further: the others of each; nothing where none are wanted.

    Raises:
        InputError: there are more or fewer, or one has other atoms, periodicity, charge or spin than the first start of
            its walker, or holds others fixed or elsewhere.
    """
    if not wanted and not further:
        return
    numbers = [len(own) for own in further]
    if numbers != [wanted] * len(starts):
        if not wanted:
            raise InputError("walkers have further starts where rewind.to is 'starts' only; set it, or give none.")
        given = f"{min(numbers)} to {max(numbers)} for {len(numbers)}" if numbers else "none"
        raise InputError(
            f"rewind.to 'starts' asks for {wanted} further starts (rewind.keep) for each of {len(starts)} walkers; "
            f"given are {given}."
        )
    for walker, (first, own) in enumerate(zip(starts, further, strict=True)):
        for number, start in enumerate(own):
            if not begins_alike(first, start):
                raise InputError(
                    f"further start {number} of walker {walker} has other atoms, periodicity, charge, spin or fixed "
                    "atoms than its first start; give one that differs in positions and cell only."
                )


def dealt_further(frames: Sequence[Atoms], walkers: int, count: int) -> list[list[Atoms]]:
    """Further starts of walkers that begin at some frames in turn: the others of the same atoms, unused ones first.

    Args:
        frames: walker w begins at the one of number w, modulo how many there are.
        walkers: how many there are.
        count: further starts of each; one that finds no others of its atoms begins again where it began.

    >>> from ase.build import molecule
    >>> from almlip_jax.dynamics import dealt_further
    >>> frames = [molecule(name) for name in ("N2", "CO", "N2", "N2")]
    >>> [[frame.get_chemical_formula() for frame in own] for own in dealt_further(frames, 2, 2)]
    [['N2', 'N2'], ['CO', 'CO']]
    """
    if not count:
        return []
    order = [*range(walkers, len(frames)), *range(min(walkers, len(frames)))]
    further = []
    for walker in range(walkers):
        own, turn = walker % len(frames), walker % len(order)
        others = [frames[n] for n in [*order[turn:], *order[:turn]] if n != own]
        alike = [frame for frame in others if begins_alike(frames[own], frame)] or [frames[own]]
        further.append([alike[n % len(alike)] for n in range(count)])
    return further


def begins_alike(first: Atoms, other: Atoms) -> bool:
    """Whether a walker that began at one structure can go on at another: they differ in positions and cell only.

    >>> from ase.build import molecule
    >>> from almlip_jax.dynamics import begins_alike
    >>> begins_alike(molecule("CH3CHO"), molecule("CH3CHO")), begins_alike(molecule("N2"), molecule("CO"))
    (True, False)
    """
    if list(first.numbers) != list(other.numbers) or list(first.pbc) != list(other.pbc):
        return False
    if electronic_state(first) != electronic_state(other):
        return False
    held, others = (_held(frame) for frame in (first, other))
    return held == others and np.allclose(first.positions[held], other.positions[held], rtol=0, atol=_SAME_PLACE)


def _held(frame: Atoms) -> list[int]:
    """Atoms that do not move; who runs walkers refuses all other constraints, some of which name no atoms."""
    fixed = [constraint for constraint in frame.constraints if isinstance(constraint, FixAtoms)]
    return sorted({int(n) % len(frame) for constraint in fixed for n in constraint.get_indices()})
