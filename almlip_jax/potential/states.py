"""Which electronic states a potential has learned of: for others it predicts what means nothing, or the same.

Those that it tells apart and those that it was merely trained on are noted under names of their own, since a potential
as a label source is held to the first kind alone (`any_state`).  Potentials of old have no note of the second kind.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from ase import Atoms

from almlip_jax.structures.electronic_state import electronic_state, stated_state

_TOLD, _MET = "states", "states_met"


def states_note(
    structures: Iterable[Atoms], before: Collection[tuple[int, int]] | None = (), *, sees_state: bool
) -> dict[str, Any]:
    """The entry of metadata on the states (charge and multiplicity) of structures that a potential was trained on.

    Args:
        structures: trained on.
        before: states that it had learned of already; None where these are not known, which leaves no entry.
        sees_state: whether the potential tells structures apart that differ in charge and spin alone.
    """
    if before is None:
        return {}
    return {_TOLD if sees_state else _MET: sorted({*map(electronic_state, structures), *before})}


def noted_states(metadata: Any) -> frozenset[tuple[int, int]]:
    """The states that metadata hold, told apart or not; none where nothing is known of them."""
    noted = metadata.get(_TOLD) or metadata.get(_MET, ())
    return frozenset((int(charge), int(spin)) for charge, spin in noted)


def completed_state(
    states: Collection[tuple[int, int]], charge: int | None = None, spin: int | None = None
) -> dict[str, int]:
    """``charge`` and ``spin`` as far as they are given, or follow from the only state that a potential has learned of.

    A charge without a spin has that of the only learned state of this charge.  A spin says nothing of the charge: a
    neutral radical that nothing was learned of is not an ion.

    Args:
        states: that it has learned of.
        charge: e, where it is given.
        spin: multiplicity 2S+1, likewise.
    """
    given = {name: value for name, value in (("charge", charge), ("spin", spin)) if value is not None}
    fitting = [dict(zip(("charge", "spin"), state, strict=True)) for state in states]
    fitting = [state for state in fitting if given.items() <= state.items()]
    return fitting[0] if len(fitting) == 1 and (len(states) == 1 or charge is not None) else given


def strange_state(atoms: Atoms, states: Collection[tuple[int, int]], *, sees_state: bool) -> str | None:
    """A sentence that a potential does not know the state of a structure; None where it does.

    Where it tells none apart, a structure that does not say its charge or spin is one of those that it knows.

    Args:
        atoms: the structure.
        states: those known; where there are none, every state is as good as any other.
        sees_state: whether it tells structures apart that differ in charge and spin alone.
    """
    state = electronic_state(atoms)
    if not states or state in states:
        return None
    known = " and ".join(f"charge {charge}, spin {spin}" for charge, spin in sorted(states))
    subject = atoms.get_chemical_formula() or "the system"
    learned = f"{subject} has charge {state[0]} and spin {state[1]}, but the potential has learned of {known} only"
    if sees_state:
        return f"{learned}; give both (in info, or by options of their own), or train it with such structures."
    stated = {"spin": state[1]} if state[1] != 1 else {}
    stated |= stated_state(atoms)
    if any(stated.items() <= {"charge": charge, "spin": spin}.items() for charge, spin in states):
        return None
    return f"{learned} and tells none apart, so that it predicts the same; train one with such structures."
