"""Structures that come more than once: the same label counts once; another label is kept and reported."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from itertools import islice

import numpy as np
from ase import Atoms

from almlip_jax.structures.electronic_state import electronic_state
from almlip_jax.structures.labels import label_difference
from almlip_jax.structures.weights import loss_weights
from almlip_jax.targets import label_names

_TOLD = 3  # pairs
_COMPARED = 16  # labels of one structure that a further one is compared with, so that no number of them takes long


def geometry_key(atoms: Atoms) -> bytes:
    """What makes two structures the same for the separation of training and test: all but 1e-6 Angstrom."""
    cell = np.where(np.asarray(atoms.pbc)[:, None], atoms.cell.array, 0.0)
    numbers = np.concatenate([np.ravel(atoms.positions), np.ravel(cell)])
    state = [*atoms.numbers, *atoms.pbc, *electronic_state(atoms)]
    return np.round(numbers * 1e6).astype(np.int64).tobytes() + np.asarray(state, np.int64).tobytes()


def without_repeats(
    frames: Sequence[Atoms],
    key: Callable[[Atoms], bytes],
    what: str,
    say: Callable[[str], None],
    untold: Container[bytes] = (),
) -> list[Atoms]:
    """Labelled structures, each with each of its labels once.

    One with the same label is kept too where it has a further label, or other weights.  It takes time in proportion to
    the number of structures.

    Args:
        frames: labelled.
        key: what makes two structures the same.
        what: to call them all, such as ``the initial set``.
        say: is told which structures have several labels, and how far apart those are.
        untold: keys of structures of which it is not, since they are told of otherwise.
    """
    places: dict[bytes, list[int]] = {}
    kept: list[Atoms] = []
    several: list[tuple[int, int, str]] = []
    for number, frame in enumerate(frames):
        mine = key(frame)
        before = places.setdefault(mine, [])
        apart = {one: label_difference(frames[one], frame) for one in islice(before, _COMPARED)}
        same = [frames[one] for one, difference in apart.items() if difference is None]
        if any(_tells_no_more(frame, one) for one in same):
            continue
        if before and not same and mine not in untold:
            several.append((before[0], number, str(apart[before[0]])))
        before.append(number)
        kept.append(frame)
    if several:
        more = f", and {len(several) - _TOLD} more" if len(several) > _TOLD else ""
        told = [f"{_named(frames, one)} and {_named(frames, other)} ({far})" for one, other, far in several[:_TOLD]]
        say(
            f"{what}: the same structure has different labels in frames {', '.join(told)}{more}. All of them are kept; "
            "remove those that are wrong."
        )
    return kept


def _tells_no_more(frame: Atoms, known: Atoms) -> bool:
    """Whether a frame has no label that another one of the same structure and labels lacks, and the same weights."""
    ours, theirs = ({name for name in label_names() if name in _results(one)} for one in (frame, known))
    return ours <= theirs and loss_weights(frame, "a structure") == loss_weights(known, "a structure")


def _results(atoms: Atoms) -> dict[str, object]:
    return {} if atoms.calc is None else atoms.calc.results


def _named(frames: Sequence[Atoms], number: int) -> str:
    """A frame by its place among those of its origin."""
    origin = frames[number].info.get("origin", "")
    place = sum(frame.info.get("origin", "") == origin for frame in frames[:number])
    return f"{place} of {origin}" if origin else str(place)
