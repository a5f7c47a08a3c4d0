"""Structures that come more than once: the same label counts once; another label is kept and reported."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ase import Atoms

from almlip_jax.structures.labels import label_difference

_TOLD = 3  # pairs


def without_repeats(
    frames: Sequence[Atoms], key: Callable[[Atoms], bytes], what: str, say: Callable[[str], None]
) -> list[Atoms]:
    """Labelled structures, each with each of its labels once.

    Args:
        frames: labelled.
        key: what makes two structures the same.
        what: to call them all, such as ``the initial set``.
        say: is told which structures have several labels, and how far apart those are.
    """
    places: dict[bytes, list[int]] = {}
    kept: list[Atoms] = []
    several: list[str] = []
    for number, frame in enumerate(frames):
        before = places.setdefault(key(frame), [])
        apart = [label_difference(frames[one], frame) for one in before]
        if None in apart:
            continue
        if before:
            several.append(f"{_named(frames, before[0])} and {_named(frames, number)} ({apart[0]})")
        before.append(number)
        kept.append(frame)
    if several:
        more = f", and {len(several) - _TOLD} more" if len(several) > _TOLD else ""
        say(
            f"{what}: the same structure has different labels in frames {', '.join(several[:_TOLD])}{more}. All "
            "of them are kept; remove those that are wrong."
        )
    return kept


def _named(frames: Sequence[Atoms], number: int) -> str:
    """A frame by its place among those of its origin."""
    origin = frames[number].info.get("origin", "")
    place = sum(frame.info.get("origin", "") == origin for frame in frames[:number])
    return f"{place} of {origin}" if origin else str(place)
