"""Frames drawn at random from exploration, from whose labels the gate's thresholds come: never selected nor trained on.

What was selected for its uncertainty says nothing about the frames that a gate lets pass.  These frames are a uniform
draw of what the walkers visited (of their trajectories, one frame every ``trajectory_every`` steps), so that the atoms
of a later exploration like it are exchangeable with theirs.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Sequence
from itertools import islice

import numpy as np
from ase import Atoms

from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.structures.carried import carried
from almlip_jax.structures.io import read_structures
from almlip_jax.structures.repeats import geometry_key

_KEPT = ("charge", "spin", "system", "walker", "step", "time_fs", "temperature")


def draw_frames(
    trajectories: Sequence[Sequence[Atoms]],
    count: int,
    generator: np.random.Generator,
    known: Collection[bytes] = (),
    held_out: Container[Atoms] = (),
) -> list[Atoms]:
    """Frames of the trajectories of all walkers, each as likely as any other, in the order of walkers and steps.

    Args:
        trajectories: of each walker.
        count: how many; fewer where there are fewer frames.
        generator: decides.
        known: keys of structures that are left out, such as those of the test set.
        held_out: structures that none may be the same as, however it is written down: another is drawn instead.
    """
    visited = [frame for frames in trajectories for frame in frames if geometry_key(frame) not in known]
    order = (place for place in generator.permutation(len(visited)).tolist() if visited[place] not in held_out)
    drawn = []
    for place in sorted(islice(order, count)):
        frame = visited[place]
        bare = carried(frame)
        bare.info = {key: frame.info[key] for key in _KEPT if key in frame.info}
        drawn.append(bare)
    return drawn


def calibration_set(run: RunDirectory, round_index: int) -> list[Atoms]:
    """The labelled frames that were drawn in the rounds before one."""
    files = [run.round(earlier).calibration for earlier in range(round_index)]
    return [frame for file in files if file.exists() for frame in read_structures(file, require_labels=True)]


def drawn_keys(run: RunDirectory, round_index: int) -> set[bytes]:
    """What identifies the frames that were drawn in the rounds before one, labelled or not."""
    files = [run.round(earlier).drawn for earlier in range(round_index)]
    return {geometry_key(frame) for file in files if file.exists() for frame in read_structures(file)}
