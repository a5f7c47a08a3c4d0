"""Which electronic states a potential has learned of: its predictions for others mean nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from ase import Atoms

from almlip_jax.structures.electronic_state import electronic_state

_STATES = "states"


def states_note(structures: Iterable[Atoms], before: Collection[tuple[int, int]] = ()) -> dict[str, Any]:
    """The entry of metadata on the states (charge and multiplicity) of structures that a potential was trained on.

    Args:
        structures: trained on.
        before: states that it had learned of already.
    """
    return {_STATES: sorted({*map(electronic_state, structures), *before})}


def noted_states(metadata: Any) -> frozenset[tuple[int, int]]:
    """The states that metadata hold; none where nothing is known of them."""
    return frozenset((int(charge), int(spin)) for charge, spin in metadata.get(_STATES, ()))


def strange_state(atoms: Atoms, states: Collection[tuple[int, int]]) -> str | None:
    """A sentence that a potential does not know the state of a structure; None where it does.

    Args:
        atoms: the structure.
        states: those known; where there are none, every state is as good as any other.
    """
    state = electronic_state(atoms)
    if not states or state in states:
        return None
    known = " and ".join(f"charge {charge}, spin {spin}" for charge, spin in sorted(states))
    return (
        f"{atoms.get_chemical_formula()} has charge {state[0]} and spin {state[1]}, but the potential has learned of "
        f"{known} only; give charge and spin in info, or train it with such structures."
    )
