"""Runs of walkers in several programs, put together as if they had run in one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, TypeVar

import numpy as np
from ase import Atoms

from almlip_jax.dynamics.results import Exploration
from almlip_jax.dynamics.seen import Thresholds

Value = TypeVar("Value")

_OF_WALKERS = (
    "walker_temperature",
    "end_step",
    "end_atom",
    "end_member",
    "restarts",
    "departed_step",
    "departed_atom",
    "departure",
)
_TRACES = ("temperature", "energy", "bias", "pressure", "volume")


def side_by_side(parts: Sequence[tuple[Sequence[int], Exploration]]) -> Exploration:
    """One exploration of all walkers.

    What a program did not trace, since all its walkers had ended, is NaN.

    Args:
        parts: of each program the numbers of its walkers among all, and what they found; frames are numbered anew.
    """
    if len(parts) == 1:
        return parts[0][1]
    longest = max((found for _, found in parts), key=lambda found: len(found.step))
    walkers = sum(len(numbers) for numbers, _ in parts)

    def traced(values: Callable[[Exploration], np.ndarray]) -> np.ndarray:
        joined = np.full((len(longest.step), walkers), np.nan, np.result_type(*(values(found) for _, found in parts)))
        for numbers, found in parts:
            joined[: len(values(found)), list(numbers)] = values(found)
        return joined

    def each(values: Callable[[Exploration], Sequence[Value]]) -> list[Value]:
        of_walker = {n: value for numbers, found in parts for n, value in zip(numbers, values(found), strict=True)}
        return [of_walker[n] for n in range(walkers)]

    for numbers, found in parts:
        for frame in (*found.recorded, *(frame for frames in found.trajectories for frame in frames)):
            frame.info["walker"] = numbers[frame.info["walker"]]
    recorded = [frame for _, found in parts for frame in found.recorded]
    traces: dict[str, Any] = {name: traced(attrgetter(name)) for name in _TRACES}
    of_walkers: dict[str, Any] = {name: np.array(each(attrgetter(name))) for name in _OF_WALKERS}
    levels: dict[str, Any] = {name: np.array(each(attrgetter(f"thresholds.{name}"))) for name in ("record", "stop")}
    return Exploration(  # whole, so that something new in it is not taken from one program alone
        step=longest.step,
        time_fs=longest.time_fs,
        steps=longest.steps,
        timestep=longest.timestep,
        scores={name: traced(_score(name)) for name in longest.scores},
        **traces,
        **of_walkers,
        status=tuple(each(attrgetter("status"))),
        cause=tuple(each(attrgetter("cause"))),
        recorded=sorted(recorded, key=_place),
        trajectories=each(attrgetter("trajectories")),
        final=each(attrgetter("final")),
        frames_planned=sum(found.frames_planned for _, found in parts),
        frames_below=sum(found.frames_below for _, found in parts),
        thresholds=Thresholds(**levels),
        offered=sum(found.offered for _, found in parts),
    )


def _score(name: str) -> Callable[[Exploration], np.ndarray]:
    return lambda found: found.scores[name]


def _place(frame: Atoms) -> tuple[int, int]:
    return frame.info["walker"], frame.info["step"]
